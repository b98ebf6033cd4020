"""The folder of a run: pictures, one line of manifest.jsonl for each job, cards of the people, contact sheets.

A picture is written aside and renamed, and stands in the manifest only after that. So whatever ends the run, nothing is
half-written, and a job that is in the manifest is done.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageFont

from . import BatchError
from .plan import Job, card_name

MANIFEST, SENT = "manifest.jsonl", "sent.jsonl"
PICTURES, PEOPLE = "pictures", "people"
TILE, LINE, COLUMNS, ROWS = 192, 20, 10, 10  # px, px, and tiles on a sheet
SHOWN = {".png", ".jpg", ".jpeg", ".webp"}


class Output:
    """A context manager: while it is entered, no other run has the folder.

    paid  what was sent and not finished is never sent again
    """

    def __init__(self, folder: Path, paid: bool = False):
        self.folder, self.paid = folder, paid
        self.entries: dict[str, dict[str, Any]] = {}  # job id -> its line

    def __enter__(self) -> "Output":
        for folder in (PICTURES, PEOPLE):
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / ".lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise BatchError(f"Another run has {self.folder}. Wait for it, or give --out another folder.") from None
        try:
            for part in self.folder.glob("*/.*.part"):
                part.unlink()
            self._read()
        except BaseException:
            self.lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def _read(self) -> None:
        """Take over what an earlier run finished; what failed there is tried again, unless it costs money."""
        entries = {entry["id"]: entry for entry in lines_of(self.folder / MANIFEST)}
        if self.paid:
            for sent in lines_of(self.folder / SENT):
                words = "was sent when the run ended, and may have been paid for: it is not sent again"
                entries.setdefault(sent["id"], {**sent, "files": [], "error": words})
        self.entries = {key: entry for key, entry in entries.items() if self.paid or not entry["error"]}
        text = "".join(line(entry) for entry in self.entries.values())
        self._write(self.folder / MANIFEST, text.encode())

    def is_done(self, job: Job) -> bool:
        return job.id in self.entries

    def sending(self, job: Job) -> None:
        """Note that a job that costs money is about to be sent; returns when that is on the disk."""
        append(self.folder / SENT, {"id": job.id, "row": job.row})

    def keep(self, job: Job, seed: Any, outcome: dict[str, Any]) -> None:
        """Write a job's pictures and its line in the manifest; of a job that failed, the line."""
        files, pictures = [], outcome.get("pictures", ())
        for number, (name, content) in enumerate(pictures, 1):
            count = f"_{number}" if len(pictures) > 1 else ""
            path = Path(PICTURES, f"{job.row:0>5}_{job.id[:8]}{count}{Path(name).suffix}")
            self._write(self.folder / path, content)
            files.append(path.as_posix())
        entry = {"id": job.id, "row": job.row, "seed": seed, "files": files, "seconds": outcome.get("seconds")}
        entry |= {"worker": outcome.get("worker"), "error": outcome.get("error")}
        append(self.folder / MANIFEST, entry)
        self.entries[job.id] = entry

    def card(self, encoding: str) -> Path:
        return self.folder / PEOPLE / card_name(encoding)

    def keep_card(self, encoding: str, content: bytes) -> None:
        self._write(self.card(encoding), content)

    def _write(self, path: Path, content: bytes) -> None:
        part = path.with_name(f".{path.name}.part")
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    def write_sheets(self, jobs: Iterable[Job]) -> list[Path]:
        """Contact sheets of these jobs' pictures in their order, a hundred on each; returns their paths."""
        shown = [
            (job.row, self.folder / file) for job in jobs for file in self.entries.get(job.id, {}).get("files", ())
        ]
        shown = [(row, path) for row, path in shown if path.suffix.lower() in SHOWN and path.is_file()]
        for old in self.folder.glob("contact_sheet_*.jpg"):
            old.unlink()
        paths: list[Path] = []
        for start in range(0, len(shown), COLUMNS * ROWS):
            paths.append(self.folder / f"contact_sheet_{len(paths) + 1:03}.jpg")
            draw_sheet(shown[start : start + COLUMNS * ROWS]).save(paths[-1], quality=88)
        return paths


def draw_sheet(shown: list[tuple[str, Path]]) -> Image.Image:
    """Each picture small, above the row that it is of."""
    columns, rows = min(COLUMNS, len(shown)), -(-len(shown) // COLUMNS)
    sheet = Image.new("RGB", (columns * TILE, rows * (TILE + LINE)), (250, 250, 250))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for index, (row, path) in enumerate(shown):
        left, top = index % COLUMNS * TILE, index // COLUMNS * (TILE + LINE)
        with Image.open(path) as picture:
            picture.thumbnail((TILE - 4, TILE - 4))
            sheet.paste(
                picture.convert("RGB"), (left + (TILE - picture.width) // 2, top + (TILE - picture.height) // 2)
            )
        pen.text((left + 4, top + TILE), f"row {row}", (60, 60, 60), font)
    return sheet


def line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def append(path: Path, entry: dict[str, Any]) -> None:
    """Returns when the line is on the disk."""
    with path.open("ab") as file:
        file.write(line(entry).encode())
        file.flush()
        os.fsync(file.fileno())


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The entries of a file of lines; a last one that was cut short, as by a crash, is left out."""
    if not path.is_file():
        return []
    *whole, _ = path.read_bytes().split(b"\n")
    try:
        return [json.loads(each) for each in whole]
    except ValueError as error:
        raise BatchError(f"{path} is damaged: {error}. Mend that line, or move the file away to begin anew.") from error
