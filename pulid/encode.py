"""Looks at the photographs of a batch, a few at a time, and keeps what was seen in each."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..pulid.errors import InputError, NoFaceError
from ..pulid.faces import VISION_SIZE, FaceAnalyzer, Sight, find_face, grey_on_white, read_photo, shrink
from ..pulid.identity import FaceCrop, thumbnails
from .kept import Kept, digest
from .sockets import Keep, Pulid, Reading

BATCH = 4  # photographs that go through the vision tower together; more would need more memory for the same speed
WHOLE = 12  # photographs whose hidden states are kept, 12 MB each, where the encoder reads all together


@dataclass(frozen=True)
class Choice:
    """Which face of a photograph, and whether the encoder will look at it together with those of others."""

    order: str
    index: int
    together: bool

    def find(self, photograph: "Photograph", analyzer: FaceAnalyzer) -> tuple[Sight, FaceCrop]:
        """What is seen in a photograph, and the chosen face. Raises NoFaceError, InputError."""
        return find_face(read_photo(photograph.pixels), analyzer, self.order, self.index, photograph.mask)

    def shrink(self, faces: Tensor) -> Tensor:
        """Faces (P, 3, H, W) at the vision tower's size."""
        return shrink(faces, VISION_SIZE)


@dataclass(frozen=True, eq=False)
class Photograph:
    """One photograph to look at.

    pixels  (H, W, C), a row of an IMAGE batch
    mask    (H, W) over the face to take, or None
    key     tells what will be seen from anything else: by content, weights and choice
    """

    pixels: Tensor
    mask: Tensor | None
    key: Hashable


@dataclass(frozen=True, eq=False)
class Look:
    """What was seen in one photograph.

    seen   (336, 336, 3), the face as the vision tower sees it, 0..1
    small  (128, 128, 3) uint8, the face for people to look at
    """

    sight: Sight
    seen: Tensor
    small: Tensor
    reading: Reading


def photographs(image: Tensor, mask: Tensor | None, *circumstances: Hashable) -> list[Photograph]:
    """The rows of an IMAGE batch with their masks (B, H, W); the last mask serves for all that follow."""
    masks = [None if mask is None else mask[min(row, len(mask) - 1)] for row in range(len(image))]
    return [
        Photograph(picture, where, (*circumstances, digest(picture), None if where is None else digest(where)))
        for picture, where in zip(image, masks, strict=True)
    ]


def look(
    pulid: Pulid, taken: Sequence[Photograph], choice: Choice, kept: Kept, step: Callable[[], None]
) -> Iterator[Look | NoFaceError]:
    """What is seen in each photograph, in order; a NoFaceError for one that shows no face.

    kept  looks by key, from earlier times and for later
    step  is called before each photograph is looked at, and may raise

    Raises InputError, with the photograph's number, for one that cannot be used.
    """
    waiting: list[tuple[Hashable, Look | NoFaceError | tuple[Sight, FaceCrop]]] = []
    keep = Keep.HIDDEN if choice.together else Keep.TOKENS
    for number, photograph in enumerate(taken, start=1):
        step()
        if (seen := kept.get(photograph.key)) is None:
            try:
                seen = choice.find(photograph, pulid.analyzer)
            except NoFaceError as error:
                seen = error.with_traceback(None)  # which would keep the photograph
                kept.put(photograph.key, seen)
            except InputError as error:
                raise InputError(f"Photograph {number} of {len(taken)}: {error}") from error
        waiting.append((photograph.key, seen))
        if sum(isinstance(one, tuple) for _, one in waiting) in (0, BATCH):
            yield from _read(pulid, waiting, choice, keep, kept)
            waiting = []
            if choice.together and number >= WHOLE:
                keep = Keep.FACE
    yield from _read(pulid, waiting, choice, keep, kept)


def _read(pulid: Pulid, waiting: list, choice: Choice, keep: Keep, kept: Kept) -> Iterator[Look | NoFaceError]:
    """Sends the crops among these through the networks together; what is ready already passes by."""
    found = [one for _, one in waiting if isinstance(one, tuple)]
    looks = iter(_looks(pulid, found, choice, keep) if found else ())
    for key, one in waiting:
        if isinstance(one, tuple):
            one = next(looks)
            kept.put(key, one, (one.seen, one.small, *one.reading.tensors))
        yield one


def _looks(pulid: Pulid, found: Sequence[tuple[Sight, FaceCrop]], choice: Choice, keep: Keep) -> list[Look]:
    pixels = torch.stack([crop.pixels for _, crop in found])
    faces = choice.shrink(grey_on_white(pixels, pulid.analyzer.parse(pixels)))
    readings = pulid.read(faces, torch.stack([crop.arcface for _, crop in found]), keep)
    seen = faces.clamp(0, 1).movedim(1, -1)  # (P, 3, H, W) -> (P, H, W, 3)
    small = thumbnails(pixels)
    return [
        Look(sight, seen[row].clone(), small[row].clone(), reading)
        for row, ((sight, _), reading) in enumerate(zip(found, readings, strict=True))
    ]
