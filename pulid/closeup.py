"""The face close up: a square around a face, cut out at a working size, and what was changed in it put back."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .errors import InputError
from .layouts import masks_of

LEAST_SIDE = 16  # px of a picture's short edge; below, there is no face to look at
WHOLE_CHANGE = 0.1  # of the range from black to white; from here on, nothing of the old grain is left
MASK_REACH, MASK_FEATHER = "head", 0.3  # of the mask within the crop


@dataclass(frozen=True)
class Place:
    """Where a crop comes from.

    square  x0, y0, x1, y1, whole pixels of the picture
    size    width and height of the picture
    """

    square: tuple[int, int, int, int]
    size: tuple[int, int]


def place_of(face: tuple[float, float, float, float], size: tuple[int, int], context: float) -> Place:
    """The square around a face's box (x0, y0, x1, y1 in px of the picture), `context` times its longer side.

    At the frame's edge it is moved inside, and it is never larger than the picture's shorter side.
    """
    x0, y0, x1, y1 = face
    side = min(max(round(max(x1 - x0, y1 - y0) * context), LEAST_SIDE), *size)
    left, top = (
        min(max(round((low + high - side) / 2), 0), full - side)
        for low, high, full in ((x0, x1, size[0]), (y0, y1, size[1]))
    )
    return Place((left, top, left + side, top + side), size)


def cut(picture: Tensor, place: Place, side: int) -> Tensor:
    """The place's square of a picture (H, W, 3 or more) -> (side, side, 3) 0..1."""
    x0, y0, x1, y1 = place.square
    return resize(picture[y0:y1, x0:x1, :3], side).clamp(0, 1)  # bicubic curves go beyond


def mask_of(face: tuple[float, float, float, float], place: Place, side: int) -> Tensor:
    """Where in the crop the head is, soft at its edge: the face's box in px of the picture -> (side, side) 0..1."""
    x0, y0, x1, _ = place.square
    a, b, c, d = ((value - start) / (x1 - x0) for value, start in zip(face, (x0, y0, x0, y0), strict=True))
    return masks_of([(a, b, c, d)], MASK_REACH, MASK_FEATHER, (side, side))[0]


def paste(picture: Tensor, crop: Tensor, place: Place, feather: float) -> Tensor:
    """The picture (H, W, C) with the changed crop (h, w, 3) in its place.

    Where nothing was changed, what resizing takes from a picture, its finest grain, is given back: there the picture
    stays as it was. The more was changed, the less of the old grain is left. Over `feather` (0..0.5) of the square's
    side it fades towards the edges, except at the frame's. Outside the square, the picture is the same to the bit.

    Raises InputError for a picture of another size than the one the crop was taken from, and for NaN.
    """
    height, width = picture.shape[:2]
    if (width, height) != place.size:
        raise InputError(
            f"The crop was taken from a picture of {place.size[0]} x {place.size[1]} px, and is to be put back into "
            f"one of {width} x {height} px. Connect the picture that the crop was taken from."
        )
    if crop.shape[-1] < 3 or crop.shape[0] != crop.shape[1] or not crop.isfinite().all():
        raise InputError(
            f"A crop must be a square RGB picture without NaN, found {tuple(crop.shape)}. Connect what PuLID Face Crop "
            "gave, drawn once more at a square size."
        )
    x0, y0, x1, y1 = place.square
    crop = crop[..., :3].to(picture)
    pasted = picture.clone()
    region = pasted[y0:y1, x0:x1, :3]
    before = cut(picture, place, len(crop))
    change, grain = resize(crop - before, x1 - x0), region - resize(before, x1 - x0)
    mask = fade(place, feather).to(picture)[..., None]
    new = (region + mask * (change - _changed(change) * grain)).clamp(0, 1)
    region.copy_(torch.where(mask > 0, new, region))
    return pasted


def _changed(change: Tensor) -> Tensor:
    """How much was changed around each pixel, 0..1: (H, W, 3) -> (H, W, 1). What eight bits round away is no change."""
    strongest = change.abs().amax(dim=-1)[None, None]
    around = functional.max_pool2d(strongest, 5, stride=1, padding=2)[0, 0, ..., None]
    return ((around - 1 / 255) / WHOLE_CHANGE).clamp(0, 1)


def fade(place: Place, feather: float) -> Tensor:
    """(side, side) 0..1: 1 inside, falling towards those edges of the square that are not the frame's."""
    x0, y0, x1, y1 = place.square
    width, height = place.size
    across = _ramp(x1 - x0, feather, x0 > 0, x1 < width)
    down = _ramp(y1 - y0, feather, y0 > 0, y1 < height)
    return torch.minimum(across[None, :], down[:, None])


def _ramp(side: int, feather: float, at_start: bool, at_end: bool) -> Tensor:
    reach = feather * side
    if not reach:
        return torch.ones(side)
    position = torch.arange(side) + 0.5
    ramp = torch.full((side,), reach)
    ramp = torch.minimum(ramp, position) if at_start else ramp
    ramp = torch.minimum(ramp, side - position) if at_end else ramp
    share = ramp / reach
    return share * share * (3 - 2 * share)  # smooth at both ends


def resize(picture: Tensor, side: int) -> Tensor:
    """(H, W, 3) -> (side, side, 3), bicubic; smoothed where it gets smaller."""
    if picture.shape[:2] == (side, side):
        return picture
    planes = picture.movedim(-1, 0)[None].float()
    return functional.interpolate(planes, (side, side), mode="bicubic", antialias=True)[0].movedim(0, -1).to(picture)
