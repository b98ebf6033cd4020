"""Whoever reads what is said of a missing file, and does it, gets rid of the error; no words may come twice."""

import contextlib
import os
import re
import shutil
import tempfile
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)

from pulid_sdxl.tools import comfy_host

comfy_host.enter(os.environ["COMFYUI"])

import folder_paths
import numpy as np
import torch
from pulid_sdxl.models import catalogue, locate
from pulid_sdxl.nodes import host, load
from pulid_sdxl.nodes.load import PulidLoader
from pulid_sdxl.nodes.save_load import PulidLoadIdentity, PulidSaveIdentity
from pulid_sdxl.pulid.errors import DownloadError, PulidError
from pulid_sdxl.tools.model_files import gather

from .sampling import make_identity

V1_1, EVA, SCRFD, GLINTR = (
    one.name for one in (catalogue.V1_1, catalogue.EVA_CLIP, catalogue.SCRFD, catalogue.GLINTR100)
)
FACE_FOLDER = "insightface/models/antelopev2"


@pytest.fixture
def models(monkeypatch, comfyui):
    """A `models` folder with a stand-in for each file, which others may read, and a Hugging Face that has them too."""
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        sources = {Path(part.place).name: part for part in gather(None, None, comfyui)}

        def put(record, folder, *_):
            """As `fetch` does; what that says itself is in tests/models/test_download.py."""
            if (folder / record.name).is_dir():
                raise DownloadError(f"{record.name} could not be written. {locate.in_the_way(folder / record.name)}")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".part").symlink_to(sources[record.name].source)
            os.replace(folder / ".part", folder / record.name)

        Path(folder).chmod(0o755)
        monkeypatch.setattr(load, "fetch", put)
        monkeypatch.setattr(folder_paths, "models_dir", str(models))
        for kind in ("input", "output", "temp"):
            monkeypatch.setattr(folder_paths, f"{kind}_directory", str(models.parent / kind))
        monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
        monkeypatch.setattr(folder_paths, "filename_list_cache", {})
        monkeypatch.setattr(host, "other_programs", lambda environment, home: ())
        for name in host.VISION_FOLDERS:
            folder_paths.add_model_folder_path(name, str(models / name))
        host.register_folders()
        for part in sources.values():
            if not part.place.startswith("checkpoints"):
                (models / part.place).parent.mkdir(parents=True, exist_ok=True)
                (models / part.place).symlink_to(part.source)
                WHOLE[Path(part.place).name] = Path(part.source)
        yield models


def offered(node, name):
    folder_paths.filename_list_cache.clear()
    return next(one.options for one in node.define_schema().inputs if one.id == name)


WHOLE: dict[str, Path] = {}  # files that the user has elsewhere


