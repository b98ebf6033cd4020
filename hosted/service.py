"""Puts the parts of the hosted client together for one event loop, from the environment and one folder."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from ..pulid.errors import InputError
from .endpoints import PREFIX, Endpoints, find_key, quieten
from .errors import HostedError, HostedLimit, Interrupted
from .journal import JOURNAL_FILE, PICTURES_FOLDER, Guard, Journal
from .pictures import PictureFetcher, PictureStore
from .queue import QueueClient
from .references import ReferenceStorage
from .transport import DEFAULT_TERMS, Terms, Transport

KEY_FILE, LOCKS_FOLDER = "fal.toml", "locks"
AT_ONCE = 2  # what a new account may have running
STEPS = 5  # of progress: sent, queued, running, finished, fetched
PEEK_SECONDS = 0.2  # how long it takes at most until a wish to stop is seen
SPANS = {"total": "altogether", "queue": "in the queue", "run": "for the run"}

T = TypeVar("T")
Report = Callable[[int, str], None]  # is told how far a request is, in steps of STEPS and in words, often


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
    """All that a job needs, for one event loop."""

    client: QueueClient
    storage: ReferenceStorage
    fetcher: PictureFetcher
    journal: Journal
    store: PictureStore
    folder: Path
    payer: str  # a name of the account
    slots: threading.Semaphore  # for requests under way at once, over all threads
    watch: Watch
    report: Report
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


@asynccontextmanager
async def open_service(
    environ: Mapping[str, str], folder: Path, watch: Watch, report: Report
) -> AsyncIterator[Service]:
    """A Service whose connections close at the end. Raises HostedError, InputError; nothing is sent then.

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
    largest, days = read_number(environ, "KEEP_MB", 512) * 2**20, read_number(environ, "KEEP_DAYS", 30)
    store = PictureStore(folder / PICTURES_FOLDER, largest, days)
    with suppress(OSError):
        store.shrink()
    async with Transport() as transport:
        client = QueueClient(transport, endpoints, key, terms, watch.pause)
        yield Service(
            client,
            ReferenceStorage(client, journal),
            PictureFetcher(client),
            journal,
            store,
            folder,
            payer=key.account if key else f"proxy {endpoints.proxy}",
            slots=_slots(int(read_number(environ, "AT_ONCE", AT_ONCE))),
            watch=watch,
            report=report,
        )


def read_guard(environ: Mapping[str, str], lifted: bool) -> Guard:
    """How many pictures may be asked for, from the environment; `lifted` is the user's word on a node."""
    names = ("per_run", "per_day", "ceiling_per_run", "ceiling_per_day")
    variables = {name: f"PICTURES_{name}" if name.startswith("per") else name for name in names}
    numbers = {name: int(read_number(environ, variables[name].upper(), getattr(Guard, name))) for name in names}
    return Guard(**numbers, lifted=lifted)


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
