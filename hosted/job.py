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
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ..pulid.errors import InputError
from . import errors, references
from .api import DONE, IDEAL_REFERENCES, MOST_PICTURES, QUEUED, RUNNING, HostedAnswer, HostedRequest, Status
from .endpoints import check_webhook
from .journal import Guard, Row, State
from .pictures import Outcome, fetch_all
from .queue import CancelOutcome, SubmitOptions, check_id
from .references import Reference
from .service import STEPS, Limits, Service

CALL_OFF_SECONDS, LAST_SECONDS = 60, 1.5  # to fetch what was finished before a cancel; after a limit
GOES_ON = "It goes on at the service: run this again to fetch its pictures, or stop it with PuLID Hosted Cancel."

CANCELLED: dict[CancelOutcome, State] = {CancelOutcome.REMOVED: "FAILED", CancelOutcome.REQUESTED: "CANCEL_REQUESTED"}
OVER = ("COMPLETED", "DOWNLOADED", "FAILED", "CANCEL_REQUESTED")  # no cancel changes that

logger = logging.getLogger(__package__)  # one logger, which keeps keys out


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

    def shown(self) -> dict[str, Any]:
        """What is asked for, without the photographs."""
        named = tuple(photo.url or photo.content_type for photo in self.references)
        return replace(self.request, reference_images=named).body()

    def notes(self) -> list[str]:
        """What the user should know about the photographs."""
        numbered = enumerate(self.references, start=1)
        noted = [f"Reference {number} {photo.note}." for number, photo in numbered if photo.note]
        if (count := len(self.references)) > IDEAL_REFERENCES:
            noted.insert(0, f"{count} references were sent; {IDEAL_REFERENCES} are ideal.")
        return noted


async def generate(job: Job, at: Service) -> Outcome:
    """The pictures of a request, which is sent only if no equal one is finished or under way. Raises HostedError."""
    with ExitStack() as place:
        row, notes = await submit(job, at, place)
        try:
            return (await at.watch.over(collect(row, at, job))).with_notes(notes)
        except (errors.Interrupted, errors.HostedLimit, asyncio.CancelledError) as stopped:
            place.close()
            return await _call_off(row, stopped, at)
        except errors.JobCancelled:
            at.watch.check()  # who wants to stop, too, hears of that
            if row.state != "CANCEL_REQUESTED" or at.journal.find(row.digest):
                raise
    return await generate(job, at)  # the user had called that one off, it has ended, and they ask again


async def submit(job: Job, at: Service, place: ExitStack) -> tuple[Row, list[str]]:
    """The accepted request that equals this one: a standing one, or one that is sent now, once, and takes a place.

    With it comes what the user should know about that, which is not kept with the pictures.
    """
    if webhook := job.options.webhook_url:
        check_webhook(webhook, at.folder)
        webhook = hashlib.sha256(webhook.encode()).hexdigest()
    digest = job.request.digest()
    async with at.alone_with(digest):
        found = at.journal.find(digest)
        if found is None or found.id == job.give_up:
            row = Row(digest, job.run, job.request.num_images, job.request.seed is not None, at.client.payer, webhook)
            return await _send(row, found, job, at, place)
    at.watch.begin(job.limits)
    if not found.request_id:
        raise _unknown(found)
    if webhook not in ("", found.webhook):
        raise InputError(
            f"An equal request, {found.id}, was sent with another webhook or none, and will not call this one. Nothing "
            f"was sent. Fetch its pictures by its id, or put {found.id} into force_resubmit to pay for a new one."
        )
    notes = ["It was paid for with another key than today's."] if found.payer not in ("", at.client.payer) else []
    if job.give_up:
        named = errors.clean(job.give_up, 60)
        notes.append(f"force_resubmit names {named}, but {found.id} answers this request: nothing was given up.")
    return found, notes


