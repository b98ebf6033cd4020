"""A file server on this machine that goes wrong as asked: stands in for the addresses that weights come from."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Behaviour = Callable[["Handler"], None]


class FileServer(ThreadingHTTPServer):
    """Serves `content` at every path, with ranges. `plan` has what to do with the coming requests, then it serves."""

    daemon_threads = True

    def __init__(self, content: bytes, plan: list[Behaviour], etag: str | None = '"first"'):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.plan, self.etag = content, plan, etag
        self.requests: list[tuple[str, dict[str, str]]] = []  # path, headers
        self.sent = 0  # bytes of content
        self.stopping = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for _, headers in self.requests]

    def handle_error(self, request, client_address):
        pass  # clients that go away are what is tested


class Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers)))
        behaviour = self.server.plan.pop(0) if self.server.plan else whole
        behaviour(self)

    def log_message(self, *_):
        pass

    @property
    def start(self) -> int:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(asked[1]) if asked else 0

    def head(self, code: int, **headers: object) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def head_of_content(self, content: bytes) -> None:
        versioned = {"ETag": self.server.etag} if self.server.etag else {}
        length = len(content) - self.start
        if self.start:
            span = f"bytes {self.start}-{len(content) - 1}/{len(content)}"
            self.head(206, Content_Range=span, Content_Length=length, **versioned)
        else:
            self.head(200, Content_Length=length, Content_Type="application/octet-stream", **versioned)

    def body(self, content: bytes) -> None:
        self.wfile.write(content)
        self.wfile.flush()
        self.server.sent += len(content)


def whole(handler: Handler) -> None:
    content = handler.server.content
    if handler.start >= len(content):
        return handler.head(416, Content_Range=f"bytes */{len(content)}")
    handler.head_of_content(content)
    handler.body(content[handler.start :])
    return None


def cut_after(length: int) -> Behaviour:
    """Promises all, and hangs up after `length` bytes more."""

    def behaviour(handler: Handler) -> None:
        content = handler.server.content
        handler.head_of_content(content)
        handler.body(content[handler.start : handler.start + length])
        handler.close_connection = True

    return behaviour


def stall_after(length: int) -> Behaviour:
    """Promises all, and falls silent after `length` bytes more."""

    def behaviour(handler: Handler) -> None:
        cut_after(length)(handler)
        handler.server.stopping.wait(30)

    return behaviour


def slowly(pieces: int, seconds: float) -> Behaviour:
    """Serves in `pieces`, with a pause after each."""

    def behaviour(handler: Handler) -> None:
        content = handler.server.content[handler.start :]
        handler.head_of_content(handler.server.content)
        step = -(-len(content) // pieces)
        with suppress(OSError):
            for at in range(0, len(content), step):
                handler.body(content[at : at + step])
                time.sleep(seconds)

    return behaviour


def answer(code: int, body: bytes = b"", **headers: object) -> Behaviour:
    def behaviour(handler: Handler) -> None:
        handler.head(code, Content_Length=len(body), **headers)
        handler.wfile.write(body)

    return behaviour


def without_length(content: bytes | None = None) -> Behaviour:
    """Neither length nor version, and no ranges: all of it until the connection closes."""

    def behaviour(handler: Handler) -> None:
        handler.head(200)
        handler.body(handler.server.content if content is None else content)

    return behaviour


def hang_up(handler: Handler) -> None:
    handler.close_connection = True


@contextmanager
def serving(content: bytes, *plan: Behaviour, etag: str | None = '"first"') -> Iterator[FileServer]:
    server = FileServer(content, list(plan), etag)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()
