"""One hosted request from its values to its pictures: look, send once, wait, fetch, keep, and call it off if need be.

Nothing below `submit` ever sends a request that costs money, so asking again is always safe.
"""

import asyncio
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from . import errors
from .api import IDEAL_REFERENCES, HostedAnswer, HostedRequest, read_answer
from .journal import HEARTBEAT_SECONDS, Guard, Row, State, refuse_ambiguous
from .pictures import Outcome
from .queue import DONE, QUEUED, RUNNING, CancelOutcome, Status, SubmitOptions, Ticket
from .references import Reference, unreachable_for_service
from .service import PEEK_SECONDS, STEPS, JobProgress, Service

LONGEST_TEXT = 64  # characters shown of what is no address, such as a picture in a text
CALL_OFF_SECONDS = 60  # to fetch what was finished before it could be called off

logger = logging.getLogger(__package__)  # one logger, which keeps keys out


@dataclass(frozen=True)
class Limits:
    """Seconds to wait in the queue, for the run, and altogether."""

    queue: float = 300
    run: float = 600
    total: float = 900


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


async def generate(job: Job, at: Service) -> Outcome:
    """The pictures of a request, which is sent only if no equal one is finished or under way. Raises HostedError."""
    with ExitStack() as place:
        row, ticket = await submit(job, at, place)
        try:
            return await at.watch.over(collect(row, ticket, job.limits, at, job))
        except (errors.Interrupted, errors.HostedLimit, asyncio.CancelledError) as stopped:
            place.close()
            return await _call_off(row, ticket, stopped, at)
        except errors.JobCancelled:
            if row.state != "CANCEL_REQUESTED" or at.journal.find(row.digest):
                raise
    return await generate(job, at)  # the user had called that one off, it has ended, and they ask again


async def submit(job: Job, at: Service, place: ExitStack) -> tuple[Row, Ticket]:
    """The accepted request that equals this one: a standing one, or one that is sent now, once, and takes a place."""
    digest, pictures = job.request.digest(at.account), job.request.num_images
    row = None if job.force else at.journal.find(digest)
    if row is None:
        at.journal.check(job.run, pictures, job.guard)
        at.report(JobProgress(0, f"sending {len(job.references)} reference pictures"))
        urls = await at.watch.over(at.storage.place(job.references, job.transport, job.limits.queue))
        await _take_place(at, place)
        row = at.journal.claim(digest, job.run, pictures, job.request.seed is not None, job.guard, job.force)
        if row.fresh:
            return await _send(row, replace(job.request, reference_images=urls), job.options, at)
        place.close()
    return await _join(row, at)


async def order(job: Job, at: Service) -> Ticket:
    """The ticket of an accepted request, without waiting for it. Raises HostedError."""
    with ExitStack() as place:
        row, ticket = await submit(job, at, place)
    try:
        at.watch.check()
    except errors.Interrupted as stopped:
        await _call_off(row, ticket, stopped, at)
    return ticket


async def status(request_id: str, logs: bool, at: Service) -> Status:
    """Where a request stands of which only the id is known."""
    return await at.watch.over(at.client.status(at.client.ticket(request_id), logs))


async def upload(references: Sequence[Reference], seconds: int, at: Service) -> list[str]:
    """The address of each photograph in the service's storage, which deletes it after so many seconds."""
    return [await at.watch.over(at.storage.upload(reference, seconds, seconds / 2)) for reference in references]


async def fetch(request_id: str, limits: Limits, at: Service) -> Outcome:
    """The pictures of a request of which only the id is known, waiting for them if need be."""
    row, ticket = _known(request_id, at)
    try:
        return await at.watch.over(collect(row, ticket, limits, at))
    except errors.HostedLimit as error:
        raise errors.HostedLimit(f"{error} It goes on at the service: run this again to fetch its pictures.") from None


async def cancel(request_id: str, at: Service) -> CancelOutcome:
    """Ask the service to stop a request of which only the id is known."""
    row, ticket = _known(request_id, at)
    if row is None or not _may_cancel(row, at):
        return await at.client.cancel(ticket)
    return await _cancel_claimed(row, ticket, at)


async def collect(row: Row | None, ticket: Ticket, limits: Limits, at: Service, job: Job | None = None) -> Outcome:
    """The pictures of a request: kept ones, or waited for, fetched and then kept.

    row, job  None for a request that is not in the journal, or whose values are not known here
    """
    if kept := at.store.get(ticket.request_id):
        return kept
    began = at.now()
    with _nothing_is_lost(row, ticket, at):
        data, status = await wait(ticket, limits, at)
        waited = at.now()
        _move(row, "COMPLETED", at)
        at.report(JobProgress(4, f"fetching the pictures (request {ticket.request_id})"))
        answer = read_answer(HostedAnswer, data)
        images, notes = await at.fetcher.fetch_all(answer.images)
    timings = {"waited": round(waited - began, 3), "fetched": round(at.now() - waited, 3), **(status.metrics or {})}
    info = describe(ticket, answer, status, timings, notes, job)
    outcome = Outcome(images, answer.seed, ticket.request_id, info)
    if at.store.put(ticket.request_id, outcome):
        _move(row, "DOWNLOADED", at, seed=answer.seed)
    at.report(JobProgress(STEPS, f"done (request {ticket.request_id})"))
    return outcome


