"""The queue of the hosted service: submit, status, result, cancel (https://fal.ai/docs/model-apis/model-endpoints/queue).

A submit costs money and is sent at most once; the others may be repeated. The key goes to the addresses that were
configured and nowhere else, whatever an answer says.
"""

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from yarl import URL

from ..pulid.errors import (
    AmbiguousSubmit,
    AnswerLost,
    BadAnswer,
    InputError,
    JobCancelled,
    JobFailed,
    Refused,
    Unreachable,
)
from .addresses import Addresses
from .api import ENDPOINT
from .keys import Key
from .patience import Sleep, is_passing, repeated, retry_after
from .transport import DEFAULT_TERMS, Reply, Terms, Transport
from .wording import Failure, read_failure

BUSY_REPEATS, LONGEST_BUSY_PAUSE = 3, 60.0  # of a submit that was turned away with 429
CANCEL_SECONDS = 10
REQUEST_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{3,127}")
QUEUED, RUNNING, DONE = "IN_QUEUE", "IN_PROGRESS", "COMPLETED"
ACCESS = (401, 403, 404, 429)  # say something about us or the id, never about the job
MODELS_OWN = (408, 422, 499, 500)  # say how the job ended, also where the body does not


@dataclass(frozen=True)
class Ticket:
    """A request that was accepted, and where to ask about it."""

    request_id: str
    status_url: str
    response_url: str
    cancel_url: str


@dataclass(frozen=True)
class SubmitOptions:
    """What surrounds a request without changing its picture.

    start_seconds  the service gives up when no machine has begun by then
    """

    webhook_url: str = ""
    priority: str = "normal"
    runner_hint: str = ""
    no_retry: bool = False
    start_seconds: float | None = None

    def __post_init__(self):
        if self.webhook_url and not re.match(r"https?://[^/\s]+", self.webhook_url):
            raise InputError(f"A webhook is an address such as https://example.com/done, found {self.webhook_url!r}.")
        if not self.runner_hint.isascii() or (self.runner_hint and not self.runner_hint.isprintable()):
            raise InputError("runner_hint takes plain letters, digits and signs.")

    def headers(self) -> dict[str, str]:
        found = {
            "X-Fal-Request-Timeout": f"{self.start_seconds:g}" if self.start_seconds else "",
            "X-Fal-Queue-Priority": self.priority if self.priority != "normal" else "",
            "X-Fal-Runner-Hint": self.runner_hint,
            "x-fal-no-retry": "1" if self.no_retry else "",
        }
        return {name: value for name, value in found.items() if value}


