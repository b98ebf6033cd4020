"""Which photographs are taken: marks that fall as a face gets worse, and strangers that drop out."""

from dataclasses import replace
from itertools import pairwise
from time import process_time

import cv2
import numpy as np
import pytest
import torch
from pulid_sdxl.pulid.cache import ResultCache
from pulid_sdxl.pulid.encode import FaceChoice, photographs
from pulid_sdxl.pulid.errors import InputError, NoFaceError
from pulid_sdxl.pulid.faces import Face
from pulid_sdxl.pulid.identity import FaceCrop
from pulid_sdxl.pulid.portraits import (
    HEAD,
    Marks,
    Portrait,
    choose,
    exposure,
    look_at_all,
    marks_of,
    others,
    pose,
    sharpness,
)
from pulid_sdxl.tools.fakes.networks import LANDMARKS, SpotAnalyzer


def turned(yaw, pitch, roll=0.0, scale=80.0, shift=(300.0, 200.0)):
    """The landmarks of a head that looks `yaw` degrees to the picture's right and `pitch` up, seen from far away."""
    a, b, c = np.radians((yaw, pitch, roll))
    about_y = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return (HEAD @ (about_z @ about_y @ about_x).T)[:, :2] * scale + shift


@pytest.mark.parametrize("roll", [0.0, 25.0, -90.0])
@pytest.mark.parametrize(("yaw", "pitch"), [(0, 0), (40, 0), (-40, 0), (0, 25), (0, -25), (30, -15), (-55, 20)])
def test_a_head_that_is_turned_by_known_angles_is_measured_so(yaw, pitch, roll):
    x, y, z = (
        np.sin(np.radians(yaw)) * np.cos(np.radians(pitch)),
        -np.sin(np.radians(pitch)),
        np.cos(np.radians(yaw)) * np.cos(np.radians(pitch)),
    )
    c, s = np.cos(np.radians(roll)), np.sin(np.radians(roll))
    looks_at = np.array([c * x - s * y, s * x + c * y, z])
    measured = np.radians(pose(turned(yaw, pitch, roll)))
    found = np.sin(measured[0]) * np.cos(measured[1]), -np.sin(measured[1]), np.cos(measured[0]) * np.cos(measured[1])
    assert np.allclose(found, looks_at, atol=1e-6)


PATTERN = cv2.GaussianBlur(np.random.default_rng(3).random((512, 512, 3), np.float32), (0, 0), 1.5)
PATTERN = (PATTERN - PATTERN.min()) / np.ptp(PATTERN) * 0.8 + 0.1


def crop_of(pixels=PATTERN, landmarks=None, box=(0.0, 0.0, 120.0, 160.0), score=0.9):
    landmarks = turned(0, 0) if landmarks is None else landmarks
    return FaceCrop(torch.from_numpy(pixels).permute(2, 0, 1), torch.ones(512), box, torch.from_numpy(landmarks), score)


def falls(values):
    return all(later < earlier - 1e-6 for earlier, later in pairwise(values))


def bars(name, crops, shrunk=1.0):
    return [marks_of(crop, shrunk).bars[name] for crop in crops]


def test_a_face_that_is_blurred_by_steps_is_less_and_less_sharp():
    blurred = [cv2.GaussianBlur(PATTERN, (0, 0), sigma) for sigma in (0.6, 1, 2, 3, 5, 8)]
    assert falls(bars("sharp", map(crop_of, [PATTERN, *blurred])))


def test_a_face_that_is_darkened_or_washed_out_by_steps_is_less_and_less_well_exposed():
    assert falls(bars("exposure", [crop_of(PATTERN * factor) for factor in (1, 0.8, 0.5, 0.25, 0.1, 0.02)]))
    assert falls(bars("exposure", [crop_of((PATTERN + more).clip(0, 1)) for more in (0.3, 0.5, 0.7)]))


def test_a_darker_face_of_the_same_contrast_is_as_sharp_and_as_well_exposed():
    luma = PATTERN[..., 0] * 0.4
    assert sharpness(luma) == pytest.approx(sharpness(luma + 0.4), rel=1e-3)
    assert exposure(luma) == pytest.approx(exposure(luma + 0.4), rel=1e-3)


def test_a_flat_face_has_no_detail_and_no_range():
    flat = np.full((100, 100), 0.5, np.float32)
    assert (sharpness(flat), exposure(flat)) == (0, 0)


