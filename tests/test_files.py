"""Finding weight files in given folders, and what is said about the ones that are not there."""

import re
from pathlib import PurePosixPath

import pytest
from pulid_sdxl.models import catalogue, files
from pulid_sdxl.pulid.errors import InputError, MissingWeights


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


# ---- The catalogue ----


def test_every_file_has_one_name_one_place_and_one_https_address():
    assert len(catalogue.BY_NAME) == len(catalogue.CATALOGUE)
    for file in catalogue.CATALOGUE:
        assert file.folders and not any(PurePosixPath(folder).is_absolute() for folder in file.folders)
        assert file.url.startswith("https://") and f"/{file.revision}/" in file.url and "{" not in file.url
        assert file.licence and file.needed_for


def test_hashes_look_like_sha256():
    hashes = [file.sha256 for file in catalogue.CATALOGUE if file.sha256]

    assert len(hashes) == len(set(hashes)) == 10
    assert all(re.fullmatch(r"[0-9a-f]{64}", text) for text in hashes)


# ---- find ----


def test_the_first_folder_that_holds_the_file_decides(tmp_path):
    touch(tmp_path / "b" / "pulid_v1.1.safetensors")
    touch(tmp_path / "c" / "pulid_v1.1.safetensors")

    found = files.find(catalogue.V1_1, [tmp_path / "a", tmp_path / "b", tmp_path / "c"])

    assert found == tmp_path / "b" / "pulid_v1.1.safetensors"


@pytest.mark.parametrize("name", ["old/mine.bin", "old\\mine.bin"])
def test_a_name_may_lie_below_the_folder_with_either_slash(tmp_path, name):
    path = touch(tmp_path / "old" / "mine.bin")

    assert files.find(name, [str(tmp_path)]) == path


@pytest.mark.parametrize(
    "name", ["../secret.bin", "a\\..\\..\\secret.bin", "/etc/passwd", "C:\\secret.bin", "C:secret"]
)
def test_a_name_cannot_lead_out_of_the_folders(tmp_path, name):
    touch(tmp_path / "secret.bin")

    with pytest.raises(InputError, match="inside the model folders"):
        files.find(name, [tmp_path / "pulid"])


def test_a_folder_of_that_name_is_not_the_file(tmp_path):
    (tmp_path / catalogue.V1_1.name).mkdir()

    with pytest.raises(MissingWeights):
        files.find(catalogue.V1_1, [tmp_path])


@pytest.mark.parametrize("asked", [catalogue.EVA_CLIP, catalogue.EVA_CLIP.name])
def test_a_missing_file_is_told_with_everything_needed_to_get_it(tmp_path, asked):
    with pytest.raises(MissingWeights) as caught:
        files.find(asked, [tmp_path / "clip_vision", tmp_path / "clip"])

    message = str(caught.value)
    assert "EVA02_CLIP_L_336_psz14_s6B.pt (the vision tower that looks at the face) was not found" in message
    assert f"Looked in: {tmp_path / 'clip_vision'}, {tmp_path / 'clip'}." in message
    assert (
        f"from {catalogue.EVA_CLIP.url} and put it at {tmp_path / 'clip_vision' / catalogue.EVA_CLIP.name}" in message
    )
    assert "Licence: MIT" in message


def test_without_folders_the_message_names_the_usual_place():
    with pytest.raises(MissingWeights, match=r"no folder.*models.pulid.pulid_v1.1.safetensors"):
        files.find(catalogue.V1_1, [])


def test_a_file_nobody_published_has_no_address(tmp_path):
    with pytest.raises(MissingWeights) as caught:
        files.find("mine.safetensors", [tmp_path])

    assert str(caught.value) == (
        f"mine.safetensors was not found. Looked in: {tmp_path}. Put it in {tmp_path}, or choose another file."
    )


# ---- antelopev2 ----


@pytest.mark.parametrize(
    "place",
    ["models/antelopev2", "antelopev2", "models/antelopev2/antelopev2", "antelopev2/antelopev2"],
)
def test_antelopev2_is_found_flat_and_nested(tmp_path, place):
    for file in (catalogue.SCRFD, catalogue.GLINTR100):
        touch(tmp_path / "insightface" / place / file.name)

    found = files.find_antelopev2([tmp_path / "none", tmp_path / "insightface"])

    assert found == tmp_path / "insightface" / place


def test_half_of_antelopev2_does_not_hide_a_whole_one(tmp_path):
    touch(tmp_path / "models" / "antelopev2" / catalogue.SCRFD.name)
    for file in (catalogue.SCRFD, catalogue.GLINTR100):
        touch(tmp_path / "models" / "antelopev2" / "antelopev2" / file.name)

    assert files.find_antelopev2([tmp_path]) == tmp_path / "models" / "antelopev2" / "antelopev2"


def test_missing_antelopev2_is_told_with_places_address_and_licence(tmp_path):
    touch(tmp_path / "models" / "antelopev2" / catalogue.SCRFD.name)

    with pytest.raises(MissingWeights) as caught:
        files.find_antelopev2([tmp_path])

    message = str(caught.value)
    assert "scrfd_10g_bnkps.onnx and glintr100.onnx" in message
    assert all(str(tmp_path / place) in message for place in files.ANTELOPEV2_PLACES)
    assert catalogue.ANTELOPEV2_ZIP.url in message
    assert f"lie in {tmp_path / 'models' / 'antelopev2'}" in message
    assert "non-commercial research only" in message
