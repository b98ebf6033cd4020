"""Pictures for people to look at: photographs with their faces marked, contact sheets, masks, and a chart of scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn import functional

from .faces import Selection
from .identity import PREVIEW_SIZE
from .photo import Photo

CHOSEN, OTHER = (64, 220, 96), (250, 180, 40)  # RGB
GROUND, CARD, EMPTY = (24, 25, 28), (38, 40, 45), (58, 61, 68)
WORDS, FAINT = (236, 238, 242), (150, 155, 165)
KEPT, LEFT_OUT = (86, 196, 128), (214, 96, 86)
# One for each person, told apart by those who see no red or green too: https://jfly.uni-koeln.de/color/
PEOPLE = ((86, 180, 233), (230, 159, 0), (0, 158, 115), (240, 228, 66), (204, 121, 167), (0, 114, 178), (213, 94, 0))


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
    return _tensor(picture)


def thumbnails(faces: Tensor) -> Tensor:
    """Faces as an identity shows them: (P, 3, H, W) RGB 0..1 -> (P, 128, 128, 3) uint8."""
    size = PREVIEW_SIZE, PREVIEW_SIZE
    small = functional.interpolate(faces.cpu().float(), size, mode="bilinear", antialias=True)
    return (small.clamp(0, 1) * 255).round().byte().movedim(1, -1).contiguous()


def on_one_size(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures (H, W, 3) uint8 of any sizes as a batch, each in the upper left of the largest height and width."""
    height, width = (max(picture.shape[side] for picture in pictures) for side in (0, 1))
    batch = torch.zeros(len(pictures), height, width, 3, dtype=torch.uint8)
    for row, picture in zip(batch, pictures, strict=True):
        row[: picture.shape[0], : picture.shape[1]] = picture
    return batch


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture))


# --- A contact sheet ---

THUMB, MARGIN, LINE = 232, 14, 17  # px
BAR = 92


@dataclass(frozen=True)
class Card:
    """One photograph of a contact sheet.

    box    of the face, in pixels of the photo, or None
    place  from 1; None where it is left out, and then why
    taken  whether its place is among those that are asked for
    bars   marks 0..1 by name, each with what is written beside it
    """

    photo: Photo
    number: int
    box: Sequence[float] | None
    place: int | None
    taken: bool
    why: str
    score: float | None
    bars: dict[str, tuple[float, str]]


