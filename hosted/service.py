"""Puts the parts of the hosted client together for one event loop, from the environment and one folder."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from ..pulid.errors import InputError
from .endpoints import PREFIX, Endpoints, find_key, quieten
from .errors import Interrupted
from .journal import Guard, Journal
from .pictures import PictureFetcher, PictureStore
from .queue import QueueClient
from .references import ReferenceStorage
from .transport import DEFAULT_TERMS, AiohttpTransport, Terms

KEY_FILE, JOURNAL_FILE, PICTURES_FOLDER = "fal.toml", "hosted.sqlite", "results"
AT_ONCE = 2  # what a new account may have running
STEPS = 5  # of progress: sent, queued, running, finished, fetched
PEEK_SECONDS = 0.2  # how long it takes at most until a wish to stop is seen

T = TypeVar("T")


@dataclass(frozen=True)
class JobProgress:
    """How far a request is, in steps of STEPS and in words."""

    step: int
    words: str


class Watch:
    """Waits for things as long as the user wants to; `stop` is asked often, and may be asked from any thread."""

    def __init__(self, stop: Callable[[], bool] = lambda: False):
        self._stop, self._finishing = stop, False

    def check(self) -> None:
        """Raises Interrupted when the user wants to stop."""
        if not self._finishing and self._stop():
            raise Interrupted("Stopped by the user.")

    def finish(self) -> None:
        """From now on, what is left to do is done to its end."""
        self._finishing = True

    async def pause(self, seconds: float) -> None:
        """Sleep, or raise Interrupted as soon as the user wants to stop."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        self.check()
        while (left := until - loop.time()) > 0:
            await asyncio.sleep(min(left, PEEK_SECONDS))
            self.check()

    async def over(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled and answered with Interrupted when the user wants to stop."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                self.check()
                await asyncio.wait({task}, timeout=PEEK_SECONDS)
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@dataclass(frozen=True)
class Service:
    """All that a job needs, for one event loop."""

    client: QueueClient
    storage: ReferenceStorage
    fetcher: PictureFetcher
    journal: Journal
    store: PictureStore
    account: str  # a name of it, for the digests of its requests
    slots: threading.Semaphore  # for requests under way at once, over all threads
    watch: Watch
    report: Callable[[JobProgress], None]  # is told about progress, often
    now: Callable[[], float] = time.monotonic
    poll_seconds: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0)  # pauses between two questions; the last one stays


@asynccontextmanager
async def open_service(
    environ: Mapping[str, str], folder: Path, watch: Watch, report: Callable[[JobProgress], None]
) -> AsyncIterator[Service]:
    """A Service whose connections close at the end. Raises MissingKey, UnsafeAddress, InputError; nothing is sent then.

    environ  where the addresses, the key and the numbers come from
    folder   of the key file, the journal and the pictures; nobody else may read it
    """
    endpoints = Endpoints.from_environment(environ)
    key = None
    if endpoints.proxy is None:
        key = find_key(environ, folder / KEY_FILE)
        quieten(key)
    terms = Terms(read_number(environ, "ANSWER_SECONDS", DEFAULT_TERMS.seconds))
    journal = Journal(folder / JOURNAL_FILE)
    async with AiohttpTransport() as own, AiohttpTransport(public=True) as foreign:
        client = QueueClient(own, endpoints, key, terms, watch.pause)
        yield Service(
            client,
            ReferenceStorage(client, foreign, journal),
            PictureFetcher(foreign, endpoints, watch.pause),
            journal,
            PictureStore(folder / PICTURES_FOLDER),
            account=key.account if key else f"proxy {endpoints.proxy}",
            slots=_slots(int(read_number(environ, "AT_ONCE", AT_ONCE))),
            watch=watch,
            report=report,
        )


def read_guard(environ: Mapping[str, str], lifted: bool) -> Guard:
    """How many pictures may be asked for, from the environment."""
    per_run = read_number(environ, "PICTURES_PER_RUN", Guard.per_run)
    return Guard(int(per_run), int(read_number(environ, "PICTURES_PER_DAY", Guard.per_day)), lifted)


def read_number(environ: Mapping[str, str], name: str, default: float) -> float:
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
