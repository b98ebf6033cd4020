"""A Hugging Face on this machine that goes wrong as asked. HF_ENDPOINT leads huggingface_hub to it.

It answers HEAD and GET of /OWNER/REPO/resolve/REVISION/PATH, as far as huggingface_hub reads that for weight files:
https://huggingface.co/docs/huggingface_hub/package_reference/file_download
"""

import datetime
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Behaviour = Callable[["Handler"], None]
COMMIT = "0123456789" * 4


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]


class FakeHub(ThreadingHTTPServer):
    """Serves `content` at every path, or what it holds for the file's name. `plan` has what to do with the coming
    requests, then it serves: whole answers are for any of them, all else for a GET."""

    daemon_threads = True

    def __init__(self, content: bytes | Mapping[str, bytes], plan: list[Behaviour]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.plan = content, plan
        self.requests: list[Request] = []
        self.sent = 0  # bytes of content
        self.stopping = threading.Event()

    def show_a_certificate(self, folder: Path) -> None:
        """Speak TLS from now on, with a certificate that nobody vouches for, made in this folder."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fake")])
        now, day = datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(days=1)
        built = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - day, now + day)
        form = serialization.Encoding.PEM
        private = key.private_bytes(form, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        both = folder / "both.pem"
        both.write_bytes(private + built.sign(key, hashes.SHA256()).public_bytes(form))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(both)
        self.socket = context.wrap_socket(self.socket, server_side=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def fetched(self) -> list[str]:
        """Repository and path of every GET, without the revision."""
        paths = [request.path for request in self.requests if request.method == "GET"]
        return [re.sub(r"^/|resolve/[^/]+/", "", path) for path in paths]

    @property
    def ranges(self) -> list[str | None]:
        return [request.headers.get("range") for request in self.requests if request.method == "GET"]

    def content_of(self, path: str) -> bytes:
        return self.content if isinstance(self.content, bytes) else self.content[path.rpartition("/")[2]]

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that go away are what is tested


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        if self.path.startswith("/api/"):  # what huggingface_hub 2 asks for its User-Agent
            return self.head(404, Content_Length=0)
        self.note()
        behaviour = self.server.plan.pop(0) if self.server.plan else whole
        return behaviour(self)

    def do_HEAD(self) -> None:
        self.note()
        if self.server.plan and isinstance(self.server.plan[0], Answer):
            self.server.plan.pop(0)(self)
        else:
            self.head_of_content()

    def note(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append(Request(self.command, self.path, headers))

    def log_message(self, *_: object) -> None:
        pass

    @property
    def content(self) -> bytes:
        return self.server.content_of(self.path)

    @property
    def start(self) -> int:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(asked[1]) if asked else 0

    def head(self, code: int, **headers: object) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def head_of_content(self) -> None:
        size = len(self.content)
        about = {"ETag": f'"{size}"', "X_Repo_Commit": COMMIT, "Content_Length": size - self.start}
        if self.start >= size > 0:
            self.head(416, Content_Range=f"bytes */{size}", Content_Length=0)
        elif self.start:
            self.head(206, Content_Range=f"bytes {self.start}-{size - 1}/{size}", **about)
        else:
            self.head(200, **about)

    def body(self, content: bytes) -> None:
        self.wfile.write(content)
        self.wfile.flush()
        self.server.sent += len(content)


@dataclass(frozen=True)
class Answer:
    """The whole answer to a request of any kind."""

    code: int
    headers: Mapping[str, object]

    def __call__(self, handler: Handler) -> None:
        handler.head(self.code, **{"Content_Length": 0, **self.headers})


def answer(code: int, **headers: object) -> Behaviour:
    return Answer(code, headers)


def whole(handler: Handler) -> None:
    handler.head_of_content()
    handler.body(handler.content[handler.start :])


def cut_after(length: int) -> Behaviour:
    """Promises all, and hangs up after `length` bytes more."""

    def behaviour(handler: Handler) -> None:
        handler.head_of_content()
        handler.body(handler.content[handler.start : handler.start + length])
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
        content = handler.content[handler.start :]
        handler.head_of_content()
        step = -(-len(content) // pieces)
        with suppress(OSError):
            for at in range(0, len(content), step):
                handler.body(content[at : at + step])
                time.sleep(seconds)

    return behaviour


@contextmanager
def serving(content: bytes | Mapping[str, bytes], *plan: Behaviour) -> Iterator[FakeHub]:
    server = FakeHub(content, list(plan))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()
