"""Finds the faces of a photograph, chooses one, and aligns it: its box, its crop and its embedding are of one face.

Source: the PuLID authors' pipeline, https://github.com/ToTheBeginning/PuLID/blob/main/pulid/pipeline_v1_1.py, and
facexlib's alignment, https://github.com/xinntao/facexlib
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .errors import InputError, NoFaceError
from .identity import FaceCrop
from .packages import import_package
from .photo import Photo, Size, washed_out

# Sides of the square that a photograph is fitted into for InsightFace's detector, px, in the order they are tried: the
# authors' 640 first, then smaller for close-ups, which the detector finds too large, then larger for small faces.
DETECTOR_SIZES = (*range(640, 255, -64), *range(768, 1281, 128))
CLOSE_UP_SIZES = tuple(range(640, 255, -128))
TURNED_SIZES = (640, 320, 1280)
OLDER_SIZES = range(640, 256, -64)  # those of the pack that older shared workflows use

# Boxes that overlap more than this are one face: both detectors draw the line here among their own boxes.
SAME_FACE_IOU = 0.4

CROP_SIZE = 512  # px
# Where the five landmarks of an aligned face lie in the crop (x, y): facexlib's FFHQ template.
CROP_LANDMARKS = np.array(
    [
        [192.98138, 239.94708],
        [318.90277, 240.1936],
        [256.63416, 314.01935],
        [201.26117, 371.41043],
        [313.08905, 371.15118],
    ]
)
CROP_BORDER = (132, 133, 135)  # RGB of what lies outside the photograph: facexlib's (135, 133, 132), which is BGR


@dataclass(frozen=True, eq=False)
class Face:
    """One face as a detector reports it.

    box        x0, y0, x1, y1 in pixels of the photograph; it may reach beyond the frame
    landmarks  (5, 2) float64 x, y: left eye, right eye, nose, left and right corner of the mouth, as pictured
    score      the detector's confidence, 0..1
    """

    box: tuple[float, float, float, float]
    landmarks: np.ndarray
    score: float

    @property
    def center(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    def on(self, to: Photo, of: Photo) -> "Face":
        """The same face, found in the photograph `of`, where it lies in `to`, which is that at another size."""
        (x0, y0), (x1, y1) = scaled(np.reshape(self.box, (2, 2)), to, of).tolist()
        return Face((x0, y0, x1, y1), scaled(self.landmarks, to, of), self.score)

    @property
    def area(self) -> float:
        x0, y0, x1, y1 = self.box
        return max(x1 - x0, 0.0) * max(y1 - y0, 0.0)


class FaceAnalyzer(Protocol):
    """The networks a face goes through. Photographs and crops go in as RGB; results come back on the CPU."""

    @property
    def source(self) -> Hashable:
        """Equal for analyzers that give equal results: their files, and what runs them."""

    def detect(self, photo: Photo, side: int) -> list[Face]:
        """InsightFace's faces in a photograph fitted into a square of `side` px; empty when it sees none."""

    def detect_for_alignment(self, photo: Photo) -> list[Face]:
        """RetinaFace's faces, whose landmarks the authors align with; empty when it sees none."""

    def recognise(self, photo: Photo, face: Face) -> Tensor:
        """ArcFace embedding (512,) float32, not normalised, of a face that `detect` found."""

    def recognise_crop(self, crop: np.ndarray) -> Tensor:
        """ArcFace embedding (512,) float32, not normalised, of an aligned crop (512, 512, 3) uint8."""

    def parse(self, crops: Tensor) -> Tensor:
        """BiSeNet's label map (B, 512, 512) uint8 of aligned crops (B, 3, 512, 512) RGB 0..1."""


