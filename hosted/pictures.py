"""Pictures of the hosted service: fetched without being led anywhere else, decoded, and kept on this disk.

Fetching uses public https addresses only, checked again at every redirect, and no credentials; bytes, pixels and types
are limited before anything is decoded. What was paid for is kept: an equal request with its own seed needs no network.
(Same seed and same values give the same picture only as long as the service runs the same version of its model.)
"""

import asyncio
import base64
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from pydantic import BaseModel, Field

from .api import LARGEST_ANSWER, HostedImage, parse, read_answer
from .endpoints import check_address
from .errors import AnswerLost, BadAnswer, Gone, HostedError, Refused, clean
from .journal import DAY
from .queue import QueueClient
from .transport import Reply, Terms, repeated

REDIRECTS = 3
PICTURE_TERMS = Terms(seconds=120, idle=30, public=True)
TAIL = 2**16  # bytes at the end of a file
Kind = tuple[Callable[[io.BytesIO], Image.Image], Callable[[bytes], bool]]
KINDS: dict[bytes, Kind] = {  # by a file's first bytes: what reads it, and whether its end is there
    b"\x89PNG\r\n\x1a\n": (PngImageFile, lambda data: b"IEND" in data[-TAIL:]),
    b"\xff\xd8\xff": (JpegImageFile, lambda data: b"\xff\xd9" in data[-TAIL:]),
    b"RIFF": (WebPImageFile, lambda data: len(data) >= int.from_bytes(data[4:8], "little") + 8),
}

logger = logging.getLogger(__package__)  # one logger, which keeps keys out


async def fetch_all(
    client: QueueClient,
    images: Sequence[HostedImage],
    asked: int,
    terms: Terms = PICTURE_TERMS,  # of one picture, and all its tries together
    pixels: int = LARGEST_ANSWER,  # of all pictures together
) -> tuple[tuple[Image.Image, ...], list[str]]:
    """At most `asked` RGB pictures in order, and notes on what differs from what was asked for and announced.

    One that is damaged or gone is noted where others are left, and raised where none is.
    """
    pictures: list[Image.Image] = []
    notes: list[str] = []
    for number, image in enumerate(images[:asked], start=1):
        try:
            data, picture = await _picture(client, image, terms, pixels)
        except (BadAnswer, Gone) as error:
            notes.append(f"Picture {number} is missing: {error} Fetching the request by its id asks for it again.")
            if number == len(images[:asked]) and not pictures:
                raise
            continue
        pictures.append(picture)
        pixels -= picture.width * picture.height
        came = {"file_size": len(data), "width": picture.width, "height": picture.height}
        for what, value in came.items():
            if (told := getattr(image, what)) not in (None, value):
                notes.append(f"Picture {number}: {what} {told} was announced, {value} came.")
    if len(images) != asked:
        unread = "; the others were not read" if len(images) > asked else ""
        notes.append(f"{asked} pictures were asked for, {len(images)} came{unread}.")
    return tuple(pictures), notes


async def _picture(client: QueueClient, image: HostedImage, terms: Terms, pixels: int) -> tuple[bytes, Image.Image]:
    """Its bytes and what they show, from inside the answer, else from its address."""
    with suppress(BadAnswer) if image.url else nullcontext():
        if image.file_data:
            return (data := decode_data_uri(image.file_data)), decode(data, pixels)
    data = decode_data_uri(image.url) if image.url.startswith("data:") else await fetch(client, image.url, terms)
    return data, decode(data, pixels)


async def fetch(client: QueueClient, address: str, terms: Terms = PICTURE_TERMS) -> bytes:
    """The bytes behind an address; repeated where its failure may pass. Raises HostedError."""
    tries = repeated(lambda: _follow(client, address, terms), client.sleep)
    try:
        reply = await asyncio.wait_for(tries, terms.seconds)
    except asyncio.TimeoutError:
        raise AnswerLost(f"A picture did not arrive within {terms.seconds:g} s.") from None
    if reply.status in (404, 410):
        raise Gone("Its pictures have expired (they are kept for 7 days or longer) and cannot be fetched again.")
    if reply.status != 200:
        raise Refused(f"The picture could not be read (HTTP {reply.status}).")
    kind = reply.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if not kind.startswith("image/") and kind not in ("application/octet-stream", "binary/octet-stream"):
        raise BadAnswer(f"Expected a picture, found content of type {clean(kind, 60)!r}.")
    return reply.body


