"""The Encode node: what it does with photographs of every kind, and what it says."""

import os

import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)

import comfy_host

comfy_host.enter(os.environ["COMFYUI"])

import folder_paths
import numpy as np
import torch
from pulid_sdxl.nodes.identity import PulidEncode
from pulid_sdxl.pulid.errors import InputError, NoFaceError
from pulid_sdxl.pulid.faces import Face
from pulid_sdxl.pulid.identity import IdEmbedding

LANDMARKS = np.array([[35.0, 40], [65, 40], [50, 58], [38, 75], [62, 75]])


@pytest.fixture(autouse=True)
def previews_go_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))


class OnePixelIsAFace:
    """An analyzer that sees a face at each white pixel: its recogniser gives the place back."""

    def detect(self, photo):
        spots = np.argwhere((photo == 255).all(axis=2))[:, ::-1]
        return [Face((x - 20, y - 20, x + 20.0 + index, y + 20), LANDMARKS - 50 + (x, y), 0.9)
                for index, (x, y) in enumerate(spots)]  # fmt: skip

    def detect_for_alignment(self, photo):
        return []

    def recognise(self, photo, face):
        return torch.tensor([*face.box, *[0.0] * 508])

    def parse(self, crops):
        return torch.ones(len(crops), 512, 512, dtype=torch.uint8)


class Identifies:
    """Stands where the loaded PuLID does; remembers what it was given."""

    analyzer = OnePixelIsAFace()

    def identify(self, faces, arcface, photos, id_mix):
        self.faces, self.arcface, self.photos, self.id_mix = faces, arcface, photos, id_mix
        return IdEmbedding(torch.zeros(1, 10, 2048), torch.zeros(1, 10, 2048), "v1", "print")


def photograph(*spots, height=200, width=300, channels=3):
    image = torch.full((1, height, width, channels), 0.5)
    for x, y in spots:
        image[0, y, x] = 1
    return image


def encode(
    image, pulid=None, face="largest", face_index=0, photos="one person", id_mix=False, no_face="stop", mask=None
):
    pulid = pulid or Identifies()
    return pulid, PulidEncode.execute(pulid, image, face, face_index, photos, id_mix, no_face, mask)


def test_one_photograph_gives_an_identity_and_both_previews():
    _, out = encode(photograph((100, 100)))
    identity, seen, detections = out.args
    assert identity.version == "v1"
    assert seen.shape == (1, 336, 336, 3)
    assert detections.shape == (1, 200, 300, 3)
    assert not torch.equal(detections, photograph((100, 100)))  # the box is drawn
    assert out.ui["text"] == ["1 of 1 photographs used, PuLID v1, 10 ID tokens."]
    assert len(out.ui["images"]) == 1


@pytest.mark.parametrize(
    ("face", "index", "left"), [("left to right", 0, 20), ("left to right", 1, 80), ("right to left", 0, 180)]
)
def test_the_chosen_face_is_the_one_that_is_recognised(face, index, left):
    pulid, _ = encode(photograph((40, 60), (100, 100), (200, 140)), face=face, face_index=index)
    assert pulid.arcface[0, 0] == left


def test_a_mask_chooses_the_face_it_covers():
    mask = torch.zeros(1, 100, 150)
    mask[:, 60:80, 90:110] = 1  # half the photograph's size: around (200, 140)
    pulid, _ = encode(photograph((40, 60), (200, 140)), face="left to right", mask=mask)
    assert pulid.arcface[0, 0] == 180
    with pytest.raises(InputError, match=r"Photograph 1 of 1: The mask touches no face"):
        encode(photograph((40, 60)), mask=mask)


def test_no_face_stops_with_the_photographs_number():
    batch = torch.cat((photograph((100, 100)), photograph()))
    with pytest.raises(NoFaceError, match=r"Photograph 2 of 2: No face found"):
        encode(batch)


def test_no_face_can_be_skipped_and_is_said():
    batch = torch.cat((photograph(), photograph((100, 100)), photograph()))
    pulid, out = encode(batch, no_face="skip photo")
    assert len(pulid.faces) == 1
    assert [line.split(":")[0] for line in out.ui["text"][:2]] == ["Photograph 1 of 3", "Photograph 3 of 3"]
    assert out.ui["text"][2].startswith("1 of 3 photographs used")
    with pytest.raises(NoFaceError, match=r"(?s)No photograph was left.*Photograph 1 of 1"):
        encode(photograph(), no_face="skip photo")


def test_an_index_beyond_the_last_says_how_many_faces_there_are():
    with pytest.raises(InputError, match=r"Photograph 1 of 1: There is no face with index 2: .*2 faces"):
        encode(photograph((40, 60), (200, 140)), face_index=2, no_face="skip photo")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grey_and_transparent_photographs_are_taken(channels):
    pulid, _ = encode(photograph((100, 100), channels=channels))
    assert pulid.faces.shape == (1, 3, 512, 512)


def test_a_photograph_8000_px_wide_is_taken():
    wide = photograph(height=2000, width=8000)
    wide[0, 960:1040, 3960:4040] = 1  # survives shrinking to 1024
    _, out = encode(wide)
    assert out.args[2].shape == (1, 256, 1024, 3)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (photograph(width=15, height=15), "too small"),
        (torch.full((1, 64, 64, 3), float("nan")), "NaN"),
        (torch.zeros(0, 64, 64, 3), "empty"),
        (torch.zeros(1, 64, 64, 2), "channels"),
    ],
)
def test_what_cannot_be_a_photograph_is_refused_in_words(image, words):
    with pytest.raises(InputError, match=words):
        encode(image)


def test_choices_reach_the_encoder():
    pulid, _ = encode(torch.cat([photograph((100, 100))] * 2), photos="average", id_mix=True)
    assert (pulid.photos, pulid.id_mix, len(pulid.arcface)) == ("average", True, 2)
