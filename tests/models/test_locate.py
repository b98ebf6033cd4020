"""Finding weight files in given folders, and what is said about the ones that are not there."""

import hashlib
import json
import re
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
from pulid_sdxl.models import catalogue, doctor, inventory, locate
from pulid_sdxl.models.locate import ModelFolders
from pulid_sdxl.pulid.errors import DamagedWeights, DownloadError, InputError, MissingWeights
from pulid_sdxl.tools import ROOT, readme
from pulid_sdxl.tools.fakes.damage import damages
from pulid_sdxl.tools.fakes.folders import folders_below


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def antelopev2(folder):
    """Both files of antelopev2, empty, in this folder."""
    for file in (catalogue.SCRFD, catalogue.GLINTR100):
        touch(folder / file.name)
    return folder


# ---- The catalogue ----


def test_every_file_has_a_place_an_https_address_and_a_hash_or_a_commit():
    hashes = [file.sha256 for file in catalogue.CATALOGUE if file.sha256]

    assert len(catalogue.BY_NAME) == len(catalogue.CATALOGUE)
    for file in catalogue.CATALOGUE:
        assert file.folders and not any(PurePosixPath(folder).is_absolute() for folder in file.folders)
        assert file.url.startswith("https://") and file.licence and file.needed_for
        assert file.name == PurePosixPath(file.name).name
    assert len(hashes) == len(set(hashes)) == 8
    assert all(re.fullmatch(r"[0-9a-f]{64}", text) for text in hashes)
    for need in catalogue.NEEDS:
        assert len({file.folders for file in need.files}) == 1
        assert all(file.copies and (file.sha256 or all(copy.pinned for copy in file.copies)) for file in need.files)


def test_readme_lists_the_catalogue():
    assert readme.markdown_table() in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "workflows").glob("*.json")), ids=lambda path: path.stem)
def test_workflows_point_to_the_files_of_the_catalogue(path):
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    hints = [
        hint for node in nodes if node["type"].startswith("PuLID_") for hint in node["properties"].get("models", [])
    ]
    assert [hint for hint in hints if hint != readme.workflow_hint(catalogue.BY_NAME[hint["name"]])] == []
    asked = {value for node in nodes if node["type"] == "PuLID_Loader" for value in node["widgets_values"]}
    loaded = (*catalogue.choices("pulid_file"), *catalogue.choices("eva_clip"))
    fetchable = {file.name for file in loaded if not file.name.endswith(".bin")}
    assert {hint["name"] for hint in hints} == asked & fetchable


@pytest.mark.parametrize("page", ["README.md", "web/docs/PuLID_Loader.md"])
def test_what_antelopev2_may_be_used_for_is_said_where_the_user_meets_it(page):
    assert catalogue.RESEARCH_ONLY in (ROOT / page).read_text(encoding="utf-8")


# ---- find ----


@pytest.mark.parametrize("name", ["mine.bin", "old/mine.bin", "old\\mine.bin"])
def test_the_first_folder_that_holds_the_file_decides(tmp_path, name):
    """The name may lie below the folder, with either slash."""
    found, _ = (touch(tmp_path / folder / name.replace("\\", "/")) for folder in ("b", "c"))
    (tmp_path / "a" / name.replace("\\", "/")).mkdir(parents=True)  # a folder of that name is not the file

    assert locate.find(name, [tmp_path / "a", str(tmp_path / "b"), tmp_path / "c"]) == found


@pytest.mark.parametrize("name", ["a\\..\\..\\secret.bin", "/etc/passwd", "C:\\secret.bin", "C:secret"])
def test_a_name_cannot_lead_out_of_the_folders(tmp_path, name):
    touch(tmp_path / "secret.bin")

    with pytest.raises(InputError, match="inside the model folders"):
        locate.find(name, [tmp_path / "pulid"])


@pytest.mark.parametrize("asked", [catalogue.EVA_CLIP, catalogue.EVA_CLIP.name])
def test_a_missing_file_is_told_with_everything_needed_to_get_it(tmp_path, asked):
    with pytest.raises(MissingWeights) as caught:
        locate.find(asked, [tmp_path / "clip_vision", tmp_path / "clip"])

    message = str(caught.value)
    assert "EVA02_CLIP_L_336_psz14_s6B.pt (the vision tower that looks at the face) was not found" in message
    assert f"Looked in: {tmp_path / 'clip_vision'}, {tmp_path / 'clip'}." in message
    assert (
        f"from {catalogue.EVA_CLIP.url} and put it at {tmp_path / 'clip_vision' / catalogue.EVA_CLIP.name}" in message
    )
    assert "Licence: MIT" in message


