"""One hosted request from its values to its pictures: look, send once, wait, fetch, keep, and call it off if need be.

Nothing below `submit` ever sends a request that costs money, so asking again is always safe.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from ..pulid.errors import (
    AmbiguousSubmit,
    AnswerLost,
    BadAnswer,
    HostedError,
    HostedLimit,
    Interrupted,
    JobCancelled,
    JobFailed,
    Refused,
    Unreachable,
    UnsafeAddress,
)
from .api import HostedRequest, read_answer
from .client import GOES_ON, Cancelled, Status, SubmitOptions, Ticket
from .journal import (
    AMBIGUOUS,
    CANCEL_REQUESTED,
    COMPLETED,
    DOWNLOADED,
    FAILED,
    HEARTBEAT_SECONDS,
    SUBMITTED,
    Guard,
    Row,
    refuse_ambiguous,
)
from .patience import PEEK_SECONDS
from .results import Outcome
from .service import STEPS, Progress, Service
from .storage import Reference
from .telling import describe, remarks, shown_request
from .waiting import Limits, wait

CALL_OFF_SECONDS = 60  # to fetch what was finished before it could be called off

logger = logging.getLogger(__package__)  # one logger, which keeps keys out


@dataclass(frozen=True)
class Job:
    """A request and what surrounds it.

    request  its reference_images are the digests of `references`; addresses take their place when it is sent
    run      names the run of a workflow within which the guard counts
    """

    request: HostedRequest
    references: tuple[Reference, ...]
    options: SubmitOptions
    guard: Guard
    run: str
    transport: str = "auto"
    limits: Limits = field(default_factory=Limits)
    force: bool = False


# --- The page ---


async def generate(job: Job, at: Service) -> Outcome:
    """The pictures of a request, which is sent only if no equal one is finished or under way. Raises HostedError."""
    if kept := _kept(job, at):
        return kept
    with _Place(at) as place:
        row = await submit(job, at, place)
        try:
            return await at.watch.over(collect(row, row.ticket, job.limits, at, job))
        except (Interrupted, HostedLimit, asyncio.CancelledError) as stopped:
            place.free()
            return await _call_off(row, stopped, at)
        except JobCancelled:
            if row.state != CANCEL_REQUESTED or at.journal.find(row.digest):
                raise
    return await generate(job, at)  # the user had called that one off, it has ended, and they ask again


async def submit(job: Job, at: Service, place: "_Place") -> Row:
    """The accepted request that equals this one: a standing one, or one that is sent now, once, and takes a place."""
    digest, pictures = job.request.digest(at.account), job.request.num_images
    row = None if job.force else at.journal.find(digest)
    if row is None:
        at.journal.check(job.run, pictures, job.guard)
        at.report(Progress(0, f"sending {len(job.references)} reference pictures"))
        urls = await at.watch.over(at.storage.place(job.references, job.transport, job.limits.queue))
        await place.take()
        row = at.journal.claim(digest, job.run, pictures, job.request.seed is not None, job.guard, job.force)
        if row.fresh:
            return await _send(row, replace(job.request, reference_images=urls), job.options, at)
        place.free()
    return await _join(row, at)


async def order(job: Job, at: Service) -> Ticket:
    """The ticket of an accepted request, without waiting for it. Raises HostedError."""
    with _Place(at) as place:
        row = await submit(job, at, place)
    try:
        at.watch.check()
    except Interrupted as stopped:
        await _call_off(row, stopped, at)
    return row.ticket


async def status(request_id: str, logs: bool, at: Service) -> Status:
    """Where a request stands of which only the id is known."""
    return await at.watch.over(at.client.status(at.client.ticket(request_id), logs))


async def upload(references: Sequence[Reference], seconds: int, at: Service) -> list[str]:
    """The address of each photograph in the service's storage, which deletes it after so many seconds."""
    return [await at.watch.over(at.storage.upload(reference, seconds, seconds / 2)) for reference in references]


async def fetch(request_id: str, limits: Limits, at: Service) -> Outcome:
    """The pictures of a request of which only the id is known, waiting for them if need be."""
    ticket = at.client.ticket(request_id)
    row = _known(ticket, at)
    if kept := at.results.get(ticket.request_id):
        return kept
    try:
        return await at.watch.over(collect(row, row.ticket if row else ticket, limits, at))
    except HostedLimit as error:
        raise HostedLimit(f"{error} It goes on at the service: run this again to fetch its pictures.") from None


async def cancel(request_id: str, at: Service) -> Cancelled:
    """Ask the service to stop a request of which only the id is known."""
    ticket = at.client.ticket(request_id)
    row = _known(ticket, at)
    claimed = row is not None and _may_cancel(row, at)
    cancelled = await at.client.cancel(row.ticket if row else ticket)
    if claimed:
        _note_cancel(row, cancelled, at)
    return cancelled


async def collect(row: Row | None, ticket: Ticket, limits: Limits, at: Service, job: Job | None = None) -> Outcome:
    """Wait for a request, fetch its pictures and keep them.

    row, job  None for a request that is not in the journal, or whose values are not known here
    """
    began = at.now()
    with _nothing_is_lost(row, ticket, at):
        data, status = await wait(ticket, limits, at)
        waited = at.now()
        _move(row, COMPLETED, at)
        at.report(Progress(4, f"fetching the pictures (request {ticket.request_id})"))
        answer = read_answer(data)
        images, notes = await at.downloader.pictures(answer.images)
    timings = {"waited": round(waited - began, 3), "fetched": round(at.now() - waited, 3), **status.metrics}
    info = describe(ticket, answer, status, timings, notes)
    if job is not None:
        info["request"] = shown_request(job.request, job.references)
        info["notes"] += remarks(job.request, job.references, len(images))
    outcome = Outcome(images, answer.seed, ticket.request_id, info)
    if at.results.keep(ticket.request_id, outcome):
        _move(row, DOWNLOADED, at, seed=answer.seed)
    at.report(Progress(STEPS, f"done (request {ticket.request_id})"))
    return outcome


