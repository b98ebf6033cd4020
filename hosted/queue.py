"""The queue of the hosted service: submit, status, result, cancel (https://fal.ai/docs/model-apis/model-endpoints/queue).

A submit costs money and is sent at most once; the others may be repeated. The key goes to the addresses that were
configured and nowhere else, whatever an answer says.
"""

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from yarl import URL

from ..pulid.errors import InputError
from .api import ENDPOINT, UNREADABLE_IS_NONE, Number, read_answer
from .endpoints import Endpoints, Key
from .errors import GOES_ON, OUTCOME_UNKNOWN, AmbiguousSubmit, AnswerLost, BadAnswer, Refused, Unreachable, failed_job
from .transport import DEFAULT_TERMS, PASSING, Headers, Reply, Sleep, Terms, Transport, repeated, retry_after

BUSY_REPEATS, LONGEST_BUSY_PAUSE = 3, 60.0  # of a submit that was turned away with 429
REQUEST_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{3,127}")
QUEUED, RUNNING, DONE = "IN_QUEUE", "IN_PROGRESS", "COMPLETED"
ACCESS = (401, 403, 404, 429)  # say something about us or the id, never about the job
MODELS_OWN = (408, 422, 499, 500)  # say how the job ended, also where the body does not


@dataclass(frozen=True)
class Ticket:
    """A request that was accepted, and where its result is; /status and /cancel lie below."""

    request_id: str
    url: str


@dataclass(frozen=True)
class SubmitOptions:
    """What surrounds a request without changing its picture."""

    webhook_url: str = ""
    priority: str = "normal"
    runner_hint: str = ""
    no_retry: bool = False
    start_seconds: float | None = None  # the service gives up when no machine has begun by then

    def __post_init__(self) -> None:
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


def _lines(logs: Any) -> tuple[str, ...]:
    """The texts of log entries, which may be null, objects with a `message`, or bare texts."""
    texts = [line.get("message") if isinstance(line, dict) else line for line in logs if line] if logs else []
    return tuple(str(text) for text in texts if text is not None)


class Status(BaseModel):
    """Where a request stands. A state that is not in the service's documents counts as waiting.

    position  how many are before it while it is queued, None otherwise
    logs      all lines so far
    error     with error_type, what a failed job has although it is COMPLETED
    """

    model_config = ConfigDict(frozen=True, strict=True)

    state: str = Field(alias="status")
    position: Number = Field(None, alias="queue_position")
    logs: Annotated[tuple[str, ...], BeforeValidator(_lines)] = ()
    metrics: Annotated[dict[str, Any] | None, UNREADABLE_IS_NONE] = None
    error: Any = None
    error_type: Any = None

    @property
    def done(self) -> bool:
        return self.state == DONE

    @property
    def failed(self) -> bool:
        return self.done and bool(self.error or self.error_type)


class CancelOutcome(Enum):
    """What came of asking to cancel, in words for the user."""

    REQUESTED = "The service was asked to stop; that is no proof that nothing is charged."
    REMOVED = "It was taken out of the queue before it ran."
    TOO_LATE = "It was already finished; its pictures can be fetched by its id."
    UNKNOWN = "The service does not know this request id (any more)."
    NOT_PASSED_ON = "The proxy does not pass a cancel on, so the request goes on; fetch its pictures by its id."
    NO_ANSWER = "The service did not answer the cancel; the request may go on and be charged."


CANCEL_OUTCOMES = {  # by HTTP status
    202: CancelOutcome.REQUESTED,
    200: CancelOutcome.REMOVED,
    400: CancelOutcome.TOO_LATE,
    404: CancelOutcome.UNKNOWN,
    405: CancelOutcome.NOT_PASSED_ON,
}


