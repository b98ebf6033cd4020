"""The loader: what it offers, fetches, shows and says, on a ComfyUI whose folders are the test's own."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)

from pulid_sdxl.tools import comfy_host

comfy_host.enter(os.environ["COMFYUI"])

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from pulid_sdxl.hosted.errors import BadAnswer
from pulid_sdxl.models import catalogue
from pulid_sdxl.nodes import host, legacy, load
from pulid_sdxl.nodes.encode import PulidEncode
from pulid_sdxl.nodes.load import PulidLoader
from pulid_sdxl.nodes.save_load import PulidLoadIdentity
from pulid_sdxl.pulid.errors import DownloadError, MissingWeights
from pulid_sdxl.tools import TOOLS
from pulid_sdxl.tools.fakes.fake_hub import answer, serving
from pulid_sdxl.tools.model_files import gather

MODEL_FOLDERS = ("pulid", "facexlib", "insightface", "eva_clip", "clip_vision", "text_encoders")


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    """ComfyUI's `models` is an empty folder of the test's, and so is the home of other programs."""
    found = {name: ([str(tmp_path / name)], folder_paths.supported_pt_extensions) for name in MODEL_FOLDERS[4:]}
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", found)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(host, "other_programs", lambda environment, home: ())
    host.register_folders()
    return tmp_path


# ---- Folders ----


def test_every_folder_of_the_catalogue_is_known_to_comfyui(models):
    folders = host.model_folders()
    for file in catalogue.CATALOGUE:
        assert folders.of(file)
        assert folders.destination(file).is_relative_to(models)


def test_what_a_yaml_or_another_pack_registered_stays_first_and_as_it_was(models):
    folder_paths.folder_names_and_paths["pulid"] = (["/big disk/pulid"], {".safetensors"})
    folder_paths.folder_names_and_paths["insightface"] = (["/other pack/insightface"], set())

    host.register_folders()

    assert folder_paths.folder_names_and_paths["pulid"] == (
        ["/big disk/pulid", str(models / "pulid")],
        {".safetensors"},
    )
    paths, extensions = folder_paths.folder_names_and_paths["insightface"]
    assert paths == ["/other pack/insightface", str(models / "insightface")]
    assert extensions == {".onnx"}


def test_registering_twice_changes_nothing():
    before = {name: (list(paths), set(more)) for name, (paths, more) in folder_paths.folder_names_and_paths.items()}
    host.register_folders()
    after = {name: (list(paths), set(more)) for name, (paths, more) in folder_paths.folder_names_and_paths.items()}
    assert after == before


def test_a_tower_of_any_name_can_be_chosen_and_text_encoders_are_left_out(models):
    for place in ("clip_vision/renamed.safetensors", "clip_vision/my_EVA.pt", "text_encoders/t5.safetensors"):
        (models / place).parent.mkdir(exist_ok=True)
        (models / place).touch()

    options = {entry.id: entry for entry in PulidLoader.define_schema().inputs}["eva_clip"].options

    assert options == ["my_EVA.pt", "renamed.safetensors"]


def offered(name):
    return {entry.id: entry for entry in PulidLoader.define_schema().inputs}[name].options


def test_only_what_is_there_is_offered_so_that_the_editor_sees_what_is_missing(models):
    assert offered("pulid_file") == offered("eva_clip") == [load.NONE_YET]
    for name in ("ip-adapter_pulid_sdxl_fp16.safetensors", "pulid_v1.1.safetensors"):
        (models / "pulid").mkdir(exist_ok=True)
        (models / "pulid" / name).touch()
    (models / "clip_vision").mkdir()
    (models / "clip_vision" / "another.safetensors").touch()
    folder_paths.filename_list_cache.clear()
    assert offered("pulid_file") == ["pulid_v1.1.safetensors", "ip-adapter_pulid_sdxl_fp16.safetensors"]
    assert offered("eva_clip") == [load.NONE_YET, "another.safetensors"]  # that one has another name


def test_stopping_is_the_default_and_comes_first():
    entry = {entry.id: entry for entry in PulidLoader.define_schema().inputs}["missing_files"]
    assert entry.options == ["stop", "download"]
    assert entry.default == "stop"
    assert catalogue.RESEARCH_ONLY in entry.tooltip


# ---- Downloading from the graph ----

SMALL = {need.files[0].name: need.files[0].name.encode() * 200_000 for need in catalogue.NEEDS}
PLACES = {need.files[0].name: need.files[0].place for need in catalogue.NEEDS}


@pytest.fixture
def hub(monkeypatch):
    """A Hugging Face on this machine with a small file for each of the catalogue's."""
    with serving(SMALL) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def fetch_missing(pulid_file=catalogue.V1_1.name, eva_clip=catalogue.EVA_CLIP.name):
    """As the node does, but for what the small files have for size and hash."""

    def small(file):
        if file.name not in SMALL:
            return file
        content = SMALL[file.name]
        return replace(file, size=len(content), sha256=hashlib.sha256(content).hexdigest())

    needs = [replace(need, files=tuple(map(small, need.files))) for need in catalogue.NEEDS]
    return load.fetch_missing(pulid_file, eva_clip, host.model_folders(), needs)


