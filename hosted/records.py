"""What is kept of hosted requests on this machine: lists it, and forgets it. The standard library only, for run.py."""

import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ..pulid.errors import InputError
from .journal import DAY, OPEN, Journal, Row

JOURNAL_FILE, PICTURES_FOLDER = "hosted.sqlite", "results"
CHOICES: dict[str, Callable[[Row], bool]] = {
    "open": lambda row: row.state in OPEN,
    "unknown": lambda row: row.state == "AMBIGUOUS",
    "all": lambda row: True,
}
NEXT = {  # what to do with a request in this state
    "PREPARED": "is being sent, or was when its sender ended; queue its prompt again to learn which",
    "AMBIGUOUS": "may have been accepted and billed: look at fal.ai/dashboard/requests; forget it if it is not there",
    "SUBMITTED": "under way: fetch it, or cancel it",
    "CANCEL_REQUESTED": "asked to stop: fetch it in case that it went on, or forget it",
    "COMPLETED": "finished: fetch it",
    "DOWNLOADED": "finished, and its pictures are kept here: fetch it, or forget it",
    "FAILED": "over; forget it",
}


def rows(folder: Path) -> list[Row]:
    """All requests of a private folder, the newest first."""
    return Journal(folder / JOURNAL_FILE).rows()


def age(row: Row, now: float) -> str:
    seconds = max(0, int(now - row.created))
    return next(
        (f"{seconds // size} {unit}" for unit, size in (("d", DAY), ("h", 3600), ("min", 60)) if seconds >= size),
        f"{seconds} s",
    )


def listing(requests: Iterable[Row], choice: str = "all") -> str:
    """A line for each request: id, age, pictures, and what to do with it."""
    now = time.time()
    pictures = ("{} pictures", "{} picture")
    lines = [
        f"{row.id}  {age(row, now)} ago  {pictures[row.pictures == 1].format(row.pictures)}  {NEXT[row.state]}"
        for row in requests
        if CHOICES[choice](row)
    ]
    return "\n".join(lines) or "No such request is known on this machine."


def seconds_of(text: str) -> float:
    """30d, 12h -> seconds. Raises InputError."""
    size = {"d": DAY, "h": 3600}.get(text[-1:])
    if size is None or not text[:-1].isdecimal():
        raise InputError(f"A span of time looks like 30d or 12h, found {text!r}.")
    return int(text[:-1]) * size


def forget(folder: Path, ids: Iterable[str] = (), older_than: float | None = None) -> int:
    """Delete rows, kept pictures and with them prompts: of these ids, or of all that are older than so many seconds.

    What the guard counts stays, as a number, for a day. Returns how many requests were forgotten.
    """
    journal, now, names = Journal(folder / JOURNAL_FILE), time.time(), set(ids)
    chosen = [
        row
        for row in rows(folder)
        if names & {row.request_id, row.name} or (older_than is not None and now - row.created >= older_than)
    ]
    for row in chosen:
        shutil.rmtree(folder / PICTURES_FOLDER / row.id, ignore_errors=True)
        journal.forget(row.name)
    return len(chosen)
