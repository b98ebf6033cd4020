"""Pictures that were paid for, kept on this disk: an equal request with its own seed needs no network.

Same seed and same values give the same picture only as long as the service runs the same version of its model.
"""

import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

LARGEST = 512 * 2**20  # bytes of all pictures together
logger = logging.getLogger(__package__)  # one logger, which keeps keys out


@dataclass(frozen=True)
class Outcome:
    """What a request gave. `info` can be written as JSON; it holds the seed as text, addresses, timings and notes."""

    images: tuple[Image.Image, ...]
    seed: str
    request_id: str
    info: dict[str, Any]


class Results:
    """A folder with one folder of PNG files per request; the ones not used for longest go first."""

    def __init__(self, folder: Path, largest: int = LARGEST):
        self.folder, self.largest = Path(folder), largest

    def get(self, name: str) -> Outcome | None:
        """The kept outcome, or None also where its files are damaged."""
        place = self.folder / name
        try:
            facts = json.loads((place / "outcome.json").read_text(encoding="utf-8"))
            images = tuple(_open(place / f"{number}.png") for number in range(facts["images"]))
            os.utime(place)
        except (OSError, ValueError, KeyError):
            return None
        return Outcome(images, facts["seed"], facts["request_id"], facts["info"])

    def keep(self, name: str, outcome: Outcome) -> bool:
        """False where the disk does not take it: the pictures are there all the same."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            place = Path(tempfile.mkdtemp(dir=self.folder))
            try:
                for number, image in enumerate(outcome.images):
                    image.save(place / f"{number}.png")
                facts = {"images": len(outcome.images), "seed": outcome.seed, "request_id": outcome.request_id}
                (place / "outcome.json").write_text(json.dumps({**facts, "info": outcome.info}), encoding="utf-8")
                shutil.rmtree(self.folder / name, ignore_errors=True)
                place.rename(self.folder / name)
            finally:
                shutil.rmtree(place, ignore_errors=True)
            self._shrink(keep=name)
        except OSError as error:
            logger.warning("The pictures of a hosted request could not be kept for later: %s", error)
            return False
        return True

    def _shrink(self, keep: str) -> None:
        places = sorted(
            (place for place in self.folder.iterdir() if place.is_dir()), key=lambda place: place.stat().st_mtime
        )
        sizes = {place: sum(file.stat().st_size for file in place.iterdir()) for place in places}
        total = sum(sizes.values())
        for place in places:
            if total > self.largest and place.name != keep:
                shutil.rmtree(place, ignore_errors=True)
                total -= sizes[place]


def _open(path: Path) -> Image.Image:
    with Image.open(io.BytesIO(path.read_bytes()), formats=["PNG"]) as image:
        return image.convert("RGB")


def as_batches(images: Sequence[Image.Image]) -> list[list[Image.Image]]:
    """Neighbours of one size together, so that no picture is lost or stretched where sizes differ."""
    batches: list[list[Image.Image]] = []
    for image in images:
        if batches and batches[-1][0].size == image.size:
            batches[-1].append(image)
        else:
            batches.append([image])
    return batches