async def _send(row: Row, request: HostedRequest, options: SubmitOptions, at: Service) -> tuple[Row, Ticket]:
    """The one place that spends money. It is not broken off by the user, so that its outcome is known."""
    beat = asyncio.ensure_future(_beat(row, at))
    try:
        ticket = await at.client.submit(request.body(), options)
    except errors.HostedError as error:
        _move(row, "AMBIGUOUS" if isinstance(error, errors.AmbiguousSubmit) else "FAILED", at, str(error))
        raise
    except BaseException:
        _move(row, "AMBIGUOUS", at, "ended while it was being sent")
        raise
    finally:
        beat.cancel()
    row = replace(row, state="SUBMITTED", ticket=ticket)
    _move(row, "SUBMITTED", at)
    at.report(JobProgress(1, f"sent (request {ticket.request_id})"))
    return row, ticket


async def _beat(row: Row, at: Service) -> None:
    while True:
        await asyncio.sleep(HEARTBEAT_SECONDS)
        with suppress(errors.HostedError):
            at.journal.alive(row)


async def _join(row: Row, at: Service) -> tuple[Row, Ticket]:
    """The row once it has a ticket; somebody else may just be sending it."""
    while row.ticket is None:
        refuse_ambiguous(row)
        at.report(JobProgress(0, "an equal request is just being sent; waiting for it"))
        await at.watch.pause(PEEK_SECONDS)
        standing = at.journal.find(row.digest)
        if standing is None:
            refused = "An equal request that was being sent was not accepted."
            raise errors.Refused(f"{refused} Queue the prompt again to send this one.")
        row = standing
    return row, row.ticket


async def _take_place(at: Service, place: ExitStack) -> None:
    """Wait for one of the places for requests under way; who joins another's request needs none."""
    while not at.slots.acquire(blocking=False):
        at.report(JobProgress(0, "waiting for another hosted request to finish"))
        await at.watch.pause(PEEK_SECONDS)
    place.callback(at.slots.release)
    at.watch.check()


async def wait(ticket: Ticket, limits: Limits, at: Service) -> tuple[Any, Status]:
    """The JSON of the result, and the last status. Raises JobFailed, HostedLimit, Refused."""
    began, running, seen = at.now(), None, 0
    for pause in itertools.chain(at.poll_seconds, itertools.repeat(at.poll_seconds[-1])):
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
    except errors.Refused:
        if not status.failed:
            raise
        data = None
    if status.failed:
        raise errors.failed_job(errors.reported_failure(status.error, status.error_type), ticket.request_id)
    return data


def _progress(ticket: Ticket, status: Status, seconds: float) -> JobProgress:
    last = f": {status.logs[-1]}" if status.logs else ""
    named = f" (request {ticket.request_id})"
    if status.state == QUEUED:
        position = "" if status.position is None else f", {status.position} before it"
        return JobProgress(2, f"queued {seconds:.0f} s{position}{named}")
    known = "" if status.state in (RUNNING, DONE) else f" in the unknown state {status.state[:40]!r}"
    return JobProgress(3, f"running {seconds:.0f} s{known}{last}{named}")


def _check_limits(ticket: Ticket, limits: Limits, began: float, running: float | None, now: float) -> None:
    spans = (
        ("in the queue", "queue_limit", limits.queue, now - began if running is None else 0),
        ("for the run", "run_limit", limits.run, 0 if running is None else now - running),
        ("altogether", "total_limit", limits.total, now - began),
    )
    for what, name, limit, span in spans:
        if span > limit:
            waited = f"Waited {limit:g} s {what} ({name})"
            raise errors.HostedLimit(f"{waited} for request {ticket.request_id}, which is not done.")


@contextmanager
def _nothing_is_lost(row: Row | None, ticket: Ticket, at: Service) -> Iterator[None]:
    """Notes a job that failed; says of every other failure that the request can still be asked about."""
    try:
        yield
    except errors.JobFailed as error:
        _move(row, "FAILED", at, str(error))
        raise
    except (errors.AnswerLost, errors.BadAnswer, errors.Unreachable, errors.UnsafeAddress) as error:
        raise type(error)(f"{error} Request {ticket.request_id} is not lost.{errors.GOES_ON}") from None


