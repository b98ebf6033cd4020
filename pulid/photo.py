"""Photographs as the detectors take them: uint8 RGB of at most 1024 px, whatever the graph gave.

Everything runs on the CPU, so that every machine gives the same numbers.
"""

from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .packages import import_package

Photo = np.ndarray  # (H, W, 3) uint8 RGB
Size = tuple[int, int]  # width, height in pixels

LONG_EDGE = 1024  # the authors shrink larger photographs to this
BRIGHTEST = 16.0  # beyond it, pixels were meant as 0..255; a little above 1 is what upscalers leave
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
    if not image.isfinite().all():
        raise InputError("The photograph holds NaN or infinite pixels. Check the node that made it.")
    if (most := image.max().item()) > BRIGHTEST:
        raise InputError(f"The photograph has pixels up to {most:g}; expected 0 to 1. Divide it by 255.")
    if channels == 4:
        opacity = image[..., 3:].clamp(0, 1)
        image = image[..., :3] * opacity + (1 - opacity)
    photo = (image.clamp(0, 1) * 255).round().byte().expand(-1, -1, 3).contiguous().numpy()
    if scale < 1:
        cv2 = import_package("cv2")
        photo = cv2.resize(photo, read_size(image, long_edge), interpolation=cv2.INTER_LANCZOS4)
    return photo


def read_size(image: Tensor, long_edge: float = LONG_EDGE) -> Size:
    """Width and height of what `read_photo` gives."""
    height, width = image.shape[:2]
    scale = min(long_edge / max(height, width, 1), 1)
    return int(width * scale), int(height * scale)


def digest(tensor: Tensor) -> bytes:
    """A hash of the tensor's content, shape and type; 7 ms for a photograph of 1024 x 1024 px."""
    content = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
    return sha256(content.data, usedforsecurity=False).digest() + repr((tuple(tensor.shape), tensor.dtype)).encode()
