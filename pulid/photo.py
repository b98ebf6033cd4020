"""Photographs as the detectors take them: uint8 RGB of at most 1024 px, whatever the graph gave.

Everything runs on the CPU, so that every machine gives the same numbers.
"""

from hashlib import sha256
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .packages import import_package

Photo = np.ndarray  # (H, W, 3) uint8 RGB
Size = tuple[int, int]  # width, height in pixels

LONG_EDGE = 1024  # the authors shrink larger photographs to this
BRIGHTEST = 16.0  # beyond it, pixels were meant as 0..255; a little above 1 is what upscalers leave
WASHED_OUT = 0.02  # of a picture; where less is neither black nor white, nobody sees a face in it
CACHED = 64  # lines of a picture that are read at a time, so that they stay in the processor's cache
SHORT_EDGE = 16  # px; below this there is nothing to detect, and the detectors' own resizing rounds to nothing


def read_photo(image: Tensor, long_edge: float = LONG_EDGE) -> Photo:
    """A row of an IMAGE batch, (H, W, C) float 0..1, as a photograph.

    C is 3 (RGB), 1 (grey) or 4 (RGB and opacity, laid on white). The long edge becomes at most `long_edge`.
    Raises InputError for any other shape or type, for NaN and infinity, and for pictures too small to hold a face.
    """
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4) or not image.is_floating_point():
        raise InputError(
            "A photograph must be a float image (height, width, channels) with 1, 3 or 4 channels; "
            f"found {tuple(image.shape)} of {image.dtype}."
        )
    height, width, channels = image.shape
    scale = min(long_edge / max(height, width, 1), 1)
    if min(int(height * scale), int(width * scale)) < SHORT_EDGE:
        raise InputError(
            f"A photograph of {width} x {height} px is too small or too narrow to hold a face: "
            f"once its long edge is at most {long_edge} px, its short edge must be at least {SHORT_EDGE} px."
        )
    image = image.cpu().float()
    least, most = (value.item() for value in image.aminmax())  # NaN where there is one
    if not isfinite(most - least):
        raise InputError("The photograph holds NaN or infinite pixels. Check the node that made it.")
    if most > BRIGHTEST:
        raise InputError(f"The photograph has pixels up to {most:g}; expected 0 to 1. Divide it by 255.")
    pixels = torch.empty(height, width, 3, dtype=torch.uint8)
    for lines, read in zip(image.split(CACHED), pixels.split(CACHED), strict=True):
        opacity = lines[..., 3:].clamp(0, 1) if channels == 4 else None
        on_white = lines if opacity is None else lines[..., :3] * opacity + (1 - opacity)
        read.copy_((on_white * 255).round_().clamp_(0, 255))
    photo = pixels.numpy()
    if scale < 1:
        cv2 = import_package("cv2")
        photo = cv2.resize(photo, read_size(image, long_edge), interpolation=cv2.INTER_LANCZOS4)
    return photo


def read_size(image: Tensor, long_edge: float = LONG_EDGE) -> Size:
    """Width and height of what `read_photo` gives."""
    height, width = image.shape[:2]
    scale = min(long_edge / max(height, width, 1), 1)
    return int(width * scale), int(height * scale)


def shrunk(image: Tensor, to: Size | None = None) -> str | None:
    """That a photograph (H, W, C) was shrunk, to `to` or as `read_photo` does, and by how much; None if it was not."""
    height, width = image.shape[:2]
    to = to or read_size(image)
    return (
        f"shrunk from {width} x {height} to {to[0]} x {to[1]} px ({width / to[0]:.1f} times)" if to[0] < width else None
    )


def washed_out(photo: Photo) -> str | None:
    """That hardly anything is to be seen: one colour, or all but WASHED_OUT of it black or white; else None."""
    lowest, highest = int(photo.min()), int(photo.max())
    if lowest == highest:
        return f"one colour all over (level {lowest} of 255)"
    for level, colour in ((0, "black"), (255, "white")):
        red, green, blue = np.moveaxis(photo == level, -1, 0)
        if (share := float((red & green & blue).mean())) > 1 - WASHED_OUT:
            return f"{share:.1%} {colour}"
    return None


def cut_off(image: Tensor) -> str | None:
    """That pixels lie beyond 0 to 1, which is black to white; None where they do not."""
    lowest, highest = (float(value) for value in image.aminmax())
    if lowest >= -1 / 255 and highest <= 1 + 1 / 255:
        return None
    return f"with pixels from {lowest:.2f} to {highest:.2f}: what lies beyond 0 to 1 is taken as black or white"


def digest(tensor: Tensor) -> bytes:
    """A hash of the tensor's content, shape and type; 7 ms for a photograph of 1024 x 1024 px."""
    content = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
    return sha256(content.data, usedforsecurity=False).digest() + repr((tuple(tensor.shape), tensor.dtype)).encode()