def test_what_is_said_without_folders_and_without_a_record(tmp_path):
    with pytest.raises(MissingWeights, match=r"no folder.*models.pulid.pulid_v1.1.safetensors"):
        locate.find(catalogue.V1_1, [])
    with pytest.raises(MissingWeights, match=r"^mine was not found\. Looked in: .*Put it in .*, or choose"):
        locate.find("mine", [tmp_path])


# ---- antelopev2 ----


@pytest.mark.parametrize(
    "place", ["models/antelopev2", "antelopev2", "models/antelopev2/antelopev2", "antelopev2/antelopev2"]
)
def test_antelopev2_is_found_flat_and_nested_and_half_of_it_hides_no_whole_one(tmp_path, place):
    whole = antelopev2(tmp_path / "insightface" / place)
    for half in ("models/antelopev2", "antelopev2"):
        touch(tmp_path / "insightface" / half / catalogue.SCRFD.name)

    assert locate.find_antelopev2([tmp_path / "none", tmp_path / "insightface"]) == whole


def test_missing_antelopev2_is_told_with_places_address_and_licence(tmp_path):
    touch(tmp_path / "models" / "antelopev2" / catalogue.SCRFD.name)

    with pytest.raises(MissingWeights) as caught:
        locate.find_antelopev2([tmp_path])

    message = str(caught.value)
    assert "scrfd_10g_bnkps.onnx and glintr100.onnx" in message
    assert all(str(tmp_path / place) in message for place in locate.ANTELOPEV2_PLACES)
    assert catalogue.ANTELOPEV2_ZIP.url in message
    assert f"put it, or the two files in it, in {tmp_path / 'models' / 'antelopev2'}" in message
    assert "non-commercial research only" in message


# ---- The zip of antelopev2 ----

DETECTOR, RECOGNISER = b"detector" * 1000, b"recogniser" * 5000
SMALL = tuple(
    replace(file, size=len(content), sha256=hashlib.sha256(content).hexdigest())
    for file, content in ((catalogue.SCRFD, DETECTOR), (catalogue.GLINTR100, RECOGNISER))
)


def unpack(models, zipped, **published):
    """`unpack_antelopev2`, with the zip at this path as the published one."""
    digest = hashlib.sha256(zipped.read_bytes()).hexdigest()
    record = replace(catalogue.ANTELOPEV2_ZIP, **({"size": zipped.stat().st_size, "sha256": digest} | published))
    locate.unpack_antelopev2(folders_below(models), SMALL, record)