async def _send(row: Row, given_up: Row | None, job: Job, at: Service, place: ExitStack) -> tuple[Row, list[str]]:
    """The one place that spends money. Once it is wholly sent, nothing breaks it off, so that its outcome is known."""
    at.journal.check(job.run, job.request.num_images, job.guard)
    await at.take_place(place)
    at.watch.begin(job.limits)
    cost = await at.watch.over(at.client.cost(job.request))
    at.report(0, f"{cost}; sending" if cost else "sending")
    needed = job.limits.queue + job.limits.run
    urls = await at.watch.over(references.place(job.references, at.client, job.transport, needed))
    body = replace(job.request, reference_images=urls).body()
    row = at.journal.claim(row, job.guard, given_up)
    try:
        row = replace(row, request_id=await at.client.submit(body, job.options, at.watch.check))
    except errors.AmbiguousSubmit as error:
        interrupted = "It was interrupted while it was being sent. " if at.watch.stop() else ""
        unknown = _unknown(_move(row, "AMBIGUOUS", at, f"{interrupted}{error}"))
        logger.warning("%s", unknown)  # who interrupted it hears nothing else
        raise unknown from None
    except errors.HostedError as error:
        _move(row, "FAILED", at, str(error))
        raise
    except BaseException:
        _move(row, "AMBIGUOUS", at, "ended while it was being sent")
        raise
    row = _move(row, "SUBMITTED", at)
    at.watch.enter("queue", row.id)
    at.report(1, f"sent (request {row.id})")
    return row, [f"By the service's price list it costs {cost}."] if cost else []


async def order(job: Job, at: Service) -> tuple[str, list[str]]:
    """The id of an accepted request, without waiting for it, and what its user should know. Raises HostedError."""
    with ExitStack() as place:
        row, notes = await submit(job, at, place)
    if at.watch.stop():
        await _call_off(row, errors.Interrupted("Stopped by the user."), at)
    return row.id, notes


async def status(request_id: str, logs: bool, at: Service) -> Status:
    """Where a request stands of which only the id is known."""
    row = _known(request_id, at)
    with _nothing_is_lost(row, at):
        return await at.watch.over(at.client.status(row.id, logs))


async def upload(photos: Sequence[Reference], seconds: int, at: Service) -> list[str]:
    """The address of each file in the service's storage, which deletes it after so many seconds."""
    with ExitStack() as place:
        await at.take_place(place)
        return [await at.watch.over(references.upload(photo, at.client, seconds, seconds / 2)) for photo in photos]


async def fetch(request_id: str, limits: Limits, at: Service) -> Outcome:
    """The pictures of a request of which only the id is known, waiting for them if need be."""
    at.watch.begin(limits)
    try:
        return await at.watch.over(collect(_known(request_id, at), at))
    except errors.HostedLimit as error:
        raise errors.HostedLimit(f"{error} {GOES_ON}") from None


async def cancel(request_id: str, at: Service) -> CancelOutcome:
    """Ask the service to stop a request of which only the id is known."""
    return await _cancel(_known(request_id, at), at)


async def collect(row: Row, at: Service, job: Job | None = None) -> Outcome:
    """The pictures of an accepted request: kept ones, or waited for, fetched and then kept. `job` where it is known."""
    if kept := at.store.get(row.id):
        return kept
    with _nothing_is_lost(row, at):
        answer, status = await wait(row.id, at)
        waited = at.watch.seconds()
        _move(row, "COMPLETED", at)
        at.report(4, f"fetching the pictures (request {row.id})")
        asked = row.pictures if row.digest else min(len(answer.images), MOST_PICTURES)
        images, notes = await fetch_all(at.client, answer.images, asked, at.picture_terms)
    shown = [image.shown() for image in answer.images]
    fetched = at.watch.seconds() - waited
    info = {
        "seed": answer.seed,
        "request_id": row.id,
        "urls": [image["url"] for image in shown],
        "images": shown,
        "timings": {"waited": round(waited, 3), "fetched": round(fetched, 3)} | (status.metrics or {}),
        "request": job and job.shown(),
        "logs": list(status.logs),
        "notes": notes + (job.notes() if job else []),
    }
    outcome = Outcome(images=images, seed=answer.seed, request_id=row.id, info=info)
    if len(images) == len(answer.images[:asked]) and at.store.put(row.id, outcome):  # else the rest may still come
        _move(row, "DOWNLOADED", at)
    at.report(STEPS, f"done (request {row.id})")
    return outcome


