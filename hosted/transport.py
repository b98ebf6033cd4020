"""One HTTP exchange and what its failure proves, that nothing was accepted or that nobody knows; and repeats of it.

No exchange follows a redirect or keeps a cookie, and no error of the HTTP library leaves this file, since it can hold
the headers of a request. Proxies are those of the environment, as other clients use them.
"""

import asyncio
import random
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.request import getproxies, proxy_bypass

import aiohttp
from aiohttp.abc import AbstractStreamWriter, ResolveResult
from yarl import URL

from .api import parse, read_failure
from .endpoints import is_fals, is_loopback, is_public
from .errors import AnswerLost, BadAnswer, Failure, HostedError, Unreachable, clean

CONNECT_SECONDS = 10
PIECE, SEND_BUFFER = 16 * 1024, 32 * 1024  # bytes that are sent at a time, and that the system may hold back
LOOK_SECONDS = 0.2  # between two looks at whether somebody wants to leave
USER_AGENT = "pulid-sdxl (ComfyUI)"
REPEATS = 6  # of a call that may be repeated
LONGEST_PAUSE = 10.0  # seconds between two of them

KINDS = {  # of the library's errors, in words; their own texts can hold addresses and headers
    aiohttp.ClientHttpProxyError: "the proxy refused it, HTTP {}",
    aiohttp.ClientProxyConnectionError: "the proxy of HTTPS_PROXY cannot be reached",
    aiohttp.ClientConnectorDNSError: "its name was not found",
    aiohttp.ClientConnectorCertificateError: "its certificate is not valid",
    aiohttp.ClientSSLError: "no secure connection",
    asyncio.TimeoutError: "no answer in time",
    aiohttp.ClientConnectorError: "refused",
}
Headers = Mapping[str, str] | None
Sleep = Callable[[float], Awaitable[None]]
Send = Callable[..., Awaitable["Reply"]]  # `send`, below
Leave = Callable[[], None] | None


