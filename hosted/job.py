"""One hosted request from its values to its pictures: look, send once, wait, fetch, keep, and call it off if need be.

Nothing below `submit` ever sends a request that costs money, so asking again is always safe.

    what proves it                                                      the request is    queueing it again
    no connection, or not wholly sent; a 4xx answer                     not sent          sends it
    sent, and no answer, or one without an id                           of unknown fate   stops, and names it
    an id                                                               under way         joins it
    the status' error, a kind of error, the model's own list, the       failed            sends it
        service's word that the request's own time was up
    pictures                                                            done              takes them from this disk
    anything else that is said of it                                    under way         asks again

Whoever sends a request owns it: their interrupt or limit calls it off, and that of those who join it does not.
"""

import asyncio
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ..pulid.errors import InputError
from . import errors
from .api import DONE, IDEAL_REFERENCES, QUEUED, RUNNING, HostedAnswer, HostedRequest, Status, read_answer
from .endpoints import check_webhook
from .journal import Guard, Row, State, Ticket, refuse_ambiguous
from .pictures import Outcome
from .prices import ask_price, estimate
from .queue import CancelOutcome, SubmitOptions
from .references import Reference
from .service import STEPS, JobProgress, Service

LONGEST_TEXT, LONGEST_ADDRESS = 64, 2000  # characters shown of a picture in a text, of an address
CALL_OFF_SECONDS, LAST_SECONDS = 60, 1.5  # to fetch what was finished before a cancel; after a limit
GOES_ON = "It goes on at the service: run this again to fetch its pictures, or stop it with PuLID Hosted Cancel."

CANCELLED: dict[CancelOutcome, State] = {CancelOutcome.REMOVED: "FAILED", CancelOutcome.REQUESTED: "CANCEL_REQUESTED"}

logger = logging.getLogger(__package__)  # one logger, which keeps keys out


@dataclass(frozen=True)
class Limits:
    """Seconds to wait in the queue, for the run, and altogether."""

    queue: float = 300
    run: float = 600
    total: float = 900


@dataclass(frozen=True)
class Job:
    """A request and what surrounds it."""

    request: HostedRequest  # its reference_images are the digests of `references`, until it is sent
    references: tuple[Reference, ...]
    options: SubmitOptions
    guard: Guard
    run: str  # names the run of a workflow within which the guard counts
    transport: str = "auto"
    limits: Limits = field(default_factory=Limits)
    give_up: str = ""  # the id of an equal request, finished or not, that is given up for a new one


class Patience:
    """How long a user has waited for a request, against their limits; and what it costs, where that is known."""

    def __init__(self, limits: Limits, now: Callable[[], float], cost: str = ""):
        self.limits, self.now, self.cost = limits, now, cost
        self.began = now()
        self.queued: float | None = None  # since when, and so on
        self.running: float | None = None
        self.request_id = ""

    def accepted(self, request_id: str) -> None:
        self.request_id, self.queued = request_id, self.now()

    def check(self) -> None:
        """Raises HostedLimit."""
        now, queued = self.now(), self.queued if self.running is None else None
        spans = (
            ("in the queue", "queue_limit", self.limits.queue, queued),
            ("for the run", "run_limit", self.limits.run, self.running),
            ("altogether", "total_limit", self.limits.total, self.began),
        )
        for what, name, limit, since in spans:
            if since is not None and now - since > limit:
                known = f"for request {self.request_id}, which is not done." if self.queued else "and sent nothing."
                raise errors.HostedLimit(f"Waited {limit:g} s {what} ({name}) {known}")


async def generate(job: Job, at: Service) -> Outcome:
    """The pictures of a request, which is sent only if no equal one is finished or under way. Raises HostedError."""
    with ExitStack() as place:
        row, patience = await submit(job, at, place)
        try:
            outcome = await at.watch.over(collect(row, patience, at, job), patience.check)
            return outcome.with_notes(_remarks(row, patience, job, at))
        except (errors.Interrupted, errors.HostedLimit, asyncio.CancelledError) as stopped:
            place.close()
            return await _call_off(row, stopped, at)
        except errors.JobCancelled:
            if row.state != "CANCEL_REQUESTED" or at.journal.find(row.digest):
                raise
    return await generate(job, at)  # the user had called that one off, it has ended, and they ask again