async def wait(request_id: str, at: Service) -> tuple[HostedAnswer, Status]:
    """The result, and the last status. Raises JobFailed, Refused, BadAnswer."""
    seen, pauses = 0, iter(at.poll_seconds)
    at.watch.enter("queue", request_id)
    while True:
        status = await at.client.status(request_id)
        for line in status.logs[seen:]:
            logger.info("request %s: %s", request_id, line)
        seen = max(seen, len(status.logs))
        if failure := status.failure:
            with suppress(errors.Refused, errors.BadAnswer, errors.AnswerLost, errors.Unreachable):
                await at.client.result(request_id)  # which says more, by a JobFailed of its own
            raise errors.failed_job(failure, request_id)
        if status.state == DONE and (answer := await at.client.result(request_id)):
            return answer, status
        seconds = at.watch.enter("queue" if status.state == QUEUED else "run", request_id)
        at.report(2 if status.state == QUEUED else 3, f"{_progress(status, seconds)} (request {request_id})")
        await at.watch.pause(next(pauses, at.poll_seconds[-1]))


def _progress(status: Status, seconds: float) -> str:
    if status.state == QUEUED:
        return f"queued {seconds:.0f} s" + ("" if status.position is None else f", {status.position} before it")
    known = "" if status.state in (RUNNING, DONE) else f" in the unknown state {status.state!r}"
    last = f": {status.logs[-1]}" if status.logs else ""
    return f"running {seconds:.0f} s{known}{last}"


@contextmanager
def _nothing_is_lost(row: Row, at: Service) -> Iterator[None]:
    """Notes a job that failed; says of every other failure that the request can still be asked about, and how."""
    try:
        yield
    except errors.JobFailed as error:
        _move(row, "FAILED", at, str(error))
        raise
    except (errors.HostedLimit, errors.Interrupted):
        raise
    except errors.Gone as error:
        anew = f"to have it made, and paid for, anew, put {row.id} into force_resubmit"
        raise errors.Gone(f"{error} Queue the prompt again to ask once more; {anew}.") from None
    except errors.HostedError as error:
        raise type(error)(f"{error} {errors.NOT_LOST.format(row.id)}") from None


def _known(request_id: str, at: Service) -> Row:
    """The accepted request of this id, also where only the service knows it."""
    row = _look_up(request_id.strip(), at)
    if row and not row.request_id:
        raise _unknown(row)
    return row or Row("", request_id=check_id(request_id))


def _look_up(name: str, at: Service) -> Row | None:
    """What the journal knows. One that cannot be read keeps nobody from asking the service, or from a cancel."""
    with suppress(errors.HostedError):
        return at.journal.by_id(name)
    return None


def _unknown(row: Row) -> errors.AmbiguousSubmit:
    """What is said of a request that has no id of the service's."""
    return errors.AmbiguousSubmit(f"{row.id}: {row.note} {errors.OUTCOME_UNKNOWN.format(row.id)}")


async def _call_off(row: Row, stopped: BaseException, at: Service) -> Outcome:
    """Ask the service once to stop; what turns out to be finished is fetched and kept, since it is paid for."""
    at.watch.finishing, is_limit, becomes = True, isinstance(stopped, errors.HostedLimit), GOES_ON
    now = _look_up(row.name, at) or row
    if row.is_owner and now.state not in OVER:
        at.report(3, f"calling it off (request {row.id})")
        becomes = (cancelled := await _cancel(row, at)).value
        at.report(3, f"{becomes} (request {row.id})")
        logger.info("Request %s: %s", row.id, becomes)
        if cancelled is CancelOutcome.TOO_LATE:
            with suppress(errors.HostedError, asyncio.TimeoutError):  # it can still be fetched by its id
                outcome = await asyncio.wait_for(collect(row, at), LAST_SECONDS if is_limit else CALL_OFF_SECONDS)
                if is_limit:
                    return outcome
    raise errors.HostedLimit(f"{stopped} {becomes}") if is_limit else stopped


async def _cancel(row: Row, at: Service) -> CancelOutcome:
    """Cancel and note what came of it: only a request that never ran is over; every other can still be asked about."""
    cancelled = await at.client.cancel(row.id)
    if cancelled in CANCELLED and row.state not in OVER:
        _move(row, CANCELLED[cancelled], at, cancelled.value)
    return cancelled


def _move(row: Row, state: State, at: Service, note: str = "") -> Row:
    """Note a step. A journal that cannot be written now must not cost pictures: the row then stays there as it was."""
    row = replace(row, state=state, note=note)
    if row.digest:
        try:
            at.journal.move(row)
        except errors.HostedError as error:
            logger.warning("Request %s is %s, but: %s", row.id, state, error)
    return row
