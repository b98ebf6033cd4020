"""What a node says of the pictures that it looked at, so that people know what its scores rest on."""

from collections.abc import Sequence

from torch import Tensor

from ..pulid.photo import cut_off, read_photo, shrunk, washed_out


def notes_on(kind: str, pictures: Sequence[Tensor], boxes: Sequence[Sequence[float] | None]) -> list[str]:
    """A line for each thing to know, with the numbers of the pictures (H, W, C); then sizes of the faces in `boxes`."""
    true_of: dict[str, list[str]] = {}
    sizes = {}  # of boxes x0 y0 x1 y1, in px of `read_photo`
    for number, (pixels, box) in enumerate(zip(pictures, boxes, strict=True), start=1):
        for words in filter(None, (shrunk(pixels), cut_off(pixels), washed_out(read_photo(pixels)))):
            true_of.setdefault(words, []).append(str(number))
        if box is not None:
            sizes[number] = round(box[2] - box[0]), round(box[3] - box[1])
    lines = [f"{kind} {', '.join(numbers)}: {words}." for words, numbers in true_of.items()]
    if sizes:
        ranked = sorted(sizes, key=lambda number: min(sizes[number]))
        shown = dict.fromkeys((ranked[0], ranked[-1]))
        each = " to ".join(f"{sizes[number][0]} x {sizes[number][1]} px ({kind.lower()} {number})" for number in shown)
        lines.append(f"Faces as they were looked at: {each}.")
    return lines
