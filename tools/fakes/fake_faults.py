"""What can go wrong between a client and the hosted service; `FakeFal.plan` puts one of these on a route.

A fault is given the call and answers in the place of the server; `call.handle()` is what the server would have done.
"""

import asyncio
import contextlib
import json
import struct
import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

PIECE = 64 << 10  # bytes


@dataclass(frozen=True)
class Call:
    """One request that a fault takes over.

    handle   the server's own answer, with all that it does on the way: after it, a submit is accepted and billed
    closing  set when the server stops or is reset; a fault that holds a connection ends then
    """

    request: web.Request
    handle: Callable[[], Awaitable[web.Response]]
    closing: asyncio.Event

    def drop(self) -> web.Response:
        """Cut the connection: a reset where the client still sends or waits."""
        if self.request.transport is not None:  # None: the client was faster
            self.request.transport.abort()
        return web.Response()

    def send(self, content: bytes) -> bool:
        """Write to the connection as is; False once it is gone."""
        transport = self.request.transport
        if transport is None or transport.is_closing():
            return False
        transport.write(content)
        return True

    def close(self) -> web.Response:
        if self.request.transport is not None:
            self.request.transport.close()
        return web.Response()

    async def wait(self, seconds: float | None = None) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.closing.wait(), seconds)


Fault = Callable[[Call], Awaitable[web.StreamResponse]]


def head(response: web.Response, length: int | None) -> bytes:
    """The start of an HTTP/1.1 answer, with this content length instead of the true one; None leaves it out."""
    headers = {**response.headers, "Connection": "close"}
    headers = {name: value for name, value in headers.items() if name.lower() != "content-length"}
    if length is not None:
        headers["Content-Length"] = str(length)
    lines = [f"HTTP/1.1 {response.status} {response.reason}", *(f"{name}: {headers[name]}" for name in headers)]
    return "\r\n".join([*lines, "", ""]).encode()


# --- the connection ---


async def right(call: Call) -> web.StreamResponse:
    """What the server would have answered."""
    return await call.handle()


async def reset(call: Call) -> web.StreamResponse:
    """Cut: nothing was accepted."""
    return call.drop()


async def stall(call: Call) -> web.StreamResponse:
    """Nothing is accepted and nothing comes: for the client's own timeout."""
    await call.wait()
    return call.drop()


def accepted(then: Fault) -> Fault:
    """The request is taken, its answer never leaves, and this happens."""

    async def fault(call: Call) -> web.StreamResponse:
        await call.handle()
        return await then(call)

    return fault


accept_then_drop, accept_then_stall = accepted(reset), accepted(stall)


def once(holds: Callable[[], object], then: Fault = right) -> Fault:
    """The right answer or another fault, as soon as this holds."""

    async def fault(call: Call) -> web.StreamResponse:
        while not holds() and not call.closing.is_set():
            await call.wait(0.01)
        return await then(call)

    return fault


BEFORE_BODY: set[Fault] = {reset}  # act while the body is still on its way


def unread(then: Fault) -> Fault:
    """The start of the body is read, and then this happens."""

    async def fault(call: Call) -> web.StreamResponse:
        await call.request.content.readany()
        await call.wait(0.1)
        return await then(call)

    BEFORE_BODY.add(fault)
    return fault


def read_slowly(pause: float) -> Fault:
    """The right answer to a body that is read in pieces, so long after each other."""

    async def fault(call: Call) -> web.StreamResponse:
        body = bytearray()
        while chunk := await call.request.content.read(PIECE):
            body += chunk
            await call.wait(pause)
        call.request._read_bytes = bytes(body)
        return await call.handle()

    BEFORE_BODY.add(fault)
    return fault


def drip(seconds: float) -> Fault:
    """The right answer, byte by byte with `seconds` between them."""

    async def fault(call: Call) -> web.StreamResponse:
        response = await call.handle()
        call.send(head(response, len(response.body)))
        for byte in response.body:
            if call.closing.is_set() or not call.send(bytes([byte])):
                break
            await call.wait(seconds)
        return call.close()

    return fault