@dataclass(frozen=True)
class Status:
    """Where a request stands. A state that is not in the service's documents counts as waiting.

    position  how many are before it while it is queued, None otherwise
    logs      all lines so far
    failure   error and error_type, which a failed job has although it is COMPLETED
    """

    state: str
    position: int | None = None
    logs: tuple[str, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    error: Any = None
    error_type: Any = None

    @property
    def done(self) -> bool:
        return self.state == DONE

    @property
    def failed(self) -> bool:
        return self.done and bool(self.error or self.error_type)


@dataclass(frozen=True)
class Cancelled:
    """What came of asking to cancel: "requested", "removed", "too late", "unknown" or "not passed on"."""

    outcome: str

    @property
    def words(self) -> str:
        return CANCEL_WORDS[self.outcome]


CANCEL_OUTCOMES = {202: "requested", 200: "removed", 400: "too late", 404: "unknown", 405: "not passed on"}
CANCEL_WORDS = {
    "requested": "The service was asked to stop; that is no proof that nothing is charged.",
    "removed": "It was taken out of the queue before it ran.",
    "too late": "It was already finished; its pictures can be fetched by its id.",
    "unknown": "The service does not know this request id (any more).",
    "not passed on": "The proxy does not pass a cancel on, so the request goes on; fetch its pictures by its id.",
    "no answer": "The service did not answer the cancel; the request may go on and be charged.",
}


class QueueClient:
    """One account's way to one model.

    key     None where a proxy adds it
    terms   of one exchange
    sleep   what a pause between two calls is; a test passes its own
    """

    def __init__(
        self,
        transport: Transport,
        addresses: Addresses,
        key: Key | None,
        terms: Terms = DEFAULT_TERMS,
        sleep: Sleep = asyncio.sleep,
    ):
        self.transport, self.addresses, self.key, self.terms, self.sleep = transport, addresses, key, terms, sleep

    def ticket(self, request_id: str) -> Ticket:
        """The ticket of a request of which only the id is known. Raises InputError."""
        if not REQUEST_ID.fullmatch(request_id := request_id.strip()):
            raise InputError(
                f"A request id looks like 764cabcf-b745-4b3e-ae38-1200304cf45b, found {request_id[:60]!r}. "
                "Copy it from a submit node or from fal.ai/dashboard/requests."
            )
        base = f"{self.addresses.queue}/{ENDPOINT}/requests/{request_id}"
        return Ticket(request_id, f"{base}/status", base, f"{base}/cancel")

    # --- Calls ---

    async def submit(self, body: Mapping[str, Any], options: SubmitOptions) -> Ticket:
        """Send a request that costs money, once.

        Sends again only where nothing can have been accepted: no connection came about, or the answer was 429.
        Raises Unreachable or Refused (nothing runs), AmbiguousSubmit (nobody knows).
        """
        query = {"fal_webhook": options.webhook_url} if options.webhook_url else {}
        urls = [base / ENDPOINT % query for base in (self.addresses.queue, self.addresses.backup_queue) if base]
        data, headers = json.dumps(body).encode(), options.headers()
        for attempt in range(BUSY_REPEATS + 1):
            reply = await self._submit_once(urls, headers, data)
            pause = retry_after(reply, attempt)
            if reply.status != 429 or attempt == BUSY_REPEATS or pause > LONGEST_BUSY_PAUSE:
                break
            await self.sleep(pause)
        return self._accepted(reply)

    async def _submit_once(self, urls: list[URL], headers: Mapping[str, str], data: bytes) -> Reply:
        for url in urls:
            try:
                return await self.call("POST", url, headers, data)
            except Unreachable as error:
                unreachable = error
            except (AnswerLost, BadAnswer) as error:
                raise AmbiguousSubmit(f"{error} {UNKNOWN}") from None
        raise unreachable

    def _accepted(self, reply: Reply) -> Ticket:
        if reply.status == 408 or reply.status >= 500 or 300 <= reply.status < 400:
            raise AmbiguousSubmit(f"The answer to the request was HTTP {reply.status}. {UNKNOWN}")
        if reply.status >= 400:
            raise Refused(read_failure(reply).words("The service did not take the request"))
        answer = read_json(reply) if _is_json(reply) else None
        request_id = answer.get("request_id") if isinstance(answer, dict) else None
        if not isinstance(request_id, str) or not REQUEST_ID.fullmatch(request_id):
            raise AmbiguousSubmit(f"The answer to the request (HTTP {reply.status}) names no request id. {UNKNOWN}")
        return self._trusted(request_id, answer)

    def _trusted(self, request_id: str, given: Mapping[str, Any]) -> Ticket:
        """A ticket with the addresses that were given where the key may go there, and with ours where it may not."""
        names = ("status_url", "response_url", "cancel_url")
        kept = {name: given.get(name) for name in names if self._is_ours(given.get(name))}
        return replace(self.ticket(request_id), **kept)

    def _is_ours(self, url: Any) -> bool:
        known = [base.origin() for base in (self.addresses.queue, self.addresses.backup_queue) if base]
        try:
            return isinstance(url, str) and URL(url).origin() in known and not URL(url).user
        except ValueError:
            return False

    async def status(self, ticket: Ticket, logs: bool = True) -> Status:
        url = URL(self._trusted(ticket.request_id, asdict(ticket)).status_url)
        reply = await self.repeat("GET", url.update_query(logs=int(logs)))
        if reply.status not in (200, 202):
            raise Refused(read_failure(reply).words("Asking for the status failed", ticket.request_id) + GOES_ON)
        return read_status(read_json(reply))

    async def result(self, ticket: Ticket) -> Any | None:
        """The JSON that the model gave, or None while it is not ready.

        Raises JobFailed with the model's own error, Refused where it may still be fetched later.
        """
        reply = await self.repeat("GET", URL(self._trusted(ticket.request_id, asdict(ticket)).response_url))
        if reply.status == 200:
            return read_json(reply)
        failure = read_failure(reply)
        if reply.status == 400 and any("in progress" in problem.message for problem in failure.problems):
            return None
        if reply.status not in ACCESS and (failure.kinds or reply.status in MODELS_OWN):
            raise failed_job(failure, ticket.request_id)
        raise Refused(failure.words("Fetching the result failed", ticket.request_id) + GOES_ON)

    async def cancel(self, ticket: Ticket) -> Cancelled:
        """Ask once, for at most ten seconds; never raises for what the service or the network does."""
        url = URL(self._trusted(ticket.request_id, asdict(ticket)).cancel_url)
        try:
            reply = await self.call("PUT", url, terms=replace(self.terms, seconds=CANCEL_SECONDS))
        except (Unreachable, AnswerLost, BadAnswer):
            return Cancelled("no answer")
        return Cancelled(CANCEL_OUTCOMES.get(reply.status, "no answer"))

    # --- One exchange ---

    async def repeat(
        self, method: str, url: URL, headers: Mapping[str, str] | None = None, data: bytes | None = None
    ) -> Reply:
        """A call that costs nothing and may be repeated: after a lost answer and after a failure that may pass."""
        return await repeated(lambda: self.call(method, url, headers, data), self.sleep, _is_passing)

    async def call(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str] | None = None,
        data: bytes | None = None,
        terms: Terms | None = None,
    ) -> Reply:
        """One exchange with the key, or through the proxy without it; the answer is free of the key."""
        sent = {**(headers or {}), "Accept": "application/json", "Content-Type": "application/json"}
        if self.addresses.proxy is not None:
            sent["x-fal-target-url"] = str(url)
            return await self.transport.send(method, self.addresses.proxy, sent, data, terms or self.terms)
        if self.key is None or not self.addresses.may_see_key(url):
            raise AssertionError(f"no key may go to {url.host}")
        reply = await self.transport.send(method, url, {**sent, **self.key.header}, data, terms or self.terms)
        shown = self.key.hide(reply.body.decode("utf-8", "replace")).encode()
        headers = {name: self.key.hide(value) for name, value in reply.headers.items()}
        return Reply(reply.status, headers, shown)


