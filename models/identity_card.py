"""Identity cards: PNG pictures that show an identity's faces and carry its file inside, byte for byte.

A card goes wherever a picture goes: into an upload button, an `image` input, a chat. The file lies in a chunk of its
own, `puLD`; its capitals say what PNG wants said: not needed to show the picture, private, and not to be copied into
another picture (https://www.w3.org/TR/png-3/#5Chunk-naming-conventions). So an editor that saves the picture anew
drops the identity, and does not keep an old one under a new face.
"""

import io
import re
import struct
import zlib

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..pulid.identity import PREVIEW_SIZE

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PICTURE = re.compile(rb"\x89PNG\r\n|\xff\xd8\xff|GIF8|RIFF....WEBP|BM", re.DOTALL)  # how pictures begin
CHUNK = b"puLD"
END = struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))
MARGIN, FOOT, COLUMNS = 16, 56, 4  # px, px, faces in a row
PAPER, INK, QUIET = (250, 248, 244), (40, 36, 32), (120, 112, 104)  # RGB


def make_card(content: bytes, faces: Tensor | None, title: str) -> bytes:
    """A PNG that shows `faces`, (P, S, S, 3) uint8 RGB, with a line below, and carries `content` inside."""
    file = io.BytesIO()
    draw_card(faces, title).save(file, "PNG")
    picture = file.getvalue()
    assert picture.endswith(END), "Pillow ends a PNG with IEND"
    chunk = struct.pack(">I", len(content)) + CHUNK + content
    return picture.removesuffix(END) + chunk + struct.pack(">I", zlib.crc32(content, zlib.crc32(CHUNK))) + END


def card_content(card: bytes) -> memoryview | None:
    """What `make_card` put inside; None where there is nothing, or not all of it."""
    position = len(SIGNATURE)
    while position + 12 <= len(card):
        length, kind = struct.unpack_from(">I4s", card, position)
        if kind == CHUNK:
            content = memoryview(card)[position + 8 : position + 8 + length]
            checksum = card[position + 8 + length : position + 12 + length]
            whole = checksum == struct.pack(">I", zlib.crc32(content, zlib.crc32(CHUNK)))
            return content if whole else None
        position += length + 12
    return None


def draw_card(faces: Tensor | None, title: str) -> Image.Image:
    """The faces in rows of four, larger where there are few, above the title; without faces, an empty place."""
    tiles = faces if faces is not None else torch.full((1, PREVIEW_SIZE, PREVIEW_SIZE, 3), 224, dtype=torch.uint8)
    side = {1: 384, 2: 256}.get(len(tiles), 192)
    columns = min(len(tiles), COLUMNS)
    rows = -(-len(tiles) // columns)
    size = columns * (side + MARGIN) + MARGIN, rows * (side + MARGIN) + MARGIN + FOOT
    card = Image.new("RGB", size, PAPER)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        place = MARGIN + column * (side + MARGIN), MARGIN + row * (side + MARGIN)
        card.paste(Image.fromarray(tile.numpy()).resize((side, side), Image.Resampling.BICUBIC), place)
    pen, below = ImageDraw.Draw(card), size[1] - FOOT
    pen.text((MARGIN, below), title, INK, ImageFont.load_default(20))
    note = "The identity is inside: send the file itself."
    pen.text((MARGIN, below + 26), note, QUIET, ImageFont.load_default(13))
    return card