@dataclass(frozen=True)
class Reply:
    """An answer, read to its end; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    @property
    def json(self) -> Any:
        """What the body holds as JSON; None where it holds none."""
        return parse(self.body)

    @property
    def failure(self) -> Failure:
        """What an answer that is none says about why."""
        return read_failure(self.status, self.headers, self.body)

    def may_pass(self) -> bool:
        """True for a status that may be over in a moment."""
        return self.status in (408, 429, 499) or self.status >= 500


@dataclass(frozen=True)
class Terms:
    """How long to wait for one exchange, and how large its answer may be."""

    seconds: float = 60  # without a byte of the request moving, and then until the whole answer is there
    limit: int = 64 * 2**20  # bytes of the answer
    idle: float | None = None  # seconds between two of them
    public: bool = False  # no name that leads to a private address
    leave: Leave = None  # asked until all is sent; what it raises breaks the exchange off


TERMS = Terms()


class PublicResolver(aiohttp.ThreadedResolver):
    """Looks names up, and refuses every one that leads to an address which is not on the public internet.

    fal's own names are known by TLS instead: VPNs, NAT64 and providers give them addresses that are not public.
    """

    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_UNSPEC) -> list[ResolveResult]:
        found = await super().resolve(host, port, family)
        if is_fals(host) or all(is_public(entry["host"]) for entry in found):
            return found
        raise HostedError(f"{clean(host, 80)} leads to a private address, where no picture can be. It was not read.")


class _Sending(aiohttp.payload.Payload):
    """A body on its way, piece by piece, so that somebody can tell whether it moves and may have left wholly."""

    def __init__(self, body: bytes):
        super().__init__(body, content_type="application/octet-stream")
        self._body, self._size = body, len(body)
        self._clock = asyncio.get_running_loop().time
        self.moved = self._clock()  # when it last did
        self.may_have_arrived = not body  # False as long as the last piece is certainly still here
        self._transport: Any = None

    def stop(self) -> None:
        """Nothing of what is still here leaves any more: a transport that is only closed sends the rest first."""
        if self._transport is not None and not self.may_have_arrived:
            self._transport.abort()

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self._body.decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        self._transport = getattr(writer, "transport", None)
        with suppress(OSError, AttributeError):  # it is gone, which the first piece says
            self._transport.set_write_buffer_limits(high=0)
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        for start in range(0, len(self._body), PIECE):
            self.may_have_arrived = start + PIECE >= len(self._body)
            await writer.write(self._body[start : start + PIECE])
            await writer.drain()
            self.moved = self._clock()


async def send(method: str, url: URL, headers: Headers = None, body: bytes = b"", terms: Terms = TERMS) -> Reply:
    """Raises Unreachable when nothing can have been accepted, AnswerLost when something may, BadAnswer."""
    sending, now = _Sending(body), asyncio.get_running_loop().time
    exchange = asyncio.ensure_future(_exchange(method, url, headers, sending, terms))
    failure: HostedError
    try:
        while not exchange.done():
            left = sending.moved + terms.seconds - now()
            if left <= 0:
                raise asyncio.TimeoutError
            if terms.leave and not sending.may_have_arrived:
                terms.leave()
                left = min(left, LOOK_SECONDS)
            await asyncio.wait({exchange}, timeout=left)
        return exchange.result()
    except HostedError as error:
        failure = error
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
        failure = _failure(sending, url, error)
    finally:
        sending.stop()
        exchange.cancel()
        await asyncio.gather(exchange, return_exceptions=True)
    raise failure from None  # outside of `except`: the library's error and its headers are not even in the context


async def _exchange(method: str, url: URL, headers: Headers, sending: _Sending, terms: Terms) -> Reply:
    proxy = proxy_for(url)
    if proxy and terms.public and not is_fals(url.raw_host or ""):
        # It looks names up itself; what this machine knows to be private is refused all the same.
        with suppress(socket.gaierror, UnicodeError):
            await PublicResolver().resolve(url.raw_host or "", url.port or 443)
    resolver = PublicResolver() if terms.public and not proxy else aiohttp.ThreadedResolver()
    async with (
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False, force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(None, sock_connect=CONNECT_SECONDS, sock_read=terms.idle),
        ) as session,  # without trust_env, which would send what a .netrc holds in the place of the key
        session.request(
            method, url, headers=headers, data=sending if sending.size else None, allow_redirects=False, proxy=proxy
        ) as response,
    ):
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if max(len(body), response.content_length or 0) > terms.limit:
                raise BadAnswer(f"The answer of {url.host} is larger than {terms.limit // 2**20} MiB and was not read.")
        return Reply(response.status, {name.lower(): value for name, value in response.headers.items()}, bytes(body))


def proxy_for(url: URL) -> URL | None:
    """The proxy that the environment names for an address. Raises Unreachable."""
    found = getproxies()
    text = found.get(url.scheme) or found.get("all")
    if not text or is_loopback(url) or proxy_bypass(f"{url.raw_host}:{url.port}"):
        return None
    with suppress(ValueError):
        proxy = URL(text if "://" in text else f"http://{text}")
        if proxy.scheme in ("http", "https") and proxy.host:
            return proxy
    raise Unreachable("HTTPS_PROXY names no proxy of kind http:// that could be used, so nothing was sent.")


def _failure(sending: _Sending, url: URL, error: Exception) -> HostedError:
    words = next((words for kind, words in KINDS.items() if isinstance(error, kind)), type(error).__name__)
    why = words.format(getattr(error, "status", ""))
    if sending.may_have_arrived and not isinstance(error, aiohttp.ClientConnectorError):
        return AnswerLost(f"{url.host} gave no whole answer ({why}).")
    return Unreachable(
        f"{url.host} did not get all of it ({why}), so nothing was accepted. "
        "Check this machine's network, name lookup, clock and proxy, then queue the prompt again."
    )


async def repeated(send: Send, sleep: Sleep, may_pass: Callable[[Reply], bool] = Reply.may_pass) -> Reply:
    """The answer of a call that may be made several times; asks again after a lost one and after a passing failure."""
    for attempt in range(REPEATS):
        reply = None
        with suppress(Unreachable, AnswerLost):
            reply = await send()
            if not may_pass(reply):
                return reply
        await sleep(min(retry_after(reply, attempt), LONGEST_PAUSE))
    return await send()


def retry_after(reply: Reply | None, attempt: int) -> float:
    """Seconds that the service asks to wait, else 0.5, doubled each time; up to half of it is left to chance."""
    with suppress(ValueError):
        asked = float(reply.headers.get("retry-after", "") if reply else "")
        if 0 <= asked < float("inf"):
            return asked
    return 0.5 * 2**attempt * random.uniform(0.5, 1)