GOES_ON = (
    " Queue the prompt again to ask once more: it is not sent a second time. Where the service no longer knows it, "
    "force_resubmit sends it anew."
)
UNKNOWN = (
    "The request may have been accepted and billed. It is not sent again on its own: look at "
    "fal.ai/dashboard/requests. If it is there, fetch its pictures by its id (PuLID Hosted Result); "
    "if it is not, switch force_resubmit on to send it again."
)


def failed_job(failure: Failure, request_id: str) -> JobFailed:
    """What a job that failed raises."""
    kind = JobCancelled if failure.status == 499 or "client_cancelled" in failure.kinds else JobFailed
    return kind(failure.words("The request failed", request_id))


def read_status(data: Any) -> Status:
    """The JSON of a status; `logs` may be null or missing. Raises BadAnswer."""
    if not isinstance(data, dict) or not isinstance(data.get("status"), str):
        raise BadAnswer("The service answered a question for the status without one.")
    logs, position, metrics = data.get("logs"), data.get("queue_position"), data.get("metrics")
    lines = [line.get("message") if isinstance(line, dict) else line for line in logs if line] if logs else []
    return Status(
        state=data["status"],
        position=position if type(position) is int else None,
        logs=tuple(str(line) for line in lines if line is not None),
        metrics=metrics if isinstance(metrics, dict) else {},
        error=data.get("error"),
        error_type=data.get("error_type"),
    )


def read_json(reply: Reply) -> Any:
    try:
        return json.loads(reply.body)
    except ValueError:
        raise BadAnswer(f"Expected JSON from the service, found something else (HTTP {reply.status}).") from None


def _is_passing(reply: Reply) -> bool:
    """True for what may be over in a moment: damaged JSON, and a gateway's failure, which has no kind."""
    if reply.status < 300:
        return not _is_json(reply)
    failure = read_failure(reply)
    return is_passing(reply) and not failure.kinds and not failure.own_limit and failure.retryable is not False


def _is_json(reply: Reply) -> bool:
    try:
        read_json(reply)
    except BadAnswer:
        return False
    return True