def run(missing_files, pulid_file=catalogue.V1_1.name, eva_clip=catalogue.EVA_CLIP.name):
    return PulidLoader.execute(pulid_file, eva_clip, "antelopev2", "auto", missing_files)


def fetched(server):
    return [path.rpartition("/")[2] for path in server.fetched]


def test_nothing_is_fetched_unless_asked_for(models, hub):
    with pytest.raises(MissingWeights, match=r"^Missing: pulid_v1\.1\.safetensors, "):
        run("stop")
    assert hub.requests == []
    assert not list(models.rglob("*.*"))


def test_everything_missing_is_fetched_into_comfyuis_folders_and_its_licence_told(models, hub, monkeypatch):
    said = []
    monkeypatch.setattr(host, "say", said.append)

    notes = fetch_missing()

    assert sorted(fetched(hub)) == sorted(SMALL)
    for name, content in SMALL.items():
        assert (models / PLACES[name]).read_bytes() == content
    assert not list(models.rglob(".pulid-download"))
    assert len(notes) == len(said) == 6
    assert "Downloading glintr100.onnx (non-commercial research only)" in said
    assert "Downloaded glintr100.onnx. Licence: non-commercial research only." in notes


def test_what_is_there_is_not_fetched_again(models, hub):
    for name in list(SMALL)[1:]:
        (models / PLACES[name]).parent.mkdir(parents=True, exist_ok=True)
        (models / PLACES[name]).write_bytes(b"the user's own")

    assert fetch_missing() == ["Downloaded pulid_v1.1.safetensors. Licence: Apache-2.0."]
    assert fetched(hub) == ["pulid_v1.1.safetensors"]


def test_the_zip_of_antelopev2_spares_its_download(models, hub):
    (models / "insightface" / "models").mkdir(parents=True)
    (models / "insightface" / "models" / "antelopev2.zip").touch()

    fetch_missing("mine.safetensors", "mine.pt")

    assert sorted(fetched(hub)) == ["detection_Resnet50_Final.pth", "parsing_bisenet.pth"]


@pytest.mark.parametrize(
    "name",
    ["https://evil.example/pulid.safetensors", "glintr100.onnx", "antelopev2.zip", "../pulid_v1.1.safetensors"],
)  # fmt: skip
def test_no_name_in_a_workflow_becomes_an_address(models, hub, name):
    fetch_missing(name, name)

    assert set(fetched(hub)) == set(list(SMALL)[2:])  # the face networks, which nobody names


def test_the_bar_of_the_node_moves_and_ends_full(hub, monkeypatch):
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total)))

    fetch_missing(eva_clip="mine.pt")

    size = len(SMALL[catalogue.V1_1.name])
    assert (size, size) in seen
    assert all(value <= total for value, total in seen)


def test_the_user_can_interrupt(models, hub):
    comfy.model_management.interrupt_current_processing(True)

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run("download")

    assert not list(models.rglob("pulid_v1.1.safetensors"))
    comfy.model_management.interrupt_current_processing(False)


