"""Puts the parts of the hosted client together, from the environment and one folder."""

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from ..pulid.errors import InputError
from .endpoints import PREFIX, Endpoints, find_key, quieten
from .errors import HostedError, HostedLimit, Interrupted
from .journal import JOURNAL_FILE, PICTURES_FOLDER, Journal
from .pictures import PICTURE_TERMS, PictureStore
from .queue import QueueClient
from .transport import TERMS, Terms, send

KEY_FILE, LOCKS_FOLDER = "fal.toml", "locks"
STEPS = 5  # of progress: sent, queued, running, finished, fetched
PEEK_SECONDS = 0.2  # how long it takes at most until a wish to stop is seen
SPANS = {"total": "altogether", "queue": "in the queue", "run": "for the run"}

T = TypeVar("T")
_slots = cache(threading.BoundedSemaphore)  # in this process: event loops come and go with each run of a workflow
Report = Callable[[int, str], None]  # is told how far a request is, in steps of STEPS and in words, often


@dataclass(frozen=True)
class Settings:
    """Numbers of the environment, each as PULID_FAL_ and its name; those of Guard (journal.py) stand there, too."""

    answer_seconds: float = TERMS.seconds
    at_once: float = 2  # what a new account may have running
    keep_mb: float = 512
    keep_days: float = 30


@dataclass(frozen=True)
class Limits:
    """Seconds to wait in the queue, for the run, and altogether."""

    queue: float = 300
    run: float = 600
    total: float = 900


class Watch:
    """Waits for things until the user stops it, which may be asked for from any thread, or a limit is reached."""

    def __init__(self, stop: Callable[[], bool] = lambda: False):
        self.stop = stop
        self.finishing = False  # what is left to do is done to its end, whatever the user wants
        self._since: dict[str, float] = {}  # a limit counts from its span's beginning on

    def begin(self, limits: Limits) -> None:
        """From now on these limits hold; before, there are none."""
        self._limits, self._since, self._request_id = limits, {"total": time.monotonic()}, ""

    def enter(self, span: str, request_id: str) -> float:
        """The accepted request is in the "queue", or in its "run", which it never leaves; for how many seconds."""
        self._request_id, span = request_id, "run" if "run" in self._since else span
        self._since = {"total": self._since["total"], span: self._since.get(span, time.monotonic())}
        return self.seconds(span)

    def seconds(self, span: str = "total") -> float:
        """Since this span began."""
        return time.monotonic() - self._since[span]

    def check(self) -> None:
        """Raises Interrupted when the user wants to stop, HostedLimit when they have waited as long as they wanted."""
        if self.finishing:
            return
        if self.stop():
            raise Interrupted("Stopped by the user.")
        for span in self._since:
            if self.seconds(span) > (limit := getattr(self._limits, span)):
                known = f"for request {self._request_id}, which is not done" if self._request_id else "and sent nothing"
                raise HostedLimit(f"Waited {limit:g} s {SPANS[span]} ({span}_limit) {known}.")

    async def pause(self, seconds: float) -> None:
        await self.over(asyncio.sleep(seconds))
        self.check()

    async def over(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled as soon as `check` raises."""
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
    """All that a job needs."""

    client: QueueClient
    journal: Journal
    store: PictureStore
    folder: Path
    slots: threading.Semaphore  # for requests under way at once, over all threads
    watch: Watch
    report: Report
    picture_terms: Terms = PICTURE_TERMS
    poll_seconds: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0)  # pauses between two questions; the last one stays

    async def take_place(self, place: ExitStack) -> None:
        """Wait for one of the places for requests under way; who joins another's request needs none."""
        while not self.slots.acquire(blocking=False):
            self.report(0, "waiting for another hosted request to finish")
            await self.watch.pause(PEEK_SECONDS)
        place.callback(self.slots.release)

    @asynccontextmanager
    async def alone_with(self, digest: str) -> AsyncIterator[None]:
        """While nobody else, in whatever process, looks for a request and sends it; the system frees it at a crash."""
        try:
            (self.folder / LOCKS_FOLDER).mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = FileLock(self.folder / LOCKS_FOLDER / f"{digest[:32]}.lock")
            while not lock.is_locked:
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    self.report(0, "an equal request is just being sent; waiting for it")
                    await self.watch.pause(PEEK_SECONDS)
        except (OSError, NotImplementedError) as error:
            raise HostedError(
                f"{LOCKS_FOLDER}/ beside the journal of hosted requests cannot be locked ({type(error).__name__}). It "
                "keeps a request from being paid for twice. Check the permissions of ComfyUI's user folder."
            ) from None
        try:
            yield
        finally:
            lock.release()


def open_service(environ: Mapping[str, str], folder: Path, watch: Watch, report: Report) -> Service:
    """Addresses, key and numbers as `environ` has them. Raises HostedError, InputError; nothing is sent then.

    The key file, the journal and the pictures lie in `folder`, which nobody else may read.
    """
    endpoints, settings, key = Endpoints.from_environment(environ), read_numbers(Settings, environ), None
    if endpoints.proxy is None:
        key = find_key(environ, folder / KEY_FILE)
        quieten(key)
    store = PictureStore(folder / PICTURES_FOLDER, settings.keep_mb * 2**20, settings.keep_days)
    store.shrink()
    client = QueueClient(send, endpoints, key, Terms(settings.answer_seconds), watch.pause)
    slots = _slots(max(1, int(settings.at_once)))
    return Service(client, Journal(folder / JOURNAL_FILE), store, folder, slots, watch, report)


def read_numbers(kind: type[T], environ: Mapping[str, str], **others: Any) -> T:
    """A dataclass whose numbers, all positive, are those of the environment where it has them. Raises InputError."""
    for field in fields(kind):  # type: ignore[arg-type]
        variable = f"{PREFIX}{field.name.upper()}"
        if field.name in others or not (text := environ.get(variable)):
            continue
        with suppress(ValueError):
            others[field.name] = float(text)
        if not 0 < others.get(field.name, 0) < math.inf:
            raise InputError(f"{variable} is a positive number, found {text!r}.")
    return kind(**others)
