"""Who is where: a mask for each person of a picture, grown from their face, that nobody else's touches."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .faces import Face, FoundFaces, in_order
from .photo import Size

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 of a face, 0..1 of the picture's width and height

# How far a region reaches beyond the face's box: to either side in widths of the box, up and down in heights of it.
REACHES = {
    "face": (0.0, 0.0, 0.0),
    "head": (0.35, 0.6, 0.25),
    "head and shoulders": (1.0, 0.6, 1.2),
    "body": (1.4, 0.6, 6.5),
}
DECIMALS = 4  # of a box as text; boxes that were found are rounded to it, so that written ones make the same masks
ROUNDNESS = 4  # of the superellipse: 2 is an ellipse, more is nearer to a rectangle


def masks_of(boxes: Sequence[Box], reach: str, feather: float, size: Size) -> Tensor:
    """One mask per person, (R, H, W) float32 0..1 on the CPU; no pixel has more than one above 0.

    A region is 0 at its face's middle and 1 at its edge. A pixel belongs to whoever's region is lowest there, so that
    the nearest face wins, the larger one having the wider reach. Over the last `feather` (0..1) before its edge, and
    before the border with a neighbour, a mask falls to 0.

    size  width and height in px of the masks
    """
    width, height = size
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    regions = torch.stack([_region(box, reach, x / width, y / height) for box in boxes])  # (R, H, W)
    room = 1 - regions
    if len(boxes) > 1:
        two = regions.topk(2, dim=0, largest=False).values
        nearest_other = torch.where(regions == two[0], two[1], two[0])
        room = torch.minimum(room, nearest_other - regions)
    return (room / feather).clamp(0, 1) if feather else (room > 0).float()


def _region(box: Box, reach: str, x: Tensor, y: Tensor) -> Tensor:
    x0, y0, x1, y1 = box
    beside, above, below = REACHES[reach]
    half_width, half_height = (x1 - x0) / 2, (y1 - y0) / 2
    across = (x - (x0 + x1) / 2).abs() / (half_width * (1 + 2 * beside))
    down = y - (y0 + y1) / 2
    down = torch.where(down < 0, -down / (half_height * (1 + 2 * above)), down / (half_height * (1 + 2 * below)))
    larger = torch.maximum(across, down).clamp(min=1e-12)  # kept apart, so that far away nothing overflows
    return larger * ((across / larger) ** ROUNDNESS + (down / larger) ** ROUNDNESS) ** (1 / ROUNDNESS)


def people_of(found: FoundFaces, people: int, order: str, size: Size) -> list[Box]:
    """The boxes of the `people` largest faces, in this order. Raises InputError where there are fewer.

    size  width and height in px of the picture they were found in
    """
    largest: list[Face] = in_order(found.faces, "largest", size)[:people]
    if len(largest) < people:
        seen = f"{len(largest)} face{'s' * (len(largest) != 1)}"
        raise InputError(
            f"The picture shows {seen}, and {people} people are to be placed. Make another draft, lower people, or "
            "write the boxes yourself."
        )
    scale = np.array([*size, *size])
    return [tuple(np.divide(face.box, scale).round(DECIMALS).tolist()) for face in in_order(largest, order, size)]


def write_boxes(boxes: Sequence[Box]) -> str:
    """A line for each box, as `read_boxes` reads it."""
    return "\n".join(" ".join(f"{value:.{DECIMALS}f}" for value in box) for box in boxes)


def read_boxes(text: str, people: int) -> list[Box]:
    """One `x0 y0 x1 y1` in 0..1 a line, commas allowed; empty lines do not count.

    Raises InputError with the line's number for anything else, and where there are not as many as people.
    """
    boxes = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            x0, y0, x1, y1 = (float(word) for word in line.replace(",", " ").split())
        except ValueError:
            x0 = y0 = x1 = y1 = float("nan")
        if not (x0 < x1 and y0 < y1 and min(x0, y0) >= -1 and max(x1, y1) <= 2):
            raise InputError(
                f"Line {number} of boxes must be the face's x0 y0 x1 y1 as shares of the picture, such as "
                f"0.1 0.2 0.3 0.5; found {line.strip()!r}."
            )
        boxes.append((x0, y0, x1, y1))
    if len(boxes) != people:
        raise InputError(f"Boxes for {people} needed, one a line; found {len(boxes)}. Write them, or change people.")
    return boxes
