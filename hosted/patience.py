"""When to ask again, and how to stop: repeats with growing pauses, and waiting that the user can break off."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from ..pulid.errors import AnswerLost, Interrupted, Unreachable
from .transport import Reply

REPEATS = 6  # of a call that may be repeated
LONGEST_PAUSE = 10.0  # seconds between two of them
PASSING = (429, 502, 503, 504)  # statuses that may be over in a moment
PEEK_SECONDS = 0.2  # how long it takes at most until a wish to stop is seen

Sleep = Callable[[float], Awaitable[None]]
T = TypeVar("T")


def is_passing(reply: Reply) -> bool:
    return reply.status in PASSING


async def repeated(
    send: Callable[[], Awaitable[Reply]], sleep: Sleep, passing: Callable[[Reply], bool] = is_passing
) -> Reply:
    """The answer of a call that may be made several times; asks again after a lost one and after a passing failure."""
    for attempt in range(REPEATS):
        try:
            reply = await send()
            if not passing(reply):
                return reply
            pause = retry_after(reply, attempt)
        except (Unreachable, AnswerLost):
            pause = backoff(attempt)
        await sleep(min(pause, LONGEST_PAUSE))
    return await send()


def retry_after(reply: Reply, attempt: int) -> float:
    """Seconds that the service asks to wait, or our own where it does not say."""
    try:
        return max(0.0, float(reply.headers.get("retry-after", "")))
    except ValueError:
        return backoff(attempt)


def backoff(attempt: int) -> float:
    """0.5 s, doubled each time, with up to half of it left to chance so that many clients do not come at once."""
    return min(LONGEST_PAUSE, 0.5 * 2**attempt) * random.uniform(0.5, 1)


class Watch:
    """Waits for things as long as the user wants to.

    stop  says whether the user wants to stop; it is asked often, and may be asked from any thread
    """

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
