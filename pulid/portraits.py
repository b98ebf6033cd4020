"""Which photographs of a person make a good identity: marks for each face, and a choice by them.

A mark runs from 0 to 1 and rises with what helps PuLID: a large, sharp, well exposed face that looks into the camera.
The marks are this pack's own; the head's pose is that of scaled orthographic projection (DeMenthon and Davis, 1995).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .cache import ResultCache
from .encode import FaceChoice, Photograph
from .errors import InputError, NoFaceError, about
from .faces import CROP_LANDMARKS, Face, FaceAnalyzer, Heard
from .identity import FaceCrop
from .packages import import_package
from .people import unit

# Where a mark is a half. The crop that the vision tower sees is 336 px, of which a face's box takes about the half; the
# other two were read off real photographs.
HALF_SIDE = 96  # px
HALF_SHARPNESS = 0.2
HALF_SPREAD = 0.25

# Embeddings of one person have about this cosine with the middle of the others at least, of strangers less.
SAME_PERSON = 0.3

FACE_ROWS, FACE_COLUMNS = slice(170, 430), slice(150, 362)  # of an aligned crop: brows to chin, cheek to cheek
BLACK, WHITE = 3 / 255, 252 / 255  # beyond these, a pixel is lost
LUMA = np.array((0.299, 0.587, 0.114), dtype=np.float32)  # ITU-R BT.601

# The five landmarks of a head that looks into the camera, x to the right, y down, z towards the camera, in distances
# between the eyes. From above and the front facexlib's template, made symmetric; depths of nose and mouth from the
# generic head of https://learnopencv.com/head-pose-estimation-using-opencv-and-dlib/
_EYES = (CROP_LANDMARKS[0] + CROP_LANDMARKS[1]) / 2
_FRONT = (CROP_LANDMARKS - _EYES) / (CROP_LANDMARKS[1, 0] - CROP_LANDMARKS[0, 0])
NOSE_DEPTH, MOUTH_DEPTH = 0.43, 0.03
HEAD = np.array(
    [
        [-0.5, 0.0, 0.0],
        [0.5, 0.0, 0.0],
        [0.0, _FRONT[2, 1], NOSE_DEPTH],
        [(_FRONT[3, 0] - _FRONT[4, 0]) / 2, _FRONT[3:, 1].mean(), MOUTH_DEPTH],
        [(_FRONT[4, 0] - _FRONT[3, 0]) / 2, _FRONT[3:, 1].mean(), MOUTH_DEPTH],
    ]
)


def pose(landmarks: np.ndarray) -> tuple[float, float]:
    """How a head is turned: landmarks (5, 2) -> yaw and pitch in degrees.

    Yaw is positive where the face looks to the picture's right, pitch where it looks up; a tilt changes neither.
    """
    points, head = landmarks - landmarks.mean(axis=0), HEAD - HEAD.mean(axis=0)
    projection = np.linalg.lstsq(head, points, rcond=None)[0].T  # (2, 3), a rotation's first rows times a scale
    left, _, right = np.linalg.svd(projection, full_matrices=False)
    rows = left @ right
    x, y, z = np.array([*rows[:, 2], np.cross(*rows)[2]])  # where the head's own z axis points
    return float(np.degrees(np.arctan2(x, z))), float(np.degrees(np.arctan2(-y, np.hypot(x, z))))


def sharpness(luma: np.ndarray) -> float:
    """Fine detail against the contrast that there is, 0 and up: luma (H, W) float. A darker picture is as sharp."""
    cv2 = import_package("cv2")
    small = cv2.resize(luma, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    contrast = small.std()
    return float(cv2.Laplacian(small, cv2.CV_32F).std() / contrast) if contrast > 1 / 255 else 0.0


def exposure(luma: np.ndarray) -> float:
    """The range of tones that a face spans, 0..1, less the share of pixels that are black or white. Skin's own tone
    does not count."""
    low, high = np.quantile(luma, (0.05, 0.95))
    lost = np.mean((luma < BLACK) | (luma > WHITE))
    return float((high - low) * (1 - lost))


def _saturating(value: float, half: float) -> float:
    """0 for 0, a half for `half`, towards 1 for more."""
    return value / (value + half)


@dataclass(frozen=True)
class Marks:
    """What is good and bad about one face.

    side        px of the photograph as it was given, the mean of the box's width and height
    yaw, pitch  degrees, see `pose`
    """

    side: float
    sharpness: float
    yaw: float
    pitch: float
    exposure: float
    detector: float

    @property
    def bars(self) -> dict[str, float]:
        """Each mark 0..1 by its name."""
        turned = np.cos(np.radians(self.yaw)) * np.cos(np.radians(self.pitch))
        return {
            "size": _saturating(self.side, HALF_SIDE),
            "sharp": _saturating(self.sharpness, HALF_SHARPNESS),
            "frontal": max(0.0, float(turned)),
            "exposure": _saturating(self.exposure, HALF_SPREAD),
            "detector": min(1.0, max(0.0, self.detector)),
        }


def marks_of(crop: FaceCrop, shrunk: float) -> Marks:
    """The marks of a chosen face; `shrunk` is the photograph's own width over that of the one that was looked at."""
    x0, y0, x1, y1 = crop.box
    luma = np.ascontiguousarray((crop.pixels.permute(1, 2, 0).numpy() @ LUMA)[FACE_ROWS, FACE_COLUMNS])
    yaw, pitch = pose(crop.landmarks.numpy())
    side = shrunk * (x1 - x0 + y1 - y0) / 2
    return Marks(side, sharpness(luma), yaw, pitch, exposure(luma), crop.score)