def test_a_download_that_fails_says_what_else_is_missing_and_advises_no_download(models, hub):
    hub.plan[:] = [answer(404)] * 4

    with pytest.raises(DownloadError) as caught:
        run("download")

    message = str(caught.value)
    assert message.startswith("pulid_v1.1.safetensors could not be fetched. 127.0.0.1 has no such file (HTTP 404)")
    assert "Still missing after it: EVA02_CLIP_L_336_psz14_s6B.pt, scrfd_10g_bnkps.onnx" in message
    assert "missing_files" not in message and "--download" not in message
    assert "torch" in message and "onnxruntime" in message and message.rstrip().endswith("doctor")


@pytest.mark.parametrize("choice", [load.NONE_YET, catalogue.V1_1.name])
def test_one_message_names_everything_that_is_missing_the_cure_first(models, monkeypatch, choice):
    monkeypatch.setenv("HOME", str(models.parent))
    with pytest.raises(MissingWeights) as caught:
        run("stop", choice, load.NONE_YET)
    first, second, *rest = str(caught.value).splitlines()
    assert first == f"Missing: {', '.join(SMALL)}."
    assert second == "Set missing_files of Load PuLID (SDXL) to download and run again (2281 MB). Or fetch by hand:"
    for line, need in zip(rest, catalogue.NEEDS, strict=False):
        file = need.files[0]
        assert line == f"- {file.url} to models/{file.folders[0]}"
    assert str(models) not in str(caught.value)
    assert "non-commercial research only" in rest[-1]


def test_a_file_of_ones_own_that_is_missing_is_not_offered_for_download(models, comfyui):
    linked(models, comfyui)
    with pytest.raises(MissingWeights) as caught:
        run("stop", "mine.safetensors")
    first, second = str(caught.value).splitlines()
    assert first == "Missing: mine.safetensors."
    assert second.startswith("mine.safetensors was not found. Looked in: ")
    assert second.endswith(", or choose another file.")


def test_a_file_name_that_a_prompt_leaves_out_is_left_to_comfyui_to_tell():
    assert PulidLoader.validate_inputs() and PulidLoadIdentity.validate_inputs()


def test_no_error_carries_a_path_before_its_name():
    assert {error.__module__ for error in (MissingWeights, DownloadError, BadAnswer)} == {"pulid"}


def test_whole_files_load_whatever_their_names_and_the_node_says_what_runs(models, comfyui):
    renamed = {catalogue.V1_1.name: "a.bin", catalogue.EVA_CLIP.name: "b.safetensors"}
    for part in gather(None, None, comfyui):
        place = models / part.place
        place.parent.mkdir(parents=True, exist_ok=True)
        place.with_name(renamed.get(place.name, place.name)).symlink_to(part.source)

    output = run("download", "a.bin", "b.safetensors")  # nothing is missing

    assert output.result[0].weights.version == "v1.1"
    assert output.ui["text"] == [
        "PuLID v1.1, a.bin.",
        "InsightFace's antelopev2 (non-commercial research only) runs on CPU.",
    ]


def linked(models, comfyui, but=()):
    """A stand-in for each file that is not there."""
    for part in gather(None, None, comfyui):
        place = models / part.place
        if not place.exists() and not part.place.startswith(but):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(part.source)


def test_without_face_networks_saved_identities_work_and_photographs_are_refused_in_words(models, comfyui):
    linked(models, comfyui, but=("insightface", "facexlib"))

    output = run("stop")

    pulid = output.result[0]
    assert pulid.weights.version == "v1.1"
    assert output.ui["text"][1].startswith("Only saved identities can be used, no photographs. Missing: scrfd_10g")
    with pytest.raises(MissingWeights, match=r"(?s)^Missing: scrfd_10g_bnkps.onnx.*non-commercial"):
        PulidEncode.execute(
            *[[one] for one in (pulid, torch.rand(1, 64, 64, 3), "largest", 0, "one person", False, "stop")]
        )


def test_each_face_file_that_arrives_makes_the_loader_run_again_once(models, comfyui):
    linked(models, comfyui, but=("insightface", "facexlib"))
    names, states = (catalogue.V1_1.name, catalogue.EVA_CLIP.name), set()
    for place in map(models.joinpath, ("", *list(PLACES.values())[2:])):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
        states |= {PulidLoader.fingerprint_inputs(*names) for _ in range(2)}
    assert len(states) == 5