async def _follow(client: QueueClient, address: str, terms: Terms) -> Reply:
    url = check_address(address, client.endpoints)
    for _ in range(REDIRECTS + 1):
        reply = await client.send("GET", url, {"Accept": "image/*"}, terms=terms)
        if not 300 <= reply.status < 400 or "location" not in reply.headers:
            return reply
        url = check_address(reply.headers["location"], client.endpoints, base=url)
    raise HostedError(f"The service's picture was forwarded more than {REDIRECTS} times. It was not read.")


def decode_data_uri(uri: str) -> bytes:
    """The bytes of a base64 data URI, or of bare base64. Raises BadAnswer."""
    head, _, data = uri.rpartition(",")
    if head and not head.endswith(";base64"):
        raise BadAnswer("Expected a data URI with ;base64, found another kind.")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError:
        raise BadAnswer("A data URI is damaged: its base64 text cannot be read.") from None


def decode(data: bytes, largest_pixels: int = LARGEST_ANSWER) -> Image.Image:
    """PNG, JPEG or WebP bytes -> an RGB picture. Raises BadAnswer, before decoding where the size is too large."""
    kind = next((kind for start, kind in KINDS.items() if data.startswith(start)), None)
    if kind is None:
        raise BadAnswer("Expected a PNG, JPEG or WebP picture, found something else.")
    read, is_whole = kind
    try:
        # Not Image.open, whose own limit warns in some cases and says less in the others.
        with read(io.BytesIO(data)) as image:
            if image.width * image.height > largest_pixels:
                most = f"what this pack decodes of one answer ({LARGEST_ANSWER // 2**20} million pixels together)"
                raise BadAnswer(f"A picture of {image.width} x {image.height} pixels is larger than {most}.")
            if not is_whole(data):  # other packs may have told Pillow to fill what is missing with grey
                raise BadAnswer("A picture is damaged: its end is missing.")
            return image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB")
    except HostedError:
        raise
    except Exception as error:  # Pillow's are of every class, and warnings may be errors
        raise BadAnswer(f"A picture is damaged and could not be read ({type(error).__name__}).") from None


class Outcome(BaseModel, frozen=True, arbitrary_types_allowed=True):
    """What a request gave. `info` can be written as JSON; it holds the seed as text, addresses, timings and notes."""

    images: tuple[Image.Image, ...] = Field(exclude=True, min_length=1)
    seed: str
    request_id: str
    info: dict[str, Any]

    def with_notes(self, notes: list[str]) -> "Outcome":
        return self.model_copy(update={"info": {**self.info, "notes": self.info["notes"] + notes}})


@dataclass(frozen=True)
class PictureStore:
    """A folder with one folder of PNG files per request; where they are too large, the ones not used for longest go."""

    folder: Path
    largest: float = 512 * 2**20  # bytes of all
    days: float = 30  # that each stays

    def get(self, name: str) -> Outcome | None:
        """The kept outcome, or None also where its files are damaged."""
        place = self.folder / name
        try:
            facts = parse((place / "outcome.json").read_bytes())
            images = tuple(decode((place / f"{number}.png").read_bytes()) for number in range(facts["images"]))
            outcome = read_answer(Outcome, {**facts, "images": images})
            with suppress(OSError):  # a disk that can only be read
                os.utime(place)
        except (OSError, BadAnswer, TypeError, KeyError):
            return None
        return outcome if outcome.request_id == name and isinstance(outcome.info.get("notes"), list) else None

    def put(self, name: str, outcome: Outcome) -> bool:
        """False where the disk does not take it: the pictures are there all the same."""
        place = self.folder / name
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            place.mkdir(exist_ok=True)
            for number, image in enumerate(outcome.images):
                image.save(place / f"{number}.png")
            facts = {**outcome.model_dump(), "images": len(outcome.images)}
            (place / "outcome.json").write_text(json.dumps(facts), encoding="utf-8")  # the last one: now it is kept
            self.shrink(keep=name)
        except OSError as error:
            shutil.rmtree(place, ignore_errors=True)
            logger.warning("The pictures of a hosted request could not be kept for later: %s", error)
            return False
        return True

    def shrink(self, keep: str = "") -> None:
        """Drop what is too old or too much, as far as nobody else is just doing so."""
        with suppress(OSError):
            places = [place for place in self.folder.glob("*") if place.is_dir()]
            sizes = {place: sum(file.stat().st_size for file in place.iterdir()) for place in places}
            total = sum(sizes.values())
            for place in sorted(places, key=lambda place: place.stat().st_mtime):
                made = max((file.stat().st_mtime for file in place.glob("*.*")), default=time.time())
                if place.name != keep and (total > self.largest or time.time() - made > self.days * DAY):
                    shutil.rmtree(place, ignore_errors=True)
                    total -= sizes[place]