@dataclass(frozen=True, eq=False)
class Portrait:
    """A photograph's chosen face, with its embedding (512,)."""

    face: Face
    marks: Marks
    arcface: Tensor


def look_at(photograph: Photograph, analyzer: FaceAnalyzer, choice: FaceChoice, cache: ResultCache) -> Portrait | str:
    """The chosen face of a photograph, or why there is none; what the cache has is not looked at again."""
    key = "portrait", analyzer.source, choice, photograph.key
    if (known := cache.get(key)) is None:
        try:
            selection, crop = choice.find(photograph, analyzer)
        except NoFaceError:
            known = "no face"
        else:
            height, width = photograph.pixels.shape[:2]
            shrunk = max(1.0, max(height, width) / 1024)
            known = Portrait(selection.faces[selection.index], marks_of(crop, shrunk), crop.arcface)
        cache.put(key, known, [known.arcface] if isinstance(known, Portrait) else [])
    return known


def others(embeddings: Tensor, drop: bool) -> tuple[list[float], list[int]]:
    """How alike each face (F, 512) is to the middle of the others, and the indices of strangers.

    While the face farthest from the middle of the others is less alike than SAME_PERSON, it is a stranger, and the rest
    are looked at without it. Two faces that differ do not say which of them is the stranger. With `drop` false, nobody
    is one. A cosine is that with the middle of those who are no strangers.
    """
    if len(embeddings) == 1:
        return [1.0], []
    directions = unit(embeddings.double())  # a sum less one of its parts must be that of the others
    kept = torch.ones(len(embeddings), 1, dtype=torch.bool)

    def cosines() -> Tensor:
        rest = (directions * kept).sum(0) - directions * kept  # (F, 512)
        return functional.cosine_similarity(directions, rest)

    while drop and kept.sum() > 2:
        least, farthest = cosines().masked_fill(~kept[:, 0], math.inf).min(0)
        if least >= SAME_PERSON:
            break
        kept[farthest] = False
    return cosines().tolist(), (~kept[:, 0]).nonzero()[:, 0].tolist()


@dataclass(frozen=True)
class Choice:
    """Which photographs are taken, by their number from 0.

    best      in order; further are those that come after them
    scores    0..1 of each photograph with a face: the geometric mean of its marks and its likeness to the others
    likeness  of each photograph with a face, see `others`
    left_out  why, for each of the rest
    """

    best: list[int]
    further: list[int]
    scores: dict[int, float]
    likeness: dict[int, float]
    left_out: dict[int, str]


def choose(looks: Sequence[Portrait | str], count: int, drop_strangers: bool) -> Choice:
    """The best `count` photographs, or as many as there are. Raises NoFaceError where none shows a face."""
    portraits = {number: look for number, look in enumerate(looks) if isinstance(look, Portrait)}
    left_out = {number: look for number, look in enumerate(looks) if isinstance(look, str)}
    if not portraits:
        raise NoFaceError(f"None of the {len(looks)} photographs shows a face. Use some where it is in view.")
    numbers = list(portraits)
    cosines, strangers = others(torch.stack([portraits[number].arcface for number in numbers]), drop_strangers)
    likeness = dict(zip(numbers, cosines, strict=True))
    scores = {}
    for number, portrait in portraits.items():
        bars = [*portrait.marks.bars.values(), max(likeness[number], 0.0)]
        scores[number] = float(np.prod(bars) ** (1 / len(bars)))
    left_out |= {numbers[index]: f"someone else? likeness {cosines[index]:.2f}" for index in strangers}
    ranked = sorted((number for number in numbers if number not in left_out), key=lambda number: -scores[number])
    return Choice(ranked[:count], ranked[count:], scores, likeness, left_out)


Step = Callable[[int], None]


def look_at_all(
    photographs: Sequence[Photograph],
    analyzer: FaceAnalyzer,
    choice: FaceChoice,
    cache: ResultCache,
    step: Step = lambda done: None,
) -> list[Portrait | str]:
    """`look_at` for each. Raises InputError with the photograph's number for one that cannot be used."""
    if not photographs:
        raise InputError("There is no photograph to choose from. Connect at least one.")
    looks = []
    for number, photograph in enumerate(photographs):
        step(number)
        heard = cast(FaceAnalyzer, Heard(analyzer, partial(step, number)))
        with about(f"Photograph {number + 1} of {len(photographs)}"):
            looks.append(look_at(photograph, heard, choice, cache))
    step(len(photographs))
    return looks