def test_files_that_are_replaced_under_their_names_make_the_loaders_run_again(models, comfyui):
    linked(models, comfyui)
    names = catalogue.V1_1.name, catalogue.EVA_CLIP.name
    loaders = {
        "pulid": (lambda: PulidLoader.fingerprint_inputs(*names), list(PLACES)),
        "older pulid": (lambda: legacy.PulidModelLoader.fingerprint_inputs(names[0]), [names[0]]),
        "older tower": (legacy.PulidEvaClipLoader.fingerprint_inputs, [names[1]]),
        "older faces": (legacy.PulidInsightFaceLoader.fingerprint_inputs, list(PLACES)[2:]),
    }
    for of, its_files in loaders.values():
        for name in PLACES:
            before, place = of(), models / PLACES[name]
            assert before == of()
            again = place.with_name("again")
            shutil.copyfile(place, again)
            again.replace(place)
            assert (of() != before) == (name in its_files), name


def test_asking_whether_to_load_again_writes_nothing(models):
    place = models / "insightface" / "models"
    place.mkdir(parents=True)
    with zipfile.ZipFile(place / "antelopev2.zip", "w") as zipped:
        for name in ("scrfd_10g_bnkps.onnx", "glintr100.onnx"):
            zipped.writestr(f"antelopev2/{name}", b"weights")
    before = sorted(models.rglob("*"))
    PulidLoader.fingerprint_inputs(catalogue.V1_1.name, catalogue.EVA_CLIP.name)
    legacy.PulidInsightFaceLoader.fingerprint_inputs()
    assert sorted(models.rglob("*")) == before


# ---- Packages that are missing or broken ----

# Broken for this pack only, as newer ComfyUIs import cv2 themselves; more ways are in tests/models/test_doctor.py.
BROKEN = """
import sys

if "pulid_sdxl.nodes" in sys.modules:
    raise OSError("libcudart.so.12: cannot open shared object file")
"""

LIST_AND_LOAD = """
import asyncio, sys
from pulid_sdxl.tools import comfy_host
comfy_host.enter(sys.argv[1])
import comfy.sd
import pulid_sdxl
extension = asyncio.run(pulid_sdxl.comfy_entrypoint())
nodes = asyncio.run(extension.get_node_list())
print([node.define_schema().node_id for node in nodes])
from pulid_sdxl.models.onnx_providers import available_providers
try:
    available_providers()
except Exception as error:
    print(type(error).__name__, error)
"""


def test_broken_packages_never_keep_the_pack_from_loading_and_are_named_when_needed(comfyui, tmp_path):
    for package in ("insightface", "facexlib", "onnxruntime", "cv2"):
        (tmp_path / "broken" / package).mkdir(parents=True)
        (tmp_path / "broken" / package / "__init__.py").write_text(BROKEN)

    command = [sys.executable, TOOLS, "-c", LIST_AND_LOAD, comfyui]
    variables = {**os.environ, "PYTHONPATH": str(tmp_path / "broken")}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)

    assert done.returncode == 0, done.stderr[-2000:]
    assert "PuLID_Loader" in done.stdout and "PuLID_Encode" in done.stdout
    assert (
        "MissingPackage The Python package 'onnxruntime' is installed, but cannot be imported (OSError: libcu"
        in done.stdout
    )
    assert f'"{sys.executable}" -m pip install --upgrade --force-reinstall --no-deps onnxruntime' in done.stdout


# ---- Providers ----


def test_what_is_really_used_is_on_the_node():
    assert load._on_provider(["CPUExecutionProvider"]) == [
        "InsightFace's antelopev2 (non-commercial research only) runs on CPU."
    ]


@pytest.mark.filterwarnings("ignore:Specified provider")  # where this onnxruntime does not even offer it
def test_a_provider_that_does_not_load_is_told_with_its_reason():
    lines = load._on_provider(["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert lines[0].endswith("runs on CPU.")
    assert "CUDAExecutionProvider was asked for, but could not be loaded: " in lines[1]
