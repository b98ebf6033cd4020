"""Pictures that show what was found."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..pulid.faces import Photo, Sight

CHOSEN, OTHER = (64, 220, 96), (250, 180, 40)  # RGB


def draw_faces(photo: Photo, sight: Sight | None) -> Tensor:
    """The photograph with every face's box, index and score, the chosen one in its own colour: (H, W, 3) uint8."""
    picture = Image.fromarray(photo)
    pen = ImageDraw.Draw(picture)
    line = max(2, max(photo.shape) // 300)
    font = ImageFont.load_default(size=8 * line)
    for index, face in enumerate(sight.faces if sight else ()):
        color = CHOSEN if index == sight.index else OTHER
        pen.rectangle(face.box, outline=color, width=line)
        label = f" {index}   {face.score:.2f} "
        corner = face.box[0], max(0, face.box[1] - 10 * line)
        pen.rectangle(pen.textbbox(corner, label, font=font), fill=color)
        pen.text(corner, label, fill=(0, 0, 0), font=font)
    return torch.from_numpy(np.array(picture))
