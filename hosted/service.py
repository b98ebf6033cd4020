"""Puts the parts of the hosted client together for one event loop, from the environment and one folder."""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..pulid.errors import InputError
from .addresses import PREFIX, Addresses
from .client import QueueClient
from .download import Downloader, public_only
from .journal import Guard, Journal
from .keys import find_key, quieten
from .patience import Watch
from .results import Results
from .storage import Storage
from .transport import DEFAULT_TERMS, AiohttpTransport, Terms

KEY_FILE, JOURNAL_FILE, RESULTS_FOLDER = "fal.toml", "hosted.sqlite", "results"
AT_ONCE = 2  # what a new account may have running
STEPS = 5  # of progress: sent, queued, running, finished, fetched


@dataclass(frozen=True)
class Progress:
    """How far a request is, in steps of STEPS and in words."""

    step: int
    words: str


@dataclass(frozen=True)
class Service:
    """All that a job needs, for one event loop.

    account  tells the digests of different accounts apart
    slots    how many requests may be under way at once, over all threads
    watch    sees when the user wants to stop
    report   is told about progress, often
    """

    client: QueueClient
    storage: Storage
    downloader: Downloader
    journal: Journal
    results: Results
    account: str
    slots: threading.Semaphore
    watch: Watch
    report: Callable[[Progress], None]
    now: Callable[[], float] = time.monotonic


@asynccontextmanager
async def open_service(
    environ: Mapping[str, str], folder: Path, stop: Callable[[], bool], report: Callable[[Progress], None]
):
    """A Service whose connections close at the end. Raises MissingKey, UnsafeAddress, InputError; nothing is sent then.

    environ  where the addresses, the key and the numbers come from
    folder   of the key file, the journal and the pictures; nobody else may read it
    """
    addresses = Addresses.from_environment(environ)
    key = None
    if addresses.proxy is None:
        key = find_key(environ, folder / KEY_FILE)
        quieten(key)
    watch, terms = Watch(stop), Terms(number(environ, "ANSWER_SECONDS", DEFAULT_TERMS.seconds))
    journal = Journal(folder / JOURNAL_FILE)
    async with AiohttpTransport() as own, AiohttpTransport(public_only(addresses)) as foreign:
        client = QueueClient(own, addresses, key, terms, watch.pause)
        yield Service(
            client,
            Storage(client, foreign, journal),
            Downloader(foreign, addresses, watch.pause),
            journal,
            Results(folder / RESULTS_FOLDER),
            account=key.account if key else f"proxy {addresses.proxy}",
            slots=_slots(int(number(environ, "AT_ONCE", AT_ONCE))),
            watch=watch,
            report=report,
        )


def guard(environ: Mapping[str, str], lifted: bool) -> Guard:
    """How many pictures may be asked for, from the environment."""
    per_run, per_day = (
        number(environ, "PICTURES_PER_RUN", Guard.per_run),
        number(environ, "PICTURES_PER_DAY", Guard.per_day),
    )
    return Guard(int(per_run), int(per_day), lifted)


def number(environ: Mapping[str, str], name: str, default: float) -> float:
    """A positive number of the environment. Raises InputError."""
    text = environ.get(f"{PREFIX}{name}", "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise InputError(f"{PREFIX}{name} is a positive number, found {text!r}.")
    return value


@cache
def _slots(at_once: int) -> threading.Semaphore:
    """One for the whole process: event loops come and go with each run of a workflow."""
    return threading.BoundedSemaphore(max(1, at_once))