async def submit(job: Job, at: Service, place: ExitStack) -> tuple[Row, Patience]:
    """The accepted request that equals this one: a standing one, or one that is sent now, once, and takes a place."""
    if job.options.webhook_url:
        check_webhook(job.options.webhook_url, at.folder)
    digest, pictures = job.request.digest(), job.request.num_images
    async with at.alone_with(digest):
        row = at.journal.find(digest)
        if row is None or row.id == job.give_up:
            at.journal.check(job.run, pictures, job.guard)
            await at.take_place(place)
            patience = Patience(job.limits, at.now, estimate(job.request, await at.watch.over(ask_price(at.client))))
            sending = f"sending {len(job.references)} reference pictures"
            at.report(JobProgress(0, f"{patience.cost}; {sending}" if patience.cost else sending))
            needed = job.limits.queue + job.limits.run
            urls = await at.watch.over(at.storage.place(job.references, job.transport, needed), patience.check)
            fixed, hook = job.request.seed is not None, _hash(job.options.webhook_url)
            row = at.journal.claim(Row(digest, job.run, pictures, fixed, at.payer, hook), job.guard, job.give_up)
            if row.is_owner:
                request = replace(job.request, reference_images=urls)
                return await _send(row, request, job.options, patience, at), patience
            place.close()
    refuse_ambiguous(row)
    if job.options.webhook_url and row.webhook != _hash(job.options.webhook_url):
        raise InputError(
            f"An equal request, {row.id}, was sent with another webhook or none, and will not call this one. Nothing "
            f"was sent. Fetch its pictures by its id, or put {row.id} into force_resubmit to pay for a new one."
        )
    return row, Patience(job.limits, at.now)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest() if text else ""


async def order(job: Job, at: Service) -> tuple[Ticket, list[str]]:
    """The ticket of an accepted request, without waiting for it, and what its user should know. Raises HostedError."""
    with ExitStack() as place:
        row, patience = await submit(job, at, place)
    try:
        at.watch.check()
    except errors.Interrupted as stopped:
        await _call_off(row, stopped, at)
    return _ticket(row, at), _remarks(row, patience, job, at)


async def status(request_id: str, logs: bool, at: Service) -> Status:
    """Where a request stands of which only the id is known."""
    ticket = _ticket(_known(request_id, at), at)
    with _nothing_is_lost(None, ticket, at):
        return await at.watch.over(at.client.status(ticket, logs))


async def upload(references: Sequence[Reference], seconds: int, at: Service) -> list[str]:
    """The address of each file in the service's storage, which deletes it after so many seconds."""
    with ExitStack() as place:
        await at.take_place(place)
        return [await at.watch.over(at.storage.upload(reference, seconds, seconds / 2)) for reference in references]


async def fetch(request_id: str, limits: Limits, at: Service) -> Outcome:
    """The pictures of a request of which only the id is known, waiting for them if need be."""
    row, patience = _known(request_id, at), Patience(limits, at.now)
    try:
        return await at.watch.over(collect(row, patience, at), patience.check)
    except errors.HostedLimit as error:
        raise errors.HostedLimit(f"{error} {GOES_ON}") from None


async def cancel(request_id: str, at: Service) -> CancelOutcome:
    """Ask the service to stop a request of which only the id is known."""
    return await _cancel(_known(request_id, at), at)


async def collect(row: Row, patience: Patience, at: Service, job: Job | None = None) -> Outcome:
    """The pictures of an accepted request: kept ones, or waited for, fetched and then kept. `job` where it is known."""
    ticket = _ticket(row, at)
    patience.accepted(ticket.request_id)
    if kept := at.store.get(ticket.request_id):
        return kept
    with _nothing_is_lost(row, ticket, at):
        data, status = await wait(ticket, patience, at)
        waited = at.now()
        _move(row, "COMPLETED", at)
        at.report(JobProgress(4, f"fetching the pictures (request {ticket.request_id})"))
        answer = read_answer(HostedAnswer, data)
        asked = row.pictures if row.digest else len(answer.images)
        images, notes = await at.fetcher.fetch_all(answer.images, min(asked, 8))
    timings = {"waited": round(waited - patience.began, 3), "fetched": round(at.now() - waited, 3)}
    info = describe(ticket, answer, status, timings | (status.metrics or {}), job)
    info["notes"] = notes + info["notes"]
    outcome = Outcome(images=images, seed=answer.seed, request_id=ticket.request_id, info=info)
    if at.store.put(ticket.request_id, outcome):
        _move(row, "DOWNLOADED", at, seed=answer.seed)
    at.report(JobProgress(STEPS, f"done (request {ticket.request_id})"))
    return outcome