def contact_sheet(cards: Sequence[Card], columns: int = 5) -> Tensor:
    """All cards in this order, (H, W, 3) uint8."""
    columns = min(columns, len(cards))
    lines = max((len(card.bars) for card in cards), default=0)
    width, height = THUMB + 2 * MARGIN, THUMB + 3 * MARGIN + 24 + lines * LINE
    rows = -(-len(cards) // columns)
    sheet = Image.new("RGB", (MARGIN + columns * (width + MARGIN), MARGIN + rows * (height + MARGIN)), GROUND)
    for index, card in enumerate(cards):
        row, column = divmod(index, columns)
        corner = MARGIN + column * (width + MARGIN), MARGIN + row * (height + MARGIN)
        sheet.paste(_card(card, (width, height)), corner)
    return _tensor(sheet)


def _card(card: Card, size: tuple[int, int]) -> Image.Image:
    picture = Image.new("RGB", size, CARD)
    pen = ImageDraw.Draw(picture)
    color = KEPT if card.taken else FAINT if card.place else LEFT_OUT
    thumb = _thumbnail(card.photo, card.box, color)
    if not card.taken:  # so that the eye goes to the others
        thumb = Image.blend(thumb, Image.new("RGB", thumb.size, CARD), 0.55)
    picture.paste(thumb, (MARGIN + (THUMB - thumb.width) // 2, MARGIN + (THUMB - thumb.height) // 2))
    top = THUMB + 2 * MARGIN - 4
    badge = f"{card.place}" if card.place else "left out"
    box = pen.textbbox((MARGIN + 7, top + 11), badge, font=_font(13), anchor="lm")
    pen.rounded_rectangle((MARGIN, top, box[2] + 7, top + 22), 11, fill=color)
    pen.text((MARGIN + 7, top + 11), badge, fill=GROUND, font=_font(13), anchor="lm")
    said = card.why or ("" if card.score is None else f"{card.score:.2f}")
    words = f"photo {card.number}   {said}"
    pen.text((box[2] + 15, top + 11), words, fill=WORDS, font=_font(12), anchor="lm")
    for row, (name, (value, beside)) in enumerate(card.bars.items()):
        y = top + 24 + MARGIN // 2 + row * LINE
        left = MARGIN + 66
        pen.text((MARGIN, y + 5), name, fill=FAINT, font=_font(12), anchor="lm")
        pen.rounded_rectangle((left, y, left + BAR, y + 9), 4, fill=EMPTY)
        if value > 0.05:
            pen.rounded_rectangle((left, y, left + value * BAR, y + 9), 4, fill=color)
        pen.text((left + BAR + 8, y + 5), beside, fill=FAINT, font=_font(12), anchor="lm")
    return picture


def _thumbnail(
    photo: Photo, box: Sequence[float] | None, color: tuple[int, int, int], side: int = THUMB
) -> Image.Image:
    """The photo within a square of `side` px, with the face's box."""
    picture = Image.fromarray(photo)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    if box is not None:
        scale = picture.width / photo.shape[1]
        ImageDraw.Draw(picture).rounded_rectangle([value * scale for value in box], 4, outline=color, width=2)
    return picture


def _close_up(photo: Photo, box: Sequence[float] | None, side: int) -> Image.Image:
    """A square of the photo, (side, side): around the face where there is one."""
    picture = Image.fromarray(photo)
    if box is None:
        return ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    half = min(0.8 * max(box[2] - box[0], box[3] - box[1]), picture.width / 2, picture.height / 2)
    x, y = min(max(x, half), picture.width - half), min(max(y, half), picture.height - half)
    return picture.resize((side, side), Image.Resampling.LANCZOS, (x - half, y - half, x + half, y + half))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


# --- A chart of scores ---

PLOT, AXIS = 260, 54  # px: height of the plot, and room at its left
WIDEST, NARROWEST = 96, 26  # px of a column


@dataclass(frozen=True)
class Column:
    """One picture of a chart; score None where a face is missing, box of the face that the score is about."""

    photo: Photo
    number: int
    score: float | None
    passed: bool
    box: Sequence[float] | None = None


def score_chart(columns: Sequence[Column], threshold: float | None, floor: float | None, title: str) -> Tensor:
    """Bars by score in this order, with the threshold's line and the floor that strangers reach: (H, W, 3) uint8."""
    width = max(NARROWEST, min(WIDEST, 1400 // max(len(columns), 1)))
    around = 2 * MARGIN
    across = max(len(columns) * width, 560)  # room for the title, and for words on the lines
    labels = 94  # px at the right
    chart = Image.new("RGB", (AXIS + across + labels, 52 + PLOT + width + around + 24), GROUND)
    pen = ImageDraw.Draw(chart)
    pen.text((around, 24), title, fill=WORDS, font=_font(16), anchor="lm")
    low = min([0.0, *(column.score for column in columns if column.score is not None)])

    def y(value: float) -> float:
        return 52 + PLOT * (1 - (min(value, 1.0) - low) / (1 - low))

    for step in range(int(np.ceil(low * 4)), 5):
        pen.line((AXIS, y(step / 4), AXIS + across, y(step / 4)), fill=CARD if step else EMPTY)
        pen.text((AXIS - 8, y(step / 4)), f"{step / 4:.2f}", fill=FAINT, font=_font(12), anchor="rm")
    for index, column in enumerate(columns):
        _draw_column(chart, column, AXIS + index * width, width, y)
    _draw_lines(pen, [(threshold, "threshold", WORDS, 0), (floor, "strangers", OTHER, 8)], AXIS + across, y)
    for index, column in enumerate(columns):
        _label(pen, column, AXIS + (index + 0.5) * width, width, y)
    return _tensor(chart)


def _draw_lines(pen: ImageDraw.ImageDraw, marks: Sequence[tuple], end: int, y: Callable[[float], float]) -> None:
    """A line for each (value, name, colour, gap) with a value, and beside it what it is."""
    placed: list[float] = []
    for value, name, color, gap in marks:
        if value is None:
            continue
        _line(pen, AXIS, end, y(value), color, gap)
        beside = y(value) + (16 if any(abs(y(value) - other) < 16 for other in placed) else 0)
        placed.append(beside)
        pen.text((end + 8, beside), f"{name} {value:.2f}", fill=color, font=_font(12), anchor="lm")


def _label(pen: ImageDraw.ImageDraw, column: Column, middle: float, width: int, y: Callable[[float], float]) -> None:
    words, color, top, size = "no face", LEFT_OUT, y(0.0), min(12, width // 4)
    if column.score is not None:
        words, color, top = f"{column.score:.2f}", WORDS, min(y(column.score), y(0.0))
        size = min(13, width // 3 + 2)
    pen.text((middle, top - 9), words, color, _font(size), "mm", stroke_width=2, stroke_fill=GROUND)


def _draw_column(chart: Image.Image, column: Column, left: int, width: int, y: Callable[[float], float]) -> None:
    pen = ImageDraw.Draw(chart)
    color = KEPT if column.passed else EMPTY
    middle, inset = left + width / 2, max(2, width // 10)
    if column.score is not None:
        top, bottom = sorted((y(column.score), y(0.0)))
        pen.rectangle((left + inset, top, left + width - inset, bottom), fill=color)
    side = width - 2 * inset
    top = 52 + PLOT + MARGIN
    chart.paste(_close_up(column.photo, column.box, side), (left + inset, top))
    if column.passed:
        pen.rectangle((left + inset - 1, top - 1, left + width - inset, top + side), outline=KEPT, width=2)
    ink = WORDS if column.passed else FAINT
    pen.text((middle, top + side + 14), str(column.number), fill=ink, font=_font(min(13, width // 2)), anchor="mm")


def _line(pen: ImageDraw.ImageDraw, start: int, end: int, y: float, color: tuple[int, int, int], gap: int) -> None:
    """A horizontal line, dashed where there is a gap."""
    if not gap:
        pen.line((start, y, end, y), fill=color, width=2)
        return
    for x in range(start, end, 2 * gap):
        pen.line((x, y, min(x + gap, end), y), fill=color, width=2)


# --- Who is where ---


def draw_people(photo: Photo, masks: Tensor, boxes: Sequence[Sequence[float]]) -> Tensor:
    """The picture with each person's mask (R, H, W), box in 0..1 and number, each in a colour: (H, W, 3) uint8."""
    height, width = masks.shape[1:]
    picture = np.asarray(Image.fromarray(photo).resize((width, height), Image.Resampling.LANCZOS)).astype(np.float32)
    colors = list(islice(cycle(PEOPLE), len(boxes)))
    inked = picture * 0.6
    for mask, color in zip(masks.numpy()[..., None], colors, strict=True):
        inked += mask * (0.4 * picture + 0.45 * (np.array(color, dtype=np.float32) - picture))
    drawn = Image.fromarray(inked.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    size = max(14, min(width, height) // 22)
    for number, (box, color) in enumerate(zip(boxes, colors, strict=True), start=1):
        x0, y0, x1, y1 = (value * side for value, side in zip(box, (width, height) * 2, strict=True))
        pen.rounded_rectangle((x0, y0, x1, y1), size // 3, outline=color, width=max(2, size // 10))
        middle = (x0 + x1) / 2, min(max(y0, size * 0.75), height - size * 0.75)
        pen.ellipse(
            (middle[0] - size * 0.7, middle[1] - size * 0.7, middle[0] + size * 0.7, middle[1] + size * 0.7), fill=color
        )
        pen.text(middle, str(number), fill=GROUND, font=_font(size), anchor="mm")
    return _tensor(drawn)
