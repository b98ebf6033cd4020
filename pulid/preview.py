"""Pictures for people to look at: photographs with their faces marked, and small pictures of faces."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from .faces import Selection
from .identity import PREVIEW_SIZE
from .photo import Photo

CHOSEN, OTHER = (64, 220, 96), (250, 180, 40)  # RGB


def draw_selection(photo: Photo, selection: Selection | None) -> Tensor:
    """The photograph with every face's box, index and score, the chosen one in its own colour: (H, W, 3) uint8."""
    faces = selection.faces if selection else ()
    labels = [f"{index}   {face.score:.2f}" for index, face in enumerate(faces)]
    return draw_boxes(photo, [face.box for face in faces], labels, selection.index if selection else None)


def draw_boxes(photo: Photo, boxes: Sequence[Sequence[float]], labels: Sequence[str], chosen: int | None) -> Tensor:
    """The photograph with boxes (x0, y0, x1, y1) in its pixels and a label on each: (H, W, 3) uint8."""
    picture = Image.fromarray(photo)
    pen = ImageDraw.Draw(picture)
    line = max(2, max(photo.shape) // 300)
    font = ImageFont.load_default(size=8 * line)
    for index, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        color = CHOSEN if index == chosen else OTHER
        pen.rectangle(tuple(box), outline=color, width=line)
        corner = box[0], max(0, box[1] - 10 * line)
        pen.rectangle(pen.textbbox(corner, f" {label} ", font=font), fill=color)
        pen.text(corner, f" {label} ", fill=(0, 0, 0), font=font)
    return torch.from_numpy(np.array(picture))


def thumbnails(faces: Tensor) -> Tensor:
    """Faces as an identity shows them: (P, 3, H, W) RGB 0..1 -> (P, 128, 128, 3) uint8."""
    size = PREVIEW_SIZE, PREVIEW_SIZE
    small = functional.interpolate(faces.cpu().float(), size, mode="bilinear", antialias=True)
    return (small.clamp(0, 1) * 255).round().byte().movedim(1, -1).contiguous()