def _known(request_id: str, at: Service) -> tuple[Row | None, Ticket]:
    """What the journal knows of a request; a journal that cannot be read keeps nobody from asking the service."""
    ticket, row = at.client.ticket(request_id), None
    with suppress(errors.HostedError):
        row = at.journal.by_request(ticket.request_id)
    return row, (row and row.ticket) or ticket


async def _call_off(row: Row, ticket: Ticket, stopped: BaseException, at: Service) -> Outcome:
    """Ask the service once to stop; what turns out to be finished is fetched and kept, since it is paid for."""
    at.watch.finish()
    if not _may_cancel(row, at):
        raise stopped
    at.report(JobProgress(3, f"calling it off (request {ticket.request_id})"))
    cancelled = await _cancel_claimed(row, ticket, at)
    at.report(JobProgress(3, f"{cancelled.value} (request {ticket.request_id})"))
    logger.info("Request %s: %s", ticket.request_id, cancelled.value)
    if cancelled is CancelOutcome.TOO_LATE:
        with suppress(errors.HostedError, asyncio.TimeoutError):  # it can still be fetched by its id
            outcome = await asyncio.wait_for(collect(row, ticket, Limits(), at), CALL_OFF_SECONDS)
            if isinstance(stopped, errors.HostedLimit):
                return outcome
    if isinstance(stopped, errors.HostedLimit):
        raise errors.HostedLimit(f"{stopped} {cancelled.value}") from None
    raise stopped


def _may_cancel(row: Row, at: Service) -> bool:
    """True for the one who is to cancel. A journal that cannot be written keeps nobody from it."""
    try:
        return at.journal.claim_cancel(row)
    except errors.HostedError:
        return True


async def _cancel_claimed(row: Row, ticket: Ticket, at: Service) -> CancelOutcome:
    """Cancel and note what came of it: only a request that never ran is over; every other can still be asked about."""
    cancelled = await at.client.cancel(ticket)
    if cancelled is CancelOutcome.REMOVED:
        _move(row, "FAILED", at, "cancelled before it ran")
    elif cancelled in (CancelOutcome.NOT_PASSED_ON, CancelOutcome.NO_ANSWER):
        _move(row, "SUBMITTED", at)
    return cancelled


def _move(row: Row | None, state: State, at: Service, note: str = "", seed: str | None = None) -> None:
    """Note a step. A journal that cannot be written now must not cost pictures: the row then stays as it was."""
    if row is None:
        return
    try:
        at.journal.move(row, state, note, seed)
    except errors.HostedError as error:
        logger.warning("Request %s is %s, but: %s", row.ticket.request_id if row.ticket else "", state, error)


def describe(
    ticket: Ticket, answer: HostedAnswer, status: Status, timings: Mapping[str, Any], notes: list[str], job: Job | None
) -> dict[str, Any]:
    """What a user is told about a request that went through, as JSON's values; the seed as text."""
    said = [image.model_dump(exclude_none=True) for image in answer.images]
    return {
        "seed": answer.seed,
        "request_id": ticket.request_id,
        "urls": [_shown(image.url) for image in answer.images],
        "images": [{name: _shown(value) for name, value in facts.items()} for facts in said],
        "timings": dict(timings),
        "request": _shown_request(job) if job else None,
        "logs": list(status.logs),
        "notes": notes + (_remarks(job.request, job.references, len(answer.images)) if job else []),
    }


def _remarks(request: HostedRequest, references: Sequence[Reference], came: int) -> list[str]:
    """What a user should know about it all the same; `came` is the number of pictures."""
    far = [number for number, reference in enumerate(references, 1) if unreachable_for_service(reference)]
    found = (
        (came != request.num_images, f"{request.num_images} pictures were asked for, {came} came."),
        (len(references) > IDEAL_REFERENCES, f"{len(references)} references were sent; {IDEAL_REFERENCES} are ideal."),
        (bool(far), f"The service cannot read addresses of a private network: reference {', '.join(map(str, far))}."),
    )
    noted = [(number, reference.note) for number, reference in enumerate(references, 1) if reference.note]
    return [text for holds, text in found if holds] + [f"Reference {number} {note}." for number, note in noted]


def _shown_request(job: Job) -> dict[str, Any]:
    """The request's JSON with addresses as they are and photographs as their type."""
    shown = tuple(_shown(reference.url or reference.content_type) for reference in job.references)
    return replace(job.request, reference_images=shown).body()


def _shown(value: Any) -> Any:
    """An address or a number as it is, a picture in a text as its start."""
    if not isinstance(value, str) or value.startswith(("http://", "https://")) or len(value) <= LONGEST_TEXT:
        return value
    return f"{value[:LONGEST_TEXT]}..."