@dataclass(frozen=True)
class View:
    """One way to hold a photograph before the detector."""

    words: str  # what is said of it to the user
    margin: float  # added on each side, as a share of the photograph's width and height
    quarters: int  # quarter turns, counterclockwise
    sides: tuple[int, ...]  # px, to try in this order

    def of(self, photo: Photo) -> Photo:
        """The photograph held this way; the photograph itself where nothing is to be done."""
        across, down = self._border(photo)
        if across or down:
            around = ((down, down), (across, across))
            photo = np.stack([np.pad(photo[..., c], around, constant_values=CROP_BORDER[c]) for c in range(3)], axis=-1)
        return np.ascontiguousarray(np.rot90(photo, self.quarters))

    def back(self, face: Face, photo: Photo) -> Face:
        """A face found in `of(photo)`, in the photograph's own pixels."""
        corners = self._back(np.reshape(face.box, (2, 2)), photo)
        (x0, y0), (x1, y1) = corners.min(axis=0), corners.max(axis=0)
        return Face((float(x0), float(y0), float(x1), float(y1)), self._back(face.landmarks, photo), face.score)

    def _border(self, photo: Photo) -> Size:
        return int(self.margin * photo.shape[1]), int(self.margin * photo.shape[0])

    def _back(self, points: np.ndarray, photo: Photo) -> np.ndarray:
        across, down = self._border(photo)
        right, bottom = photo.shape[1] + 2 * across - 1, photo.shape[0] + 2 * down - 1
        x, y = points.T
        x, y = ((x, y), (right - y, x), (right - x, bottom - y), (y, bottom - x))[self.quarters]
        return np.stack((x - across, y - down), axis=1)


# In the order they are tried. A close-up that fills the frame is found with some room around it, a picture that a
# phone laid on its side once it is turned.
VIEWS = (
    View("", 0.0, 0, DETECTOR_SIZES),
    View("with a margin of half its size", 0.5, 0, CLOSE_UP_SIZES),
    View("turned 90 degrees", 0.0, 3, TURNED_SIZES),
    View("turned 180 degrees", 0.0, 2, TURNED_SIZES),
    View("turned 270 degrees", 0.0, 1, TURNED_SIZES),
)


class Heard:
    """An analyzer that lets the user interrupt before each look at a photograph: on a CPU one may take a second."""

    def __init__(self, analyzer: FaceAnalyzer, step: Callable[[], None]):
        self._analyzer, self._step = analyzer, step

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._analyzer, name)
        if not callable(found):
            return found

        def look(*args: Any) -> Any:
            self._step()
            return found(*args)

        return look


@dataclass(frozen=True, eq=False)
class FoundFaces:
    """All faces of a photograph, in its own pixels."""

    detected: list[Face]  # InsightFace's; empty when it sees none
    for_alignment: list[Face]  # RetinaFace's
    how: str  # what found them, for the user

    @property
    def faces(self) -> list[Face]:
        """Those to choose from."""
        return self.detected or self.for_alignment

    def embedding(self, face: Face, photo: Photo, analyzer: FaceAnalyzer) -> Tensor:
        """ArcFace embedding (512,) of one of `faces`; one that InsightFace did not see is recognised by its crop."""
        if self.detected:
            return analyzer.recognise(photo, face)
        return analyzer.recognise_crop(align(photo, face.landmarks))


def find_faces(photo: Photo, analyzer: FaceAnalyzer) -> FoundFaces:
    """Looks at the photograph in each of VIEWS until InsightFace sees a face; turns it only if RetinaFace sees none."""
    upright = analyzer.detect_for_alignment(photo)
    for view in VIEWS:
        if view.quarters and upright:
            break
        held = view.of(photo)
        for side in view.sides:
            if detected := analyzer.detect(held, side):
                for_alignment = upright
                if view.quarters:
                    for_alignment = [view.back(face, photo) for face in analyzer.detect_for_alignment(held)]
                how = f"InsightFace at {side} px"
                how = f"{how}, photograph {view.words}" if view.words else how
                return FoundFaces([view.back(face, photo) for face in detected], for_alignment, how)
    return FoundFaces([], upright, "RetinaFace alone" if upright else "nothing")


@dataclass(frozen=True, eq=False)
class Selection:
    """All faces of a photograph in the order that an index counts in, and the index of the chosen one."""

    faces: list[Face]
    index: int
    how: str  # what found them, for the user
    cut_from: Size | None = None  # of the photograph that the chosen face was cut out of, for the user


