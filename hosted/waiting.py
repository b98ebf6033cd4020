"""Waiting for a request: asking where it stands, telling how far it is, and giving up at the user's limits."""

import itertools
import logging
from dataclasses import dataclass
from typing import Any

from ..pulid.errors import HostedLimit, Refused
from .client import DONE, QUEUED, RUNNING, Status, Ticket, failed_job
from .service import Progress, Service
from .wording import reported_failure

POLL_SECONDS = (0.5, 1.0, 2.0, 3.0)  # pauses between two questions; the last one stays

logger = logging.getLogger(__package__)  # one logger, which keeps keys out


@dataclass(frozen=True)
class Limits:
    """Seconds to wait in the queue, for the run, and altogether."""

    queue: float = 300
    run: float = 600
    total: float = 900


async def wait(ticket: Ticket, limits: Limits, at: Service) -> tuple[Any, Status]:
    """The JSON of the result, and the last status. Raises JobFailed, HostedLimit, Refused."""
    began, running, seen = at.now(), None, 0
    for pause in itertools.chain(POLL_SECONDS, itertools.repeat(POLL_SECONDS[-1])):
        status = await at.client.status(ticket)
        for line in status.logs[seen:]:
            logger.info("request %s: %s", ticket.request_id, line)
        seen = max(seen, len(status.logs))
        if status.done and (data := await _result(ticket, status, at)) is not None:
            return data, status
        if running is None and status.state != QUEUED:
            running = at.now()
        at.report(_progress(ticket, status, at.now() - (began if running is None else running)))
        _check_limits(ticket, limits, began, running, at.now())
        await at.watch.pause(pause)
    raise AssertionError("the pauses never end")


async def _result(ticket: Ticket, status: Status, at: Service) -> Any | None:
    """The JSON of a finished request, None while it is not there yet. A reported error counts in any case."""
    try:
        data = await at.client.result(ticket)
    except Refused:
        if not status.failed:
            raise
        data = None
    if status.failed:
        raise failed_job(reported_failure(status.error, status.error_type), ticket.request_id)
    return data


def _progress(ticket: Ticket, status: Status, seconds: float) -> Progress:
    last = f": {status.logs[-1]}" if status.logs else ""
    named = f" (request {ticket.request_id})"
    if status.state == QUEUED:
        position = "" if status.position is None else f", {status.position} before it"
        return Progress(2, f"queued {seconds:.0f} s{position}{named}")
    known = "" if status.state in (RUNNING, DONE) else f" in the unknown state {status.state[:40]!r}"
    return Progress(3, f"running {seconds:.0f} s{known}{last}{named}")


def _check_limits(ticket: Ticket, limits: Limits, began: float, running: float | None, now: float) -> None:
    spans = (
        ("in the queue", "queue_limit", limits.queue, now - began if running is None else 0),
        ("for the run", "run_limit", limits.run, 0 if running is None else now - running),
        ("altogether", "total_limit", limits.total, now - began),
    )
    for what, name, limit, span in spans:
        if span > limit:
            raise HostedLimit(f"Waited {limit:g} s {what} ({name}) for request {ticket.request_id}, which is not done.")
