"""Runs something slow in a thread beside ComfyUI's own work, so that other nodes keep running meanwhile.

A node that samples blocks the host's event loop, and each run of a workflow has a new one: so the waiting has a thread
and a loop of its own. Facts of the host: `execution.py`, `comfy/model_management.py`.
"""

import asyncio
import concurrent.futures
import contextvars
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from comfy.model_management import InterruptProcessingException, processing_interrupted
from comfy_execution.progress import get_progress_state

from ..hosted.errors import Interrupted
from ..hosted.service import STEPS, Report
from . import host

LOOK_SECONDS = 0.2  # between two looks at the thread's progress
GRACE_SECONDS = 0.2  # that an interrupted node waits for its thread, which then goes on alone to call things off
TEAR_DOWN_SECONDS = 10  # that it waits when the host tears everything down

T = TypeVar("T")
Work = Callable[[Callable[[], bool], Report], Coroutine[Any, Any, T]]


async def run_in_background(work: Work[T], node_id: str) -> T:
    """Run `work(stop, report)` in a thread; show what it reports on the node; stop it when the user interrupts.

    The interrupt is looked at and never cleared, since other nodes look at it too. Raises InterruptProcessingException
    for an interrupt, and whatever `work` raises.
    """
    left, display = threading.Event(), _Display(node_id)
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()  # from here on, nobody can cancel it but `left`

    def run() -> None:
        try:
            future.set_result(asyncio.run(work(lambda: left.is_set() or processing_interrupted(), display.report)))
        except BaseException as error:
            future.set_exception(error)

    # A daemon: ComfyUI may end at any time, and the journal knows what to do then.
    threading.Thread(target=contextvars.copy_context().run, args=[run], daemon=True, name="pulid-hosted").start()
    waited = asyncio.wrap_future(future)
    try:
        while not waited.done() and not processing_interrupted():
            await asyncio.wait({waited}, timeout=LOOK_SECONDS)
            display.refresh()
        if not waited.done():
            await asyncio.wait({waited}, timeout=GRACE_SECONDS)
            display.refresh()
        return _outcome(waited)
    except asyncio.CancelledError:  # another node failed, and the host tears everything down
        left.set()
        await asyncio.wait({waited}, timeout=TEAR_DOWN_SECONDS)
        raise
    finally:
        left.set()  # the host forgets an interrupt when its next run starts; the thread must not
        if not waited.cancel():
            waited.exception()  # asyncio complains of an error that nobody has looked at


def _outcome(waited: asyncio.Future[T]) -> T:
    try:
        if waited.done():
            return waited.result()
    except Interrupted:
        pass
    raise InterruptProcessingException()


class _Display:
    """The newest progress, written by the thread and shown by the host's loop."""

    def __init__(self, node_id: str) -> None:
        self.node_id = node_id
        self._newest: tuple[int, str] | None = None
        self._seen: tuple[int, str] | None = None

    def report(self, step: int, words: str) -> None:
        self._newest = step, words

    def refresh(self) -> None:
        progress = self._newest
        if progress is not None and progress != self._seen:
            self._seen = progress
            step, words = progress
            host.say(words, self.node_id)
            # Not comfy.utils.ProgressBar, which clears the interrupt while it looks at it.
            get_progress_state().update_progress(self.node_id, step, STEPS)