def make_zip(path, recogniser=RECOGNISER, inside="antelopev2/"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr(f"{inside}scrfd_10g_bnkps.onnx", DETECTOR)
        packed.writestr(f"{inside}glintr100.onnx", recogniser)
        packed.writestr(f"{inside}genderage.onnx", b"not needed")
    return path


def everything(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.fixture
def zipped(tmp_path):
    return make_zip(tmp_path / "insightface" / "models" / "antelopev2.zip")


@pytest.mark.parametrize("place", ["models", ".", "models/antelopev2", "antelopev2"])
def test_the_zip_is_unpacked_where_its_files_belong(tmp_path, place):
    zipped = make_zip(tmp_path / "insightface" / place / "antelopev2.zip")

    unpack(tmp_path, zipped)

    found = locate.find_antelopev2([tmp_path / "insightface"])
    assert found == tmp_path / "insightface" / "models" / "antelopev2"
    assert (found / "scrfd_10g_bnkps.onnx").read_bytes() == DETECTOR
    assert (found / "glintr100.onnx").read_bytes() == RECOGNISER
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {zipped, *found.glob("*.onnx")}


def test_what_is_there_is_neither_unpacked_nor_replaced(tmp_path, zipped):
    mine = touch(tmp_path / "insightface" / "antelopev2" / "glintr100.onnx")

    unpack(tmp_path, zipped)
    assert mine.read_bytes() == b"" and mine.with_name("scrfd_10g_bnkps.onnx").read_bytes() == DETECTOR
    before = everything(tmp_path)
    unpack(tmp_path, zipped, sha256="0" * 64)  # not even looked at

    assert everything(tmp_path) == before


@pytest.mark.parametrize("verdict", [{"sha256": "0" * 64}, {"size": 5}])
def test_a_zip_that_is_not_as_published_gives_nothing(tmp_path, zipped, verdict):
    before = everything(tmp_path)

    with pytest.raises(DamagedWeights, match=r"models.antelopev2\.zip is not the zip that was published: .*instead of"):
        unpack(tmp_path, zipped, **verdict)

    assert everything(tmp_path) == before


def test_no_zip_but_the_published_one_is_opened(tmp_path, zipped):
    """Damaged, or made to fill the disk or to write elsewhere, and put there by hand under the published name."""
    whole, before = zipped.read_bytes(), everything(tmp_path)
    published = {"size": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    harmful = [make_zip(zipped, bytes(1 << 28)).read_bytes(), make_zip(zipped, inside="../../../").read_bytes()]

    for content in (*harmful, *damages(whole, 300)):
        zipped.write_bytes(content)
        with pytest.raises(DamagedWeights, match=r"models.antelopev2\.zip is not the zip that was published"):
            unpack(tmp_path, zipped, **published)
    assert everything(tmp_path) == before


def test_a_zip_with_another_file_of_that_name_gives_none(tmp_path, zipped):
    make_zip(zipped, recogniser=RECOGNISER[:-1] + b"x")

    with pytest.raises(DamagedWeights, match=r"holds another glintr100\.onnx"):
        unpack(tmp_path, zipped)

    assert {path.name for path in tmp_path.rglob("*.onnx")} == {"scrfd_10g_bnkps.onnx"}  # the one before it, whole


def test_a_folder_that_takes_nothing_is_told(tmp_path):
    zipped = make_zip(tmp_path / "insightface" / "antelopev2.zip")
    (tmp_path / "insightface" / "models").write_text("a file in place of the folder")
    unpack(tmp_path, zipped)
    assert locate.find_antelopev2([tmp_path / "insightface"]) == tmp_path / "insightface" / "antelopev2"  # the next one

    shutil.rmtree(tmp_path / "insightface" / "antelopev2")
    (tmp_path / "insightface" / "antelopev2").touch()
    with pytest.raises(DownloadError, match=r"could not be unpacked.*extra_model_paths\.yaml, under insightface"):
        unpack(tmp_path, zipped)


def test_looking_for_files_writes_nothing(tmp_path, zipped):
    """What ComfyUI's cache, a list of files and the doctor ask; 361 MB were unpacked by it."""
    folders = folders_below(tmp_path)
    before = everything(tmp_path)

    with pytest.raises(MissingWeights):
        locate.find_antelopev2(folders.of(catalogue.SCRFD))
    assert folders.locate(catalogue.ANTELOPEV2_ZIP) and not folders.locate(catalogue.SCRFD)
    doctor.files(folders)
    inventory.table(inventory.inventory(folders, lambda file, done: None))

    assert everything(tmp_path) == before


# ---- Folders of other programs ----


def hub_file(home, repository, name, snapshot="0a1b"):
    return touch(home / ".cache/huggingface/hub" / f"models--{repository}" / "snapshots" / snapshot / name)


def test_other_programs_folders_come_last(tmp_path):
    theirs = hub_file(tmp_path, "guozinan--PuLID", "pulid_v1.1.safetensors")
    elsewhere = locate.other_programs({}, tmp_path)
    ours = tmp_path / "models" / "pulid"

    assert locate.find(catalogue.V1_1, [ours], elsewhere) == theirs
    touch(ours / "pulid_v1.1.safetensors")
    assert locate.find(catalogue.V1_1, [ours], elsewhere) == ours / "pulid_v1.1.safetensors"


def test_only_files_of_the_catalogue_are_looked_for_there_by_their_published_names(tmp_path):
    repository = "timm--eva02_large_patch14_clip_336.merged2b_s6b_b61k"
    tower = hub_file(tmp_path, repository, "open_clip_model.safetensors")
    bisenet = hub_file(tmp_path, "camenduru--PuLID", "facexlib/parsing_bisenet.pth")
    hub_file(tmp_path, "guozinan--PuLID", "README.md")
    elsewhere = locate.other_programs({}, tmp_path)

    assert locate.find(catalogue.EVA_CLIP_TIMM, [], elsewhere) == tower
    assert locate.find(catalogue.BISENET, [], elsewhere) == bisenet
    with pytest.raises(MissingWeights):
        locate.find("README.md", [tmp_path / "models"], elsewhere)


@pytest.mark.parametrize(
    ("variable", "folder"),
    [("HF_HUB_CACHE", "models--a/.."), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")],
)
def test_hugging_faces_variables_lead_to_its_cache(tmp_path, variable, folder):
    place = tmp_path / "moved" if variable == "HF_HUB_CACHE" else tmp_path / "moved" / folder
    theirs = touch(place / "models--guozinan--PuLID" / "snapshots" / "f00" / "pulid_v1.bin")

    elsewhere = locate.other_programs({variable: str(tmp_path / "moved")}, tmp_path / "home")

    assert locate.find(catalogue.V1_PICKLE, [], elsewhere) == theirs


def test_the_version_that_main_names_comes_first(tmp_path):
    for snapshot in ("aaa", "bbb", "ccc"):
        hub_file(tmp_path, "guozinan--PuLID", "pulid_v1.bin", snapshot)
    main = touch(tmp_path / ".cache/huggingface/hub/models--guozinan--PuLID/refs/main")
    main.write_text("bbb")

    found = locate.find(catalogue.V1_PICKLE, [], locate.other_programs({}, tmp_path))

    assert found.parent.name == "bbb"


@pytest.mark.parametrize("place", ["antelopev2", "antelopev2/antelopev2"])
def test_insightfaces_own_folder_serves_and_no_download_goes_there(tmp_path, place):
    theirs = antelopev2(tmp_path / ".insightface" / "models" / place)
    elsewhere = locate.other_programs({}, tmp_path)
    folders = folders_below(tmp_path / "models", elsewhere)

    assert locate.find_antelopev2([tmp_path / "models"], elsewhere) == theirs
    assert folders.locate(catalogue.SCRFD).parent == theirs
    assert folders.destination(catalogue.SCRFD) == tmp_path / "models" / "insightface" / "models" / "antelopev2"


def test_facexlibs_own_folder_serves_without_importing_it(tmp_path, monkeypatch):
    touch(tmp_path / "facexlib" / "__init__.py").write_text("raise OSError('broken')")
    theirs = touch(tmp_path / "facexlib" / "weights" / "parsing_bisenet.pth")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "facexlib", raising=False)

    assert locate.find(catalogue.BISENET, [], locate.other_programs({}, tmp_path)) == theirs


# ---- What lies where, and where a download goes ----


def test_a_models_folder_is_searched_by_the_names_of_comfyui(tmp_path):
    folders = folders_below(tmp_path)
    tower = touch(tmp_path / "clip" / catalogue.EVA_CLIP.name)

    assert folders.locate(catalogue.EVA_CLIP) == tower
    assert folders.locate(catalogue.V1_1) is None
    assert {file.name: str(folders.destination(file).relative_to(tmp_path)) for file in catalogue.CATALOGUE} == {
        file.name: str(Path(file.folders[0])) for file in catalogue.CATALOGUE
    }


def test_a_download_goes_to_the_first_configured_folder(tmp_path):
    folders = ModelFolders({"pulid": [tmp_path / "big disk", tmp_path / "small disk"]})

    assert folders.destination(catalogue.V1_1) == tmp_path / "big disk"
    with pytest.raises(MissingWeights, match="No folder 'pulid' is configured"):
        ModelFolders({}).destination(catalogue.V1_1)


def test_the_missing_half_of_antelopev2_goes_beside_the_other(tmp_path):
    nested = tmp_path / "insightface" / "models" / "antelopev2" / "antelopev2"
    touch(nested / catalogue.SCRFD.name)
    folders = folders_below(tmp_path)

    assert folders.locate(catalogue.GLINTR100) is None
    assert folders.locate(catalogue.SCRFD) == nested / catalogue.SCRFD.name
    assert folders.destination(catalogue.GLINTR100) == nested