@dataclass(frozen=True)
class QueueClient:
    """One account's way to one model."""

    transport: Transport
    endpoints: Endpoints
    key: Key | None  # None where a proxy adds it
    terms: Terms = DEFAULT_TERMS  # of one exchange
    sleep: Sleep = asyncio.sleep
    cancel_seconds: float = 10  # to wait for the answer to a cancel

    def ticket(self, request_id: str, url: Any = None) -> Ticket:
        """The ticket of a request, at the given address if the key may go there. Raises InputError for another id."""
        if not REQUEST_ID.fullmatch(request_id := request_id.strip()):
            raise InputError(
                f"A request id looks like 764cabcf-b745-4b3e-ae38-1200304cf45b, found {request_id[:60]!r}. "
                "Copy it from a submit node or from fal.ai/dashboard/requests."
            )
        if not self._is_ours(url):
            url = f"{self.endpoints.queue}/{ENDPOINT}/requests/{request_id}"
        return Ticket(request_id, url)

    def _url(self, ticket: Ticket) -> str:
        """A ticket of other days goes to the addresses of today."""
        return self.ticket(ticket.request_id, ticket.url).url

    def _is_ours(self, url: Any) -> bool:
        known = [base.origin() for base in (self.endpoints.queue, self.endpoints.backup_queue) if base]
        try:
            return isinstance(url, str) and URL(url).origin() in known and not URL(url).user
        except ValueError:
            return False

    async def submit(self, body: Mapping[str, Any], options: SubmitOptions) -> Ticket:
        """Send a request that costs money, once.

        Sends again only where nothing can have been accepted: no connection came about, or the answer was 429.
        Raises Unreachable or Refused (nothing runs), AmbiguousSubmit (nobody knows).
        """
        query = {"fal_webhook": options.webhook_url} if options.webhook_url else {}
        urls = [base / ENDPOINT % query for base in (self.endpoints.queue, self.endpoints.backup_queue) if base]
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
                raise AmbiguousSubmit(f"{error} {OUTCOME_UNKNOWN}") from None
        raise unreachable

    def _accepted(self, reply: Reply) -> Ticket:
        if reply.status == 408 or reply.status >= 500 or 300 <= reply.status < 400:
            raise AmbiguousSubmit(f"The answer to the request was HTTP {reply.status}. {OUTCOME_UNKNOWN}")
        if reply.status >= 400:
            raise Refused(reply.failure.words("The service did not take the request"))
        answer = reply.json if isinstance(reply.json, dict) else {}
        request_id = answer.get("request_id")
        if not isinstance(request_id, str) or not REQUEST_ID.fullmatch(request_id):
            raise AmbiguousSubmit(f"The answer to the request (HTTP {reply.status}) names no id. {OUTCOME_UNKNOWN}")
        return self.ticket(request_id, answer.get("response_url"))

    async def status(self, ticket: Ticket, logs: bool = True) -> Status:
        """Raises Refused where the service does not say, BadAnswer where it says nothing of use."""
        url = URL(f"{self._url(ticket)}/status?logs={int(logs)}")
        reply = await self.repeat("GET", url)
        if reply.status not in (200, 202):
            raise Refused(reply.failure.words("Asking for the status failed", ticket.request_id) + GOES_ON)
        return read_answer(Status, reply.json)

    async def result(self, ticket: Ticket) -> Any | None:
        """The JSON that the model gave, or None while it is not ready.

        Raises JobFailed with the model's own error, Refused where it may still be fetched later, BadAnswer.
        """
        reply = await self.repeat("GET", URL(self._url(ticket)))
        if reply.status == 200 and reply.json is None:
            raise BadAnswer("Expected JSON from the service, found something else.")
        if reply.status == 200:
            return reply.json
        failure = reply.failure
        if reply.status == 400 and any("in progress" in problem.message for problem in failure.problems):
            return None
        if reply.status not in ACCESS and (failure.kinds or reply.status in MODELS_OWN):
            raise failed_job(failure, ticket.request_id)
        raise Refused(failure.words("Fetching the result failed", ticket.request_id) + GOES_ON)

    async def cancel(self, ticket: Ticket) -> CancelOutcome:
        """Ask once, and not for long; never raises for what the service or the network does."""
        terms = replace(self.terms, seconds=self.cancel_seconds)
        try:
            reply = await self.call("PUT", URL(f"{self._url(ticket)}/cancel"), terms=terms)
        except (Unreachable, AnswerLost, BadAnswer):
            return CancelOutcome.NO_ANSWER
        return CANCEL_OUTCOMES.get(reply.status, CancelOutcome.NO_ANSWER)

    async def repeat(self, method: str, url: URL, headers: Headers = None, body: bytes | None = None) -> Reply:
        """A call that costs nothing and may be repeated: after a lost answer and after a failure that may pass."""
        return await repeated(lambda: self.call(method, url, headers, body), self.sleep, _may_pass)

    async def call(
        self, method: str, url: URL, headers: Headers = None, body: bytes | None = None, terms: Terms | None = None
    ) -> Reply:
        """One exchange with the key, or through the proxy without it; the answer is free of the key."""
        sent = {**(headers or {}), "Accept": "application/json", "Content-Type": "application/json"}
        if self.endpoints.proxy is not None:
            sent["x-fal-target-url"] = str(url)
            return await self.transport.send(method, self.endpoints.proxy, sent, body, terms or self.terms)
        if self.key is None or not self.endpoints.may_see_key(url):
            raise AssertionError(f"no key may go to {url.host}")
        reply = await self.transport.send(method, url, {**sent, **self.key.header}, body, terms or self.terms)
        shown = self.key.hide(reply.body.decode("utf-8", "replace")).encode()
        return Reply(reply.status, {name: self.key.hide(value) for name, value in reply.headers.items()}, shown)


def _may_pass(reply: Reply) -> bool:
    """True for what may be over in a moment: damaged JSON, and a gateway's failure, which has no kind."""
    if reply.status < 300:
        return reply.json is None
    failure = reply.failure
    return reply.status in PASSING and not failure.kinds and not failure.own_limit and failure.retryable is not False
