"""The queue of the hosted service: submit, status, result, cancel (https://fal.ai/docs/model-apis/model-endpoints/queue).

A submit costs money and is sent at most once; the others may be repeated. The key goes to the addresses that were
configured and nowhere else, whatever an answer says.
"""

import asyncio
import json
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from yarl import URL

from ..pulid.errors import InputError
from . import errors
from .api import ENDPOINT, REQUEST_ID, Accepted, HostedAnswer, HostedRequest, Price, PriceList, Status, read_answer
from .endpoints import Endpoints, Key
from .transport import TERMS, Headers, Leave, Reply, Send, Sleep, Terms, repeated, retry_after

BUSY_REPEATS, LONGEST_BUSY_PAUSE = 3, 60.0  # of a submit that was turned away with 429
PRICE_TERMS, PRICE_SECONDS = Terms(seconds=3, limit=2**20), 24 * 3600  # a price list, or its absence, is kept so long
CANCEL_STATUSES = (200, 202, 400, 404, 405)  # as CancelOutcome has them
ABOUT_US = (401, 403, 404, 407, 429)  # say something about us or the id, never about the job

_prices: dict[str, tuple[float, Price | None]] = {}  # in this process


@dataclass(frozen=True)
class SubmitOptions:
    """What surrounds a request without changing its picture."""

    webhook_url: str = ""
    priority: str = "normal"
    runner_hint: str = ""
    no_retry: bool = False
    start_seconds: float | None = None  # the service gives up when no machine has begun by then
    lifetime: int = 0  # seconds that the service keeps the pictures; 0 leaves that to the account's settings
    access: str = ""  # to them at the service: as the account has it, "allow", "forbid" or "hide"
    store: bool = True  # False asks the service to keep no copy of the request and its answer

    def __post_init__(self) -> None:
        if not (self.runner_hint.isascii() and self.runner_hint.isprintable()):
            raise InputError("runner_hint takes plain letters, digits and signs.")

    def headers(self) -> dict[str, str]:
        lifecycle: dict[str, Any] = {"expiration_duration_seconds": self.lifetime} if self.lifetime else {}
        lifecycle |= {"initial_acl": {"default": self.access}} if self.access else {}
        found = {
            "X-Fal-Request-Timeout": f"{self.start_seconds:g}" if self.start_seconds else "",
            "X-Fal-Queue-Priority": self.priority if self.priority != "normal" else "",
            "X-Fal-Runner-Hint": self.runner_hint,
            "x-fal-no-retry": "1" if self.no_retry else "",
            "X-Fal-Object-Lifecycle-Preference": json.dumps(lifecycle) if lifecycle else "",
            "X-Fal-Store-IO": "" if self.store else "0",
        }
        return {name: value for name, value in found.items() if value}


class CancelOutcome(Enum):
    """What came of asking to cancel, in words for the user; in the order of CANCEL_STATUSES."""

    REMOVED = "It was taken out of the queue before it ran."
    REQUESTED = "The service was asked to stop; that is no proof that nothing is charged."
    TOO_LATE = "It was already finished; its pictures can be fetched by its id."
    UNKNOWN = "The service does not know this request id (any more)."
    NOT_PASSED_ON = "The proxy does not pass a cancel on, so the request goes on; fetch its pictures by its id."
    NO_ANSWER = "The service did not answer the cancel; the request may go on and be charged."