class Reader:
    """Knows what the node shows and what is said, nothing of how it is made."""

    def __init__(self, models, chosen):
        self.models, self.chosen, self.said = models, chosen, []

    def run(self):
        loaded = PulidLoader.execute(**{"face_analysis": "antelopev2", "provider": "CPU", **self.chosen}).args[0]
        analyzer = loaded.networks.analyzer
        crop = torch.zeros(1, 3, 512, 512)
        analyzer.detect(BLACK, 64), analyzer.recognise_crop(BLACK)
        analyzer.detect_for_alignment(BLACK), analyzer.parse(crop)

    def path(self, words):
        """A path as it is said: whole, or a folder and a name."""
        return Path(words) if words.startswith("/") else next(self.models.parent.rglob(words))

    def give(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(WHOLE[path.name])

    def do(self, said):
        """The first thing that is advised and can be done."""
        said = said.split("\n\n")[0]

        def says(pattern):
            return re.search(pattern, said, re.DOTALL)

        if found := says(r"(\S+) is a link that leads nowhere: to (\S+)\. Put the file there"):
            self.give(Path(found[2]))
        elif found := says(r"(\S+) is a folder, where a file should be\. Move it away"):
            self.path(found[1]).rename(self.models.parent / f"away {len(self.said)}")
        elif found := says(r"(\S+): Permission denied\. Give the user that ComfyUI runs as the right to read it"):
            with as_user(0):
                self.path(found[1]).chmod(0o755)
        elif says(r"choose another file|Choose one of the list"):
            name = next(name for name in ("pulid_file", "eva_clip") if self.chosen[name] in said)
            self.chosen[name] = offered(PulidLoader, name)[0]
        elif says("Set missing_files of .* to download and run again") and self.chosen["missing_files"] != "download":
            self.chosen["missing_files"] = "download"
        elif found := says(r"([^\s/]+/[^\s/]+) (\(0 bytes\)|is not a whole).*Delete it and"):
            self.path(found[1]).unlink()
        elif found := says(
            r"\.zip could not be unpacked.*unpack the zip into a folder of your own.*, under insightface"
        ):
            own = self.models.parent / "own"
            for name in (SCRFD, GLINTR):
                self.give(own / "antelopev2" / name)
            folder_paths.add_model_folder_path("insightface", str(own))
        else:
            pytest.fail(f"nothing that can be done: {said}")

    def follow(self):
        while True:
            try:
                return self.run()
            except PulidError as error:
                assert str(error) not in self.said, f"said again: {error}"
                self.said.append(str(error))
                self.do(self.said[-1])


FAULT = {
    "gone": Path.unlink,
    "empty": lambda path: (path.unlink(), path.touch()),
    "leads nowhere": lambda path: (path.unlink(), path.symlink_to(path.parents[2] / "moved" / path.name)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link": lambda path: path.symlink_to(path.rename(path.with_name("elsewhere.bin"))),
    "other weights": lambda path: shutil.copyfile(WHOLE[catalogue.BISENET.name], path),
    "closed": lambda path: path.chmod(0),
}


def spoil(models, fault, *names):
    for name in names:
        FAULT[fault](next(models.rglob(name)))


def zipped_where_nothing_can_be_written(models, *_):
    """The zip in a share: where its files belong, a file stands, as root may write to every folder."""
    spoil(models, "gone", SCRFD, GLINTR)
    for place in ("models", "antelopev2"):
        shutil.rmtree(models / "insightface" / place, ignore_errors=True)
        (models / "insightface" / place).write_bytes(b"")
    with zipfile.ZipFile(models / "insightface" / "antelopev2.zip", "w") as packed:
        for name in (SCRFD, GLINTR):
            packed.write(WHOLE[name], f"antelopev2/{name}")


NOBODY = 65534
BLACK = np.zeros((64, 64, 3), np.uint8)
EVERY = (V1_1, EVA, SCRFD, GLINTR, catalogue.RETINAFACE.name, catalogue.BISENET.name)
FLUX = "pulid_flux_v0.9.1.safetensors"
FAULTS = [
    *((fault, [name], {}) for fault in ("gone", "empty", "leads nowhere", "a folder") for name in EVERY),
    *(("gone", names, {}) for names in (EVERY, EVERY[:2], EVERY[2:], [V1_1, GLINTR])),
    ("empty", EVERY, {}),
    ("leads nowhere", EVERY, {}),
    *(("gone", [], {"pulid_file": name}) for name in (FLUX, "mine.safetensors", f"SDXL\\{V1_1}", "x/mine.bin", "CON")),
    *(("gone", [V1_1], {"pulid_file": name}) for name in (FLUX, "mine.safetensors", f"SDXL\\{V1_1}", load.NONE_YET)),
    *(("gone", [EVA], {"eva_clip": name}) for name in ("mine.pt", f"eva/{EVA}", load.NONE_YET)),
    ("gone", EVERY, {"pulid_file": "mine.safetensors", "eva_clip": "mine.pt"}),
    ("gone", EVERY, {"pulid_file": FLUX, "eva_clip": f"EVA\\{EVA}"}),
]  # fmt: skip


@pytest.mark.parametrize("missing_files", ["stop", "download"])
@pytest.mark.parametrize(("fault", "names", "chosen"), FAULTS, ids=str)
def test_whoever_does_what_is_said_gets_rid_of_the_error(models, fault, names, chosen, missing_files):
    reader = Reader(models, {"pulid_file": V1_1, "eva_clip": EVA, "missing_files": missing_files, **chosen})
    spoil(models, fault, *names)
    reader.follow()
    if missing_files == "download":
        assert not [said for said in reader.said if "Set missing_files of" in said.split("\n\n")[0]]
    if chosen.get("pulid_file") == f"SDXL\\{V1_1}" and (not names or missing_files == "download"):
        assert reader.said == []  # there is nothing to do


def test_a_zip_where_nothing_can_be_written_is_unpacked_elsewhere_by_hand(models, monkeypatch):
    reader = Reader(models, {"pulid_file": V1_1, "eva_clip": EVA, "missing_files": "stop"})
    zipped_where_nothing_can_be_written(models)
    zipped = (models / "insightface" / "antelopev2.zip").read_bytes()
    published = replace(catalogue.ANTELOPEV2_ZIP, size=len(zipped), sha256=sha256(zipped).hexdigest())
    unpack = load.unpack_antelopev2
    monkeypatch.setattr(load, "unpack_antelopev2", lambda folders: unpack(folders, published=published))
    reader.follow()
    assert len(reader.said) == 1


@contextlib.contextmanager
def as_user(number):
    """Root, to whom no file is closed, as somebody else, and back; nobody else can."""
    before = os.geteuid()
    if os.getuid() == 0:
        os.seteuid(number)
    try:
        if not os.access(__file__, os.R_OK, effective_ids=True):
            pytest.skip("THIS CHECKOUT IS CLOSED to everybody but root, so nobody else can try it")
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("name", ["pulid", V1_1, EVA, SCRFD, GLINTR, catalogue.BISENET.name])
def test_a_file_or_folder_that_may_not_be_read_is_given_the_right(models, name):
    reader = Reader(models, {"pulid_file": V1_1, "eva_clip": EVA, "missing_files": "stop"})
    reader.run()  # what is imported late is there
    closed = next(models.rglob(name))
    if closed.is_symlink():
        closed.unlink()
        shutil.copyfile(WHOLE[name], closed)
    closed.chmod(0)
    with as_user(NOBODY):
        reader.follow()
    assert len(reader.said) == 1


# ---- Identities ----


@pytest.mark.parametrize("fault", FAULT)
def test_whoever_does_what_is_said_of_an_identity_gets_rid_of_the_error(models, fault):
    PulidSaveIdentity.execute(identity := make_identity(), "anna")
    folder, name, said = host.saved_identities(), "anna_00001_.safetensors", []
    whole = (folder / name).read_bytes()
    FAULT[fault](folder / name)
    for _ in range(3):
        try:
            with as_user(NOBODY):
                loaded = PulidLoadIdentity.execute(name).args[0]
            break
        except PulidError as error:
            said.append(str(error))
        if found := re.search(r"(\S+): Permission denied\. Give the user .* the right to read it", said[-1]):
            Path(found[1]).chmod(0o644)
        elif "is a link, or lies behind one" in said[-1] and "Put the file itself there" in said[-1]:
            (folder / name).unlink()
            (folder / name).write_bytes(whole)
        elif re.search("[Ss]ave it with PuLID Save Identity|encode the person again and save|Choose another", said[-1]):
            saved = PulidSaveIdentity.execute(identity, "anna").ui["text"][0]
            name = saved.removeprefix("Saved as ")
            assert name in offered(PulidLoadIdentity, "identity_file")
    assert len(said) == 1 and torch.equal(loaded.cond, identity.cond)