def partly(declared: float, sent: float) -> Fault:
    """The right answer, with a content length of one part of the body, and another part of it."""

    async def fault(call: Call) -> web.StreamResponse:
        response = await call.handle()
        size = len(response.body)
        call.send(head(response, int(size * declared)) + response.body[: int(size * sent)])
        return call.close()

    return fault


truncated, wrong_length = partly(1, 0.5), partly(0.5, 1)


# --- the answer ---


def answer(
    status: int, body: Any = None, headers: Mapping[str, str] | None = None, content_type: str = "application/json"
) -> Fault:
    """This answer and nothing done. Text and bytes go as they are, everything else as JSON."""
    content = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()

    async def fault(call: Call) -> web.StreamResponse:
        await call.request.read()
        return web.Response(status=status, body=content, content_type=content_type, headers=headers)

    return fault


def gateway(status: int) -> Fault:
    """The page that a gateway sends when what lies behind it is away; whether that had taken the request is unknown."""
    page = f"<html>\r\n<head><title>{status}</title></head>\r\n<body><center>nginx</center></body>\r\n</html>\r\n"
    return answer(status, page, content_type="text/html")


def busy(retry_after: str | None = None) -> Fault:
    return answer(429, {"detail": "Too many requests"}, {"Retry-After": retry_after} if retry_after else None)


def redirect(target: str, status: int = 302) -> Fault:
    return answer(status, b"", {"Location": target})


def model_error(status: int, detail: Any, retryable: bool | None = None, error_type: str | None = None) -> Fault:
    """An error of the model, `detail` as a list or a string, or, with `error_type`, one of the infrastructure."""
    headers = {"x-fal-request-id": "fake"}
    if retryable is not None:
        headers["X-Fal-Retryable"] = str(retryable).lower()
    if error_type is None:
        return answer(status, {"detail": detail}, headers)
    return answer(status, {"detail": detail, "error_type": error_type}, {**headers, "X-Fal-Error-Type": error_type})


def altered(change: Callable[[Any], Any]) -> Fault:
    """The right answer, with its JSON changed: `change` gets it, and returns another or changes that one in place."""

    async def fault(call: Call) -> web.StreamResponse:
        response = await call.handle()
        data = json.loads(response.body)
        changed = change(data)
        headers = {name: value for name, value in response.headers.items() if name.lower().startswith("x-fal-")}
        return web.json_response(data if changed is None else changed, status=response.status, headers=headers)

    return fault


def without(*names: str) -> Fault:
    """The right answer without these keys."""
    return altered(lambda data: {name: value for name, value in data.items() if name not in names})


def with_values(**values: Any) -> Fault:
    """The right answer with these keys set: an unknown status, logs null, a seed beyond 64 bits, an error."""
    return altered(lambda data: {**data, **values})


# --- pictures ---


def served(content: bytes, content_type: str = "image/png") -> Fault:
    """These bytes, whatever was asked for."""
    return answer(200, content, content_type=content_type)


def endless(content_type: str = "image/png") -> Fault:
    """A body without a declared length that goes on until the client leaves."""

    async def fault(call: Call) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": content_type})
        await response.prepare(call.request)
        try:
            await response.write(b"\x89PNG\r\n\x1a\n")
            while not call.closing.is_set():
                await response.write(bytes(PIECE))
        except ConnectionError:
            pass
        return response

    return fault


def declared(length: int, content_type: str = "image/png") -> Fault:
    """A content length of so many bytes, and a few of them."""

    async def fault(call: Call) -> web.StreamResponse:
        call.send(head(web.Response(content_type=content_type), length) + b"\x89PNG\r\n\x1a\n")
        await call.wait()
        return call.close()

    return fault


def png_bomb(side: int = 30_000) -> bytes:
    """A sound PNG of `side` x `side` black pixels, a thousandth of that in size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    grey_bit = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side + 7) // 8 + 1) * side, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", grey_bit) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