def find_face(
    photo: Photo,
    analyzer: FaceAnalyzer,
    order: str = "largest",
    index: int = 0,
    mask: Tensor | None = None,
    larger: Callable[[float], Photo] | None = None,
) -> tuple[Selection, FaceCrop]:
    """All faces of a photograph, and the chosen one of them, aligned and recognised.

    InsightFace's faces are chosen from; where it sees none, RetinaFace's are, and the recogniser looks at the crop.
    mask    (H, W) 0..1 of any size, spread over the photograph: only faces it touches count, the best covered first
    larger  the same photograph with at most so many px at its long edge; the face is then cut out of that, as large as
            the crop can use
    Raises NoFaceError if neither sees a face, InputError if there is no face with that index or under the mask.
    """
    found = find_faces(photo, analyzer)
    size = photo.shape[1], photo.shape[0]
    if not found.faces and (words := washed_out(photo)):
        why = "A 16-bit grey picture, or one that is transparent, is read as white: save it with 8 bits a channel. "
        why = why if photo.mean() > 255 / 2 else ""
        raise NoFaceError(f"No face: the photograph is {words}. {why}Look at the node that made it.")
    faces = in_order(found.faces, order, size)
    if mask is not None:
        faces = under_mask(faces, mask, size)
    face, how = pick(faces, index), found.how
    if mask is not None and (doubt := mask_doubt(face, mask, size)):
        how = f"{how}. {doubt}"
    twin = same_face(face, found.for_alignment) if found.detected else None
    landmarks = (twin or face).landmarks
    source, there, points = photo, face, landmarks
    if larger is not None:
        stretch = float(np.hypot(*alignment(landmarks)[0, :2]))  # crop pixels for one of the photograph
        source = larger(max(size) * max(stretch, 1.0))
        there, points = face.on(source, photo), scaled(landmarks, source, photo)
    crop = align(source, points)
    arcface = found.embedding(there, source, analyzer)
    cut_from = source.shape[1], source.shape[0]
    return Selection(faces, index, how, cut_from), _face_crop(crop, arcface, face, landmarks)


def scaled(points: np.ndarray, to: Photo, of: Photo) -> np.ndarray:
    """Points (n, 2) of a photograph where they lie in the same at another size."""
    factor = np.array((to.shape[1] / of.shape[1], to.shape[0] / of.shape[0]))
    return (points + 0.5) * factor - 0.5  # pixels are counted by their corners, points lie at their middles


def find_largest_and_central(photo: Photo, analyzer: FaceAnalyzer) -> tuple[Selection, FaceCrop]:
    """The largest face recognised, the most central one aligned: what the pack of older shared workflows does.

    Raises NoFaceError if one of the two detectors sees none.
    """
    size = photo.shape[1], photo.shape[0]
    side, detected = next(((side, found) for side in OLDER_SIZES if (found := analyzer.detect(photo, side))), (0, []))
    if not detected:
        raise NoFaceError(f"InsightFace saw no face at {OLDER_SIZES[0]} to {OLDER_SIZES[-1]} px.")
    central = in_order(analyzer.detect_for_alignment(photo), "center", size)
    if not central:
        raise NoFaceError("RetinaFace saw no face to align.")
    faces = in_order(detected, "largest", size)
    landmarks = central[0].landmarks
    crop = align(photo, landmarks)
    arcface = analyzer.recognise(photo, faces[0])
    return Selection(faces, 0, f"InsightFace at {side} px"), _face_crop(crop, arcface, faces[0], landmarks)


def _face_crop(crop: np.ndarray, arcface: Tensor, face: Face, landmarks: np.ndarray) -> FaceCrop:
    pixels = torch.from_numpy(crop).permute(2, 0, 1).contiguous() / 255  # (512, 512, 3) -> (3, 512, 512)
    return FaceCrop(pixels, arcface, face.box, torch.from_numpy(landmarks), face.score)


def faces_of(boxes: Iterable, landmarks: Iterable, scores: Iterable) -> list[Face]:
    """Detector rows as faces: boxes (n, 4), landmarks (n, 5, 2), scores (n,). Rows with NaN or no area are dropped."""
    faces = (
        Face((float(x0), float(y0), float(x1), float(y1)), np.array(points, dtype=np.float64), float(score))
        for (x0, y0, x1, y1), points, score in zip(boxes, landmarks, scores, strict=True)
    )
    return [
        face for face in faces if face.area > 0 and np.isfinite([*face.box, *face.landmarks.flat, face.score]).all()
    ]


# What each order sorts by, smallest first.
ORDERS: dict[str, Callable[[Face, Size], float]] = {
    "largest": lambda face, size: -face.area,
    "center": lambda face, size: (face.center[0] - size[0] / 2) ** 2 + (face.center[1] - size[1] / 2) ** 2,
    "left to right": lambda face, size: face.center[0],
    "right to left": lambda face, size: -face.center[0],
    "top to bottom": lambda face, size: face.center[1],
    "bottom to top": lambda face, size: -face.center[1],
    "small to large": lambda face, size: face.area,
}