async def _send(row: Row, request: HostedRequest, options: SubmitOptions, patience: Patience, at: Service) -> Row:
    """The one place that spends money. Once it is wholly sent, nothing breaks it off, so that its outcome is known."""

    def leave() -> None:
        at.watch.check()
        patience.check()

    client = replace(at.client, sleep=lambda seconds: at.watch.over(at.watch.pause(seconds), patience.check))
    try:
        ticket = await client.submit(request.body(), options, leave)
    except errors.AmbiguousSubmit as error:
        note = f"It was interrupted while it was being sent. {error}" if at.watch.is_over else str(error)
        _move(row, "AMBIGUOUS", at, note)
        words = f"{note} {errors.OUTCOME_UNKNOWN.format(row.id)}"
        logger.warning("%s", words)  # who interrupted it hears nothing else
        raise errors.AmbiguousSubmit(words) from None
    except errors.HostedError as error:
        _move(row, "FAILED", at, str(error))
        raise
    except BaseException:
        _move(row, "AMBIGUOUS", at, "ended while it was being sent")
        raise
    row = replace(row, state="SUBMITTED", request_id=ticket.request_id, url=ticket.url)
    _move(row, "SUBMITTED", at)
    at.report(JobProgress(1, f"sent (request {ticket.request_id})"))
    return row


async def wait(ticket: Ticket, patience: Patience, at: Service) -> tuple[Any, Status]:
    """The JSON of the result, and the last status. Raises JobFailed, Refused, BadAnswer."""
    seen = 0
    for pause in itertools.chain(at.poll_seconds, itertools.repeat(at.poll_seconds[-1])):
        status = await at.client.status(ticket)
        for line in status.logs[seen:]:
            logger.info("request %s: %s", ticket.request_id, line)
        seen = max(seen, len(status.logs))
        if status.done and (data := await _result(ticket, status, at)) is not None:
            return data, status
        if patience.running is None and status.state != QUEUED:
            patience.running = at.now()
        since = patience.began if patience.running is None else patience.running
        at.report(_progress(ticket, status, at.now() - since))
        await at.watch.pause(pause)
    raise AssertionError("the pauses never end")


async def _result(ticket: Ticket, status: Status, at: Service) -> Any | None:
    """The JSON of a finished request, None while it is not there yet. A reported error counts in any case."""
    try:
        data = await at.client.result(ticket)
    except errors.JobFailed:
        raise
    except errors.HostedError:
        if not status.failed:
            raise
    if status.failed:
        raise errors.failed_job(status.failure, ticket.request_id)
    return data


def _progress(ticket: Ticket, status: Status, seconds: float) -> JobProgress:
    last = f": {status.logs[-1]}" if status.logs else ""
    named = f" (request {ticket.request_id})"
    if status.state == QUEUED:
        position = "" if status.position is None else f", {status.position} before it"
        return JobProgress(2, f"queued {seconds:.0f} s{position}{named}")
    known = "" if status.state in (RUNNING, DONE) else f" in the unknown state {status.state!r}"
    return JobProgress(3, f"running {seconds:.0f} s{known}{last}{named}")


@contextmanager
def _nothing_is_lost(row: Row | None, ticket: Ticket, at: Service) -> Iterator[None]:
    """Notes a job that failed; says of every other failure that the request can still be asked about, and how."""
    try:
        yield
    except errors.JobFailed as error:
        _move(row, "FAILED", at, str(error))
        raise
    except (errors.HostedLimit, errors.Interrupted):
        raise
    except errors.Gone as error:
        anew = f"To have it made, and paid for, anew, put {ticket.request_id} into force_resubmit."
        raise errors.Gone(f"{error} {anew}") from None
    except errors.HostedError as error:
        raise type(error)(f"{error} {errors.NOT_LOST.format(ticket.request_id)}") from None


def _known(request_id: str, at: Service) -> Row:
    """What the journal knows of a request; a journal that cannot be read keeps nobody from asking the service."""
    row, request_id = None, request_id.strip()
    with suppress(errors.HostedError):
        row = at.journal.by_id(request_id)
    if row and not row.request_id:
        raise errors.AmbiguousSubmit(f"{row.id} has no id at the service. {errors.OUTCOME_UNKNOWN.format(row.id)}")
    return row or Row("", request_id=at.client.ticket(request_id).request_id)


def _ticket(row: Row, at: Service) -> Ticket:
    return row.ticket if row.ticket and row.url else at.client.ticket(row.id)