# --- Sending, once ---


def _kept(job: Job, at: Service) -> Outcome | None:
    if job.force or job.request.seed is None:
        return None
    row = at.journal.find(job.request.digest(at.account))
    if row is None:
        return None
    refuse_ambiguous(row)
    return at.results.get(row.ticket.request_id) if row.state == DOWNLOADED else None


async def _send(row: Row, request: HostedRequest, options: SubmitOptions, at: Service) -> Row:
    """The one place that spends money. It is not broken off by the user, so that its outcome is known."""
    beat = asyncio.ensure_future(_beat(row, at))
    try:
        ticket = await at.client.submit(request.body(), options)
    except HostedError as error:
        _move(row, AMBIGUOUS if isinstance(error, AmbiguousSubmit) else FAILED, at, str(error))
        raise
    except BaseException:
        _move(row, AMBIGUOUS, at, "ended while it was being sent")
        raise
    finally:
        beat.cancel()
    row = replace(row, state=SUBMITTED, ticket=ticket)
    _move(row, SUBMITTED, at)
    at.report(Progress(1, f"sent (request {ticket.request_id})"))
    return row


async def _beat(row: Row, at: Service) -> None:
    while True:
        await asyncio.sleep(HEARTBEAT_SECONDS)
        with suppress(HostedError):
            at.journal.alive(row)


async def _join(row: Row, at: Service) -> Row:
    """The row once it has a ticket; somebody else may just be sending it."""
    while row.ticket is None:
        refuse_ambiguous(row)
        at.report(Progress(0, "an equal request is just being sent; waiting for it"))
        await at.watch.pause(PEEK_SECONDS)
        row = at.journal.find(row.digest)
        if row is None:
            raise Refused(
                "An equal request that was being sent was not accepted. Queue the prompt again to send this one."
            )
    return row


class _Place:
    """One of the places for requests under way, from `take` to the end of the block; who joins another's needs none."""

    def __init__(self, at: Service):
        self._at, self._taken = at, False

    def __enter__(self) -> "_Place":
        return self

    def __exit__(self, *_) -> None:
        self.free()

    async def take(self) -> None:
        while not self._at.slots.acquire(blocking=False):
            self._at.report(Progress(0, "waiting for another hosted request to finish"))
            await self._at.watch.pause(PEEK_SECONDS)
        self._taken = True
        self._at.watch.check()

    def free(self) -> None:
        if self._taken:
            self._taken = False
            self._at.slots.release()


# --- Waiting ---


@contextmanager
def _nothing_is_lost(row: Row | None, ticket: Ticket, at: Service):
    """Notes a job that failed; says of every other failure that the request can still be asked about."""
    try:
        yield
    except JobFailed as error:
        _move(row, FAILED, at, str(error))
        raise
    except (AnswerLost, BadAnswer, Unreachable, UnsafeAddress) as error:
        raise type(error)(f"{error} Request {ticket.request_id} is not lost.{GOES_ON}") from None


def _known(ticket: Ticket, at: Service) -> Row | None:
    """What the journal knows of a request; a journal that cannot be read keeps nobody from asking the service."""
    with suppress(HostedError):
        return at.journal.by_request(ticket.request_id)
    return None


# --- Calling it off ---


async def _call_off(row: Row, stopped: BaseException, at: Service) -> Outcome:
    """Ask the service once to stop; what turns out to be finished is fetched and kept, since it is paid for."""
    at.watch.finish()
    if not _may_cancel(row, at):
        raise stopped
    at.report(Progress(3, f"calling it off (request {row.ticket.request_id})"))
    cancelled = await at.client.cancel(row.ticket)
    _note_cancel(row, cancelled, at)
    at.report(Progress(3, f"{cancelled.words} (request {row.ticket.request_id})"))
    logger.info("Request %s: %s", row.ticket.request_id, cancelled.words)
    if cancelled.outcome == "too late":
        with suppress(HostedError, asyncio.TimeoutError):  # it can still be fetched by its id
            outcome = await asyncio.wait_for(collect(row, row.ticket, Limits(), at), CALL_OFF_SECONDS)
            if isinstance(stopped, HostedLimit):
                return outcome
    if isinstance(stopped, HostedLimit):
        raise HostedLimit(f"{stopped} {cancelled.words}") from None
    raise stopped


def _may_cancel(row: Row, at: Service) -> bool:
    """True for the one who is to cancel. A journal that cannot be written keeps nobody from it."""
    try:
        return at.journal.claim_cancel(row)
    except HostedError:
        return True


def _note_cancel(row: Row, cancelled: Cancelled, at: Service) -> None:
    """What came of a cancel: only a request that never ran is over; every other one can still be asked about."""
    if cancelled.outcome == "removed":
        _move(row, FAILED, at, "cancelled before it ran")
    elif cancelled.outcome in ("not passed on", "no answer"):
        _move(row, SUBMITTED, at)


def _move(row: Row | None, state: str, at: Service, note: str = "", seed: str | None = None) -> None:
    """Note a step. A journal that cannot be written now must not cost pictures: the row then stays as it was."""
    if row is None:
        return
    try:
        at.journal.move(row, state, note, seed)
    except HostedError as error:
        logger.warning("Request %s is %s, but: %s", row.ticket.request_id if row.ticket else "", state, error)