def in_order(faces: Iterable[Face], order: str, size: Size) -> list[Face]:
    """Faces sorted by one of ORDERS; the position in this list is the index a user names. Else InputError."""
    if order not in ORDERS:
        raise InputError(f"Faces cannot be ordered by {order!r}; choose one of: {', '.join(ORDERS)}.")
    return sorted(faces, key=lambda face: ORDERS[order](face, size))


def under_mask(faces: Sequence[Face], mask: Tensor, size: Size) -> list[Face]:
    """The faces whose box the mask (H, W) touches, best covered first. InputError if it touches none of them."""
    if not mask.any():
        raise InputError(
            "The mask is empty. LoadImage gives an empty mask for a picture without transparency: disconnect it, or "
            "draw over the face to take."
        )
    covered = []
    for face in faces:
        inside = _inside(face, mask, size)
        covered.append(inside.mean().item() if inside.numel() else 0.0)
    touched = [index for index in range(len(faces)) if covered[index] > 0]
    if faces and not touched:
        raise InputError(
            f"The mask touches no face; the photograph shows {_count(faces)}. Draw it over the one to take, or "
            "invert it (InvertMask) if it was cut out the other way round."
        )
    return [faces[index] for index in sorted(touched, key=lambda index: -covered[index])]


def _inside(face: Face, mask: Tensor, size: Size) -> Tensor:
    height, width = mask.shape
    x0, x1 = (int(x / size[0] * width) for x in face.box[::2])
    y0, y1 = (int(y / size[1] * height) for y in face.box[1::2])
    return mask[max(y0, 0) : max(y1, 0) + 1, max(x0, 0) : max(x1, 0) + 1]


def mask_doubt(face: Face, mask: Tensor, size: Size) -> str | None:
    """That the mask lies beside the face rather than on it, as one does that was cut out the other way round."""
    inside = _inside(face, mask, size)
    on, rest = inside.mean().item(), (mask.sum() - inside.sum()).item() / max(mask.numel() - inside.numel(), 1)
    words = f"The mask covers {on:.0%} of the face and {rest:.0%} of the rest: is it inverted? Put Invert Mask between"
    return words if on < 0.5 <= rest else None


def pick(faces: Sequence[Face], index: int) -> Face:
    """The face with this index. NoFaceError if there is none at all, InputError if there is no such index."""
    if not faces:
        raise NoFaceError(
            "No face found in the photograph. Use one where the face is in view, upright and not cut by the frame."
        )
    if not 0 <= index < len(faces):
        last = f"index runs from 0 to {len(faces) - 1}" if len(faces) > 1 else "its index is 0"
        raise InputError(f"There is no face with index {index}: the photograph shows {_count(faces)}; {last}.")
    return faces[index]


def _count(faces: Sequence[Face]) -> str:
    return "one face" if len(faces) == 1 else f"{len(faces)} faces"


def same_face(face: Face, others: Iterable[Face]) -> Face | None:
    """The other detector's view of this face: the one that overlaps it best, or None if none is the same face."""
    best = max(others, key=lambda other: overlap(face, other), default=None)
    return best if best is not None and overlap(face, best) > SAME_FACE_IOU else None


def overlap(one: Face, other: Face) -> float:
    """Intersection over union of two boxes, 0..1."""
    width = min(one.box[2], other.box[2]) - max(one.box[0], other.box[0])
    height = min(one.box[3], other.box[3]) - max(one.box[1], other.box[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / (one.area + other.area - shared)


def alignment(landmarks: np.ndarray) -> np.ndarray:
    """The affine matrix (2, 3) that lays landmarks (5, 2) onto CROP_LANDMARKS: rotation, one scale, translation.

    Least median of squares, as facexlib does. Raises NoFaceError if the landmarks do not span a face.
    """
    cv2 = import_package("cv2")
    matrix, _ = cv2.estimateAffinePartial2D(landmarks, CROP_LANDMARKS, method=cv2.LMEDS)
    if matrix is None or not np.isfinite(matrix).all():
        raise NoFaceError(f"The detector's five landmarks do not span a face: {landmarks.round(1).tolist()}.")
    return matrix


def align(photo: Photo, landmarks: np.ndarray) -> np.ndarray:
    """The aligned crop (512, 512, 3) uint8 RGB of the face with these landmarks (5, 2)."""
    cv2 = import_package("cv2")
    return cv2.warpAffine(photo, alignment(landmarks), (CROP_SIZE, CROP_SIZE), borderValue=CROP_BORDER)
