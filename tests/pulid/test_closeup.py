"""A crop that is not changed gives the picture back; one that is, changes nothing outside it."""

import pytest
import torch
from pulid_sdxl.pulid.closeup import Place, cut, fade, mask_of, paste, place_of
from pulid_sdxl.pulid.errors import InputError

SIZE = (300, 200)  # width, height
FACES = {
    "inside": (100.0, 60.0, 140.0, 110.0),
    "upper left": (-8.0, -5.0, 30.0, 40.0),
    "lower right": (270.0, 165.0, 310.0, 212.0),
    "as large as the picture": (20.0, -20.0, 250.0, 230.0),
    "tiny": (150.0, 100.0, 153.0, 104.0),
}


def picture(channels=3, size=SIZE):
    """The hardest there is: noise, each pixel on its own."""
    return torch.rand(size[1], size[0], channels, generator=torch.Generator().manual_seed(4))


@pytest.fixture(params=FACES)
def face(request):
    return FACES[request.param]


@pytest.mark.parametrize("side", [64, 200, 512])
@pytest.mark.parametrize("context", [1.0, 2.0, 5.0])
def test_an_unchanged_crop_gives_the_picture_back(face, side, context):
    for channels in (3, 4):
        before = picture(channels)
        place = place_of(face, SIZE, context)
        crop = cut(before, place, side)
        assert crop.shape == (side, side, 3) and crop.min() >= 0 and crop.max() <= 1
        assert (paste(before, crop, place, 0.15) - before).abs().max() < 1e-6
        eight_bits = (crop * 255).round() / 255  # as a file has it
        after = paste(before, eight_bits, place, 0.15)
        assert (after - before).abs().max() <= 1 / 255


def test_outside_the_square_a_changed_crop_changes_no_bit_and_inside_it_arrives(face):
    before, place = picture(), place_of(face, SIZE, 2.0)
    after = paste(before, torch.zeros(128, 128, 3), place, 0.1)
    x0, y0, x1, y1 = place.square
    changed = (after != before).any(dim=-1)
    outside = torch.ones_like(changed)
    outside[y0:y1, x0:x1] = False
    assert not changed[outside].any() and changed[y0:y1, x0:x1].any()
    assert torch.equal(before, picture())


def test_a_flat_change_arrives_as_it_is_and_fades_towards_the_edges():
    before, place = torch.full((200, 300, 3), 0.25), Place((100, 50, 180, 130), SIZE)
    after = paste(before, torch.full((320, 320, 3), 0.75), place, 0.25)[..., 0]
    assert (after[70:110, 120:160] - 0.75).abs().max() < 1e-6
    edge = after[90, 100:120]
    assert 0.25 < edge[0] < 0.26 and edge.diff().min() > 0


def test_the_square_stays_within_the_frame(face):
    for context in (1.0, 2.0, 6.0):
        x0, y0, x1, y1 = place_of(face, SIZE, context).square
        assert 0 <= x0 < x1 <= 300 and 0 <= y0 < y1 <= 200 and x1 - x0 == y1 - y0


def test_where_it_fits_the_face_is_in_the_middle():
    assert place_of((100.0, 60.0, 140.0, 110.0), SIZE, 2.0).square == (70, 35, 170, 135)


def test_at_the_frame_nothing_fades():
    fading = fade(Place((0, 20, 100, 120), SIZE), 0.2)
    assert fading[50, 0] == 1 and fading[50, -1] < 0.01 and fading[0, 0] < 0.01
    assert torch.equal(fade(Place((0, 20, 100, 120), SIZE), 0.0), torch.ones(100, 100))


def test_the_mask_is_whole_on_the_face_and_nothing_at_the_corners():
    face = FACES["inside"]
    mask = mask_of(face, place_of(face, SIZE, 3.0), 256)
    assert mask.shape == (256, 256) and mask[128, 128] == 1 and mask[[0, 0, -1, -1], [0, -1, 0, -1]].max() == 0


def test_several_faces_go_in_one_after_the_other_and_keep_what_was_done():
    before = picture()
    for face, value in ((FACES["inside"], 0.0), (FACES["lower right"], 1.0)):
        place = place_of(face, SIZE, 1.0)
        before = paste(before, torch.full((64, 64, 3), value), place, 0.2)
    assert before[85, 120].mean() < 0.4 and before[180, 285].mean() > 0.6


@pytest.mark.parametrize(("crop", "size", "words"), [
    (torch.zeros(64, 64, 3), (301, 200), "300 x 200 px, and is to be put back into one of 301 x 200 px"),
    (torch.zeros(64, 65, 3), SIZE, "square RGB"), (torch.zeros(64, 64, 1), SIZE, "square RGB"),
    (torch.full((64, 64, 3), float("nan")), SIZE, "without NaN"),
])  # fmt: skip
def test_what_does_not_belong_together_is_refused(crop, size, words):
    with pytest.raises(InputError, match=words):
        paste(picture(size=size), crop, Place((0, 0, 50, 50), SIZE), 0.1)
