"""One HTTP exchange, and what its failure proves: that nothing was sent, or that nobody knows.

`Transport` is what the client needs; AiohttpTransport does it with the HTTP library that ComfyUI brings. No exchange
follows a redirect, keeps a cookie or repeats itself, and no error of the library leaves this file, since its errors can
hold the headers of a request.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from ..pulid.errors import AnswerLost, BadAnswer, HostedError, Unreachable

CONNECT_SECONDS = 10
CHUNK = 64 * 1024  # bytes
USER_AGENT = "pulid-sdxl (ComfyUI)"

# Host -> the addresses that may be connected to; raises UnsafeAddress.
Resolve = Callable[[str, int], Awaitable[list[str]]]


@dataclass(frozen=True)
class Reply:
    """An answer, read to its end; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


@dataclass(frozen=True)
class Terms:
    """How long to wait for one exchange in seconds, and how large its answer may be in bytes."""

    seconds: float = 60
    limit: int = 64 * 2**20
    idle: float | None = None  # longest pause between two bytes


DEFAULT_TERMS = Terms()


class Transport(Protocol):
    async def send(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        terms: Terms = DEFAULT_TERMS,
    ) -> Reply:
        """Raises Unreachable when nothing was sent, AnswerLost when something may have been, BadAnswer."""
        ...


class CheckedResolver(AbstractResolver):
    """Looks names up through `resolve`, so that connections go to addresses that were checked, and to no other."""

    def __init__(self, resolve: Resolve):
        self._resolve = resolve

    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_UNSPEC) -> list[dict[str, Any]]:
        return [
            {
                "hostname": host,
                "host": address,
                "port": port,
                "family": socket.AF_INET6 if ":" in address else socket.AF_INET,
                "proto": 0,
                "flags": socket.AI_NUMERICHOST,
            }
            for address in await self._resolve(host, port)
        ]

    async def close(self) -> None:
        pass


class AiohttpTransport:
    """An asynchronous context manager; belongs to the event loop it is entered in.

    resolve  checks and looks up the hosts of all exchanges; the system does when it is None
    """

    def __init__(self, resolve: Resolve | None = None):
        self._resolve = resolve

    async def __aenter__(self) -> "AiohttpTransport":
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_start.append(_once)
        trace.on_connection_create_end.append(_connected)
        resolver = CheckedResolver(self._resolve) if self._resolve else None
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False, force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
            auto_decompress=False,
            trace_configs=[trace],
        )
        return self

    async def __aexit__(self, *_) -> None:
        await self._session.close()

    async def send(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        terms: Terms = DEFAULT_TERMS,
    ) -> Reply:
        progress = SimpleNamespace(connected=False)
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
                trace_request_ctx=progress,
            ) as response:
                names = {name.lower(): value for name, value in response.headers.items()}
                return Reply(response.status, names, await _read(response, url, terms.limit))
        except HostedError as error:
            failure = error
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
            failure = _failure(progress.connected, url, terms, error)
        raise failure from None  # outside of `except`: the library's error and its headers are not even in the context


async def _once(session, context, params) -> None:
    if context.trace_request_ctx.connected:  # the library repeats all calls but POST, on a second connection
        raise AnswerLost("The connection broke off before an answer came.")


async def _connected(session, context, params) -> None:
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
