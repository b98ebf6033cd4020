"""One HTTP exchange and what its failure proves, that nothing was sent or that nobody knows; and repeats of it.

No exchange follows a redirect, keeps a cookie or repeats itself, and no error of the HTTP library leaves this file,
since its errors can hold the headers of a request.
"""

import asyncio
import json
import random
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol

import aiohttp
from aiohttp.abc import ResolveResult
from yarl import URL

from .endpoints import is_public, refuse_private
from .errors import AnswerLost, BadAnswer, Failure, HostedError, Unreachable, read_failure

CONNECT_SECONDS = 10
CHUNK = 64 * 1024  # bytes
USER_AGENT = "pulid-sdxl (ComfyUI)"
REPEATS = 6  # of a call that may be repeated
LONGEST_PAUSE = 10.0  # seconds between two of them
PASSING = (429, 502, 503, 504)  # statuses that may be over in a moment

Headers = Mapping[str, str] | None
Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True)
class Reply:
    """An answer, read to its end; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    @property
    def json(self) -> Any:
        """What the body holds as JSON; None where it holds none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def failure(self) -> Failure:
        """What an answer that is none says about why."""
        return read_failure(self.status, self.headers, self.body)


@dataclass(frozen=True)
class Terms:
    """How long to wait for one exchange in seconds, and how large its answer may be in bytes."""

    seconds: float = 60
    limit: int = 64 * 2**20
    idle: float | None = None  # longest pause between two bytes


DEFAULT_TERMS = Terms()


class Transport(Protocol):
    """What the client needs of an HTTP library."""

    async def send(
        self, method: str, url: URL, headers: Headers = None, body: bytes | None = None, terms: Terms = DEFAULT_TERMS
    ) -> Reply:
        """Raises Unreachable when nothing was sent, AnswerLost when something may have been, BadAnswer."""
        ...


class PublicResolver(aiohttp.ThreadedResolver):
    """Looks names up, and refuses every one that leads to an address which is not on the public internet."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await super().resolve(host, port, family)
        if not all(is_public(entry["host"]) for entry in found):
            refuse_private(host)
        return found


class AiohttpTransport:
    """An asynchronous context manager of one event loop; with `public`, nothing goes to private addresses."""

    def __init__(self, public: bool = False):
        self._public = public

    async def __aenter__(self) -> "AiohttpTransport":
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_start.append(_once)
        trace.on_connection_create_end.append(_connected)
        resolver = PublicResolver() if self._public else None
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False, force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
            auto_decompress=False,
            trace_configs=[trace],
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def send(
        self, method: str, url: URL, headers: Headers = None, body: bytes | None = None, terms: Terms = DEFAULT_TERMS
    ) -> Reply:
        connection = SimpleNamespace(connected=False)
        timeout = aiohttp.ClientTimeout(terms.seconds, sock_connect=CONNECT_SECONDS, sock_read=terms.idle)
        failure: HostedError
        try:
            async with self._session.request(
                method,
                url,
                headers=headers,
                data=body,
                timeout=timeout,
                allow_redirects=False,
                trace_request_ctx=connection,
            ) as response:
                names = {name.lower(): value for name, value in response.headers.items()}
                return Reply(response.status, names, await _read(response, url, terms.limit))
        except HostedError as error:
            failure = error
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            failure = _failure(connection.connected, url, terms, error)
        raise failure from None  # outside of `except`: the library's error and its headers are not even in the context


async def _once(session: aiohttp.ClientSession, context: SimpleNamespace, params: Any) -> None:
    if context.trace_request_ctx.connected:  # the library repeats all calls but POST, on a second connection
        raise AnswerLost("The connection broke off before an answer came.")


async def _connected(session: aiohttp.ClientSession, context: SimpleNamespace, params: Any) -> None:
    context.trace_request_ctx.connected = True


async def _read(response: aiohttp.ClientResponse, url: URL, limit: int) -> bytes:
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise BadAnswer(f"{url.host} compressed its answer, although it was asked not to.")
    too_large = BadAnswer(f"The answer of {url.host} is larger than {limit / 2**20:.0f} MiB and was not read.")
    if (response.content_length or 0) > limit:
        raise too_large
    read = bytearray()
    async for chunk in response.content.iter_chunked(CHUNK):
        read += chunk
        if len(read) > limit:
            raise too_large
    return bytes(read)


def _failure(connected: bool, url: URL, terms: Terms, error: Exception) -> HostedError:
    if not connected:
        return Unreachable(
            f"No connection to {url.host} came about ({_kind(error)}), so nothing was sent. "
            "Check this machine's network, name lookup, clock and proxy, then queue the prompt again."
        )
    if isinstance(error, asyncio.TimeoutError):
        return AnswerLost(f"{url.host} did not answer within {terms.seconds:g} s.")
    return AnswerLost(f"The connection to {url.host} broke off before its answer was whole ({_kind(error)}).")


def _kind(error: Exception) -> str:
    """The library's class of error in words; its own text can hold addresses and headers."""
    kinds = {
        aiohttp.ClientConnectorDNSError: "its name was not found",
        aiohttp.ClientConnectorCertificateError: "its certificate is not valid",
        aiohttp.ClientSSLError: "no secure connection",
        asyncio.TimeoutError: "no answer in time",
        aiohttp.ClientConnectorError: "refused",
    }
    return next((words for kind, words in kinds.items() if isinstance(error, kind)), type(error).__name__)


async def repeated(
    send: Callable[[], Awaitable[Reply]], sleep: Sleep, may_pass: Callable[[Reply], bool] | None = None
) -> Reply:
    """The answer of a call that may be made several times; asks again after a lost one and after a passing failure."""
    for attempt in range(REPEATS):
        try:
            reply = await send()
            if not (may_pass(reply) if may_pass else reply.status in PASSING):
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