@pytest.mark.parametrize("axis", ["yaw", "pitch"])
def test_a_face_that_is_turned_by_steps_is_less_and_less_frontal(axis):
    for sign in (1, -1):
        poses = [turned(**{"yaw": 0, "pitch": 0, axis: sign * angle}) for angle in range(0, 80, 10)]
        assert falls(bars("frontal", [crop_of(landmarks=landmarks) for landmarks in poses]))


def test_a_smaller_face_has_a_lower_mark_and_pixels_count_as_the_photograph_has_them():
    assert falls(bars("size", [crop_of(box=(0.0, 0.0, side, side)) for side in (400.0, 200.0, 90.0, 30.0)]))
    assert marks_of(crop_of(), 2.5).side == 2.5 * 140


# ---- Strangers ----


def at(*degrees):
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))
    return torch.stack([angles.cos(), angles.sin(), *[torch.zeros(len(degrees))] * 510], dim=1) * 20


def test_a_stranger_among_ten_drops_out_wherever_they_stand():
    for place in range(10):
        angles = [3.0 * step for step in range(10)]
        angles[place] = 115.0
        likeness, dropped = others(at(*angles), drop=True)
        assert dropped == [place]
        assert likeness[place] < 0.3 < min(value for index, value in enumerate(likeness) if index != place)


def test_several_strangers_drop_out_and_likeness_is_to_those_who_stay():
    likeness, dropped = others(at(0, 10, 100, 20, 250, 5), drop=True)
    assert dropped == [2, 4]
    middle = torch.nn.functional.normalize(at(0, 10, 20, 5), dim=1).mean(0)
    assert likeness[2] == pytest.approx(torch.cosine_similarity(at(100)[0], middle, dim=0).item())
    start = process_time()
    assert len(others(torch.randn(300, 512), drop=True)[1]) == 298 and process_time() - start < 4


def test_nobody_is_a_stranger_of_two_or_where_strangers_stay():
    assert others(at(0, 120), drop=True)[1] == []
    assert others(at(0, 5, 10, 120), drop=False)[1] == []
    assert others(at(70), drop=True) == ([1.0], [])


# ---- The choice ----

GOOD = Marks(200, 0.4, 0, 0, 0.5, 0.9)


def portrait(angle=0.0, **marks):
    return Portrait(Face((0.0, 0.0, 9.0, 9.0), LANDMARKS, 0.9), replace(GOOD, **marks), at(angle)[0])


def test_the_best_are_taken_in_order_and_the_rest_is_told_why():
    looks = [portrait(side=60), "no face", portrait(), portrait(yaw=50), portrait(130), portrait(side=150)]
    choice = choose(looks, 3, drop_strangers=True)
    assert (choice.best, choice.further) == ([2, 5, 3], [0])
    assert choice.left_out == {1: "no face", 4: f"someone else? likeness {choice.likeness[4]:.2f}"}
    assert falls([choice.scores[number] for number in (2, 5, 3, 0)])


def test_of_fewer_than_are_asked_for_all_are_taken():
    choice = choose([portrait(), "no face", portrait(5)], 10, drop_strangers=True)
    assert (sorted(choice.best), choice.left_out) == ([0, 2], {1: "no face"})


def test_without_a_face_anywhere_it_stops():
    with pytest.raises(NoFaceError, match="None of the 2 photographs shows a face"):
        choose(["no face", "no face"], 1, drop_strangers=False)


# ---- Looking ----


def photograph(*spots, height=200, width=300):
    image = torch.full((height, width, 3), 0.5)
    for x, y in spots:
        image[y, x] = 1
    return image


def test_photographs_of_any_size_are_looked_at_once_and_one_without_a_face_is_said():
    analyzer, cache, steps = SpotAnalyzer(), ResultCache(2**20), []
    taken = photographs([photograph((100, 100)), photograph(height=120), photograph((60, 60), width=111)])
    looks = look_at_all(taken, analyzer, FaceChoice(), cache, steps.append)
    assert [look if isinstance(look, str) else look.marks.side for look in looks] == [40, "no face", 40]
    assert sorted(set(steps)) == [0, 1, 2, 3] and len(steps) > 20  # and before every look
    before = analyzer.looks
    assert look_at_all(taken, analyzer, FaceChoice(), cache)[0] is looks[0] and analyzer.looks == before


@pytest.mark.parametrize(("images", "words"), [
    ([], "no photograph to choose from"),
    ([photograph((9, 9)), torch.zeros(4, 4, 3)], "Photograph 2 of 2: .*too small"),
])  # fmt: skip
def test_what_cannot_be_looked_at_is_refused_in_words(images, words):
    with pytest.raises(InputError, match=words):
        look_at_all(photographs(images), SpotAnalyzer(), FaceChoice(), ResultCache(2**20))