async def _call_off(row: Row, stopped: BaseException, at: Service) -> Outcome:
    """Ask the service once to stop; what turns out to be finished is fetched and kept, since it is paid for."""
    at.watch.finish()
    is_limit = isinstance(stopped, errors.HostedLimit)
    if not row.is_owner or _is_over(row, at):
        raise errors.HostedLimit(f"{stopped} {GOES_ON}") if is_limit else stopped
    at.report(JobProgress(3, f"calling it off (request {row.id})"))
    cancelled = await _cancel(row, at)
    at.report(JobProgress(3, f"{cancelled.value} (request {row.id})"))
    logger.info("Request %s: %s", row.id, cancelled.value)
    if cancelled is CancelOutcome.TOO_LATE:
        with suppress(errors.HostedError, asyncio.TimeoutError):  # it can still be fetched by its id
            seconds = LAST_SECONDS if is_limit else CALL_OFF_SECONDS
            outcome = await asyncio.wait_for(collect(row, Patience(Limits(), at.now), at), seconds)
            if is_limit:
                return outcome
    raise errors.HostedLimit(f"{stopped} {cancelled.value}") if is_limit else stopped


def _is_over(row: Row, at: Service) -> bool:
    """Whether a request needs no cancel any more. A journal that is damaged or gone keeps nobody from it."""
    with suppress(errors.HostedError):
        now = at.journal.by_id(row.name)
        return now is not None and now.state in ("COMPLETED", "DOWNLOADED", "FAILED", "CANCEL_REQUESTED")
    return False


async def _cancel(row: Row, at: Service) -> CancelOutcome:
    """Cancel and note what came of it: only a request that never ran is over; every other can still be asked about."""
    cancelled = await at.client.cancel(_ticket(row, at))
    if cancelled in CANCELLED and row.state not in ("COMPLETED", "DOWNLOADED", "FAILED"):
        _move(row, CANCELLED[cancelled], at, cancelled.value)
    return cancelled


def _move(row: Row | None, state: State, at: Service, note: str = "", seed: str | None = None) -> None:
    """Note a step. A journal that cannot be written now must not cost pictures: the row then stays as it was."""
    if row is None or not row.digest:
        return
    try:
        at.journal.move(replace(row, state=state, note=note, seed=seed))
    except errors.HostedError as error:
        logger.warning("Request %s is %s, but: %s", row.id, state, error)


def describe(
    ticket: Ticket, answer: HostedAnswer, status: Status, timings: Mapping[str, Any], job: Job | None
) -> dict[str, Any]:
    """What a user is told about a request that went through, as JSON's values; the seed as text."""
    said = [image.model_dump(exclude_none=True) for image in answer.images]
    references = job.references if job else ()
    notes = [f"{len(references)} references were sent; {IDEAL_REFERENCES} are ideal."]
    notes = notes if len(references) > IDEAL_REFERENCES else []
    if job and len(answer.images) < job.request.num_images:
        notes.append(f"{job.request.num_images} pictures were asked for, {len(answer.images)} came.")
    return {
        "seed": answer.seed,
        "request_id": ticket.request_id,
        "urls": [_shown(image.url) for image in answer.images],
        "images": [{name: _shown(value) for name, value in facts.items()} for facts in said],
        "timings": dict(timings),
        "request": _shown_request(job) if job else None,
        "logs": list(status.logs),
        "notes": notes + [f"Reference {number} {ref.note}." for number, ref in enumerate(references, 1) if ref.note],
    }


def _remarks(row: Row, patience: Patience, job: Job, at: Service) -> list[str]:
    """What a user should know about how this run came by its request; not kept with the pictures."""
    found = (
        (bool(patience.cost), f"By the service's price list it costs {patience.cost}."),
        (row.payer not in ("", at.payer), "It was paid for with another key than today's."),
        (
            bool(job.give_up) and not row.is_owner,
            f"force_resubmit names {errors.clean(job.give_up, 60)}, but {row.id} answers this request, so nothing was "
            "given up.",
        ),
    )
    return [text for holds, text in found if holds]


def _shown_request(job: Job) -> dict[str, Any]:
    """The request's JSON with addresses as they are and photographs as their type."""
    shown = tuple(_shown(reference.url or reference.content_type) for reference in job.references)
    return replace(job.request, reference_images=shown).body()


def _shown(value: Any) -> Any:
    """An address or a number as it is, a picture in a text as its start."""
    is_address = isinstance(value, str) and value.startswith(("http://", "https://"))
    longest = LONGEST_ADDRESS if is_address else LONGEST_TEXT
    return f"{value[:longest]}..." if isinstance(value, str) and len(value) > longest else value