@dataclass(frozen=True)
class QueueClient:
    """One account's way to one model."""

    send: Send
    endpoints: Endpoints
    key: Key | None  # None where a proxy adds it
    terms: Terms = TERMS  # of one exchange
    sleep: Sleep = asyncio.sleep
    cancel_seconds: float = 10  # to wait for the answer to a cancel

    async def submit(self, body: Mapping[str, Any], options: SubmitOptions, leave: Leave = None) -> str:
        """Send a request that costs money, once; its id. `leave` may raise as long as it is not wholly sent.

        Sends again only where nothing can have been accepted: it was not wholly sent, or the answer was 429.
        Raises Unreachable or Refused (nothing runs), AmbiguousSubmit (nobody knows).
        """
        query = {"fal_webhook": options.webhook_url} if options.webhook_url else {}
        data, terms = json.dumps(body).encode(), replace(self.terms, leave=leave)
        for attempt in range(BUSY_REPEATS + 1):
            try:
                reply = await self._ask("POST", "", query, headers=options.headers(), body=data, terms=terms)
            except (errors.AnswerLost, errors.BadAnswer) as error:
                raise errors.AmbiguousSubmit(str(error)) from None
            pause = retry_after(reply, attempt)
            if reply.status != 429 or attempt == BUSY_REPEATS or pause > LONGEST_BUSY_PAUSE:
                break
            await self.sleep(pause)
        if (reply.may_pass() and reply.status != 429) or 300 <= reply.status < 400:
            raise errors.AmbiguousSubmit(f"The answer to the request was HTTP {reply.status}.")
        if reply.status >= 400:
            raise self.refusal(reply, "The service did not take the request")
        try:
            return read_answer(Accepted, reply.json).request_id
        except errors.BadAnswer:
            raise errors.AmbiguousSubmit(f"The answer to the request (HTTP {reply.status}) names no id.") from None

    async def status(self, request_id: str, logs: bool = True) -> Status:
        """Raises Refused where the service does not say, BadAnswer where it says nothing of use."""
        reply = await self._read(f"/requests/{request_id}/status", {"logs": str(int(logs))})
        if reply.status not in (200, 202):
            raise self.refusal(reply, "Asking for the status failed", request_id)
        return read_answer(Status, reply.json)

    async def result(self, request_id: str) -> HostedAnswer | None:
        """What the model gave, or None while it is not ready.

        Raises JobFailed with the model's or the service's own word that it failed, Refused or BadAnswer for anything
        else: the request is then as it was.
        """
        reply = await self._read(f"/requests/{request_id}")
        if reply.status == 200:
            return read_answer(HostedAnswer, reply.json)
        failure = reply.failure
        if reply.status == 400 and "in progress" in failure.said:
            return None
        if failure.kinds and reply.status not in ABOUT_US:
            raise errors.failed_job(failure, request_id)
        raise self.refusal(reply, "Fetching the result failed", request_id)

    def refusal(self, reply: Reply, doing: str, request_id: str = "") -> errors.Refused:
        """What to raise for an answer that is none. `doing` is what failed, as the first words of a sentence."""
        kind = errors.Gone if reply.status in (404, 410) else errors.Refused
        return kind(reply.failure.words(doing, request_id, proxied=self.endpoints.proxy is not None))

    async def cancel(self, request_id: str) -> CancelOutcome:
        """Ask once, and not for long; never raises. A 200 without "OK" does not prove that the request never ran."""
        terms = replace(self.terms, seconds=self.cancel_seconds)
        with suppress(errors.Unreachable, errors.AnswerLost, errors.BadAnswer):
            reply = await self._ask("PUT", f"/requests/{request_id}/cancel", terms=terms)
            proven = reply.status != 200 or (isinstance(reply.json, dict) and reply.json.get("status") == "OK")
            outcomes = dict(zip(CANCEL_STATUSES, CancelOutcome, strict=False))
            return outcomes.get(reply.status if proven else 202, CancelOutcome.NO_ANSWER)
        return CancelOutcome.NO_ANSWER

    @property
    def payer(self) -> str:
        """A name of the account."""
        return self.key.account if self.key else f"proxy {self.endpoints.proxy}"

    async def cost(self, request: HostedRequest) -> str:
        """About what it costs, by this account's price list, which is asked for once a day; "" where nobody knows."""
        api, known = self.endpoints.api, f"{self.endpoints.api} {self.payer}"
        asked, price = _prices.get(known, (float("-inf"), None))
        if api and time.monotonic() - asked > PRICE_SECONDS:
            with suppress(errors.HostedError):
                reply = await self.call("GET", api / "v1/models/pricing" % {"endpoint_id": ENDPOINT}, terms=PRICE_TERMS)
                listed = read_answer(PriceList, reply.json).prices
                price = next((price for price in listed if price.endpoint_id == ENDPOINT), None)
            _prices[known] = time.monotonic(), price
        return price.of(request) if price else ""

    async def _read(self, path: str, query: Mapping[str, str] | None = None) -> Reply:
        def may_pass(reply: Reply) -> bool:  # damaged JSON, and what no word of the job's says
            unnamed = not reply.failure.kinds and reply.failure.retryable is not False
            return reply.json is None if reply.status < 300 else reply.may_pass() and unnamed

        return await repeated(lambda: self._ask("GET", path, query), self.sleep, may_pass)

    async def _ask(self, method: str, path: str, query: Mapping[str, str] | None = None, **sent: Any) -> Reply:
        """A call to the queue; to its second name where the first one cannot have got all of it."""
        *others, last = (base / f"{ENDPOINT}{path}" % (query or {}) for base in self.endpoints.queues)
        for url in others:
            with suppress(errors.Unreachable):
                return await self.call(method, url, **sent)
        return await self.call(method, last, **sent)

    async def call(
        self, method: str, url: URL, headers: Headers = None, body: bytes = b"", terms: Terms | None = None
    ) -> Reply:
        """One exchange with the key, or through the proxy without it; the answer is free of the key."""
        sent = {**(headers or {}), "Accept": "application/json", "Content-Type": "application/json"}
        if self.endpoints.proxy is not None:
            sent["x-fal-target-url"] = str(url)
            return await self.send(method, self.endpoints.proxy, sent, body, terms or self.terms)
        if self.key is None or not self.endpoints.may_see_key(url):
            raise AssertionError(f"no key may go to {url.host}")
        reply = await self.send(method, url, {**sent, **self.key.header}, body, terms or self.terms)
        shown = self.key.hide(reply.body.decode("utf-8", "replace")).encode()
        return Reply(reply.status, {name: self.key.hide(value) for name, value in reply.headers.items()}, shown)


def check_id(request_id: str) -> str:
    """The id without spaces around it. Raises InputError for what is none."""
    if not re.fullmatch(REQUEST_ID, request_id := request_id.strip()):
        raise InputError(
            f"A request id looks like 764cabcf-b745-4b3e-ae38-1200304cf45b, found {errors.clean(request_id, 60)!r}. "
            "Copy it from a submit node or from fal.ai/dashboard/requests."
        )
    return request_id
