"""Fetches a file of the catalogue: it arrives whole under its name, or not at all.

Python's own urllib does the talking: it follows the usual proxy variables and is there before anything is installed.
The libraries for it do not fit: pooch cannot resume, huggingface_hub knows neither GitHub nor a plain folder.
"""

import errno
import hashlib
import http.client
import os
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from ..pulid.errors import DownloadError, WeightsError
from .catalogue import WeightFile
from .locate import CHUNK, fault_of, not_weights, shown

HUGGING_FACE = "https://huggingface.co"
LARGEST = 8 << 30  # bytes, of a file whose size nobody published
TRIES = 5  # in a row without a new byte
LONGEST_WAIT = 60  # seconds, whatever the server asks for
PROGRESS_SECONDS = 0.1

PASSING = {408, 425, 429, 500, 502, 503, 504}  # answers worth another try
ANSWERS = {
    401: "asks for a login",
    403: "refuses to give it",
    404: "has no such file",
    410: "has no such file any more",
    451: "may not give it in your country",
}
NO_SPACE = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}

Progress = Callable[[int, int | None], None]  # bytes that are there, bytes in all; may raise to stop


@dataclass(frozen=True)
class Connection:
    """The way to the internet.

    endpoint  stands in for https://huggingface.co
    loopback  plain http to this machine is allowed; otherwise every address, redirects too, is https
    seconds   without a byte after which a connection counts as cut
    """

    endpoint: str = HUGGING_FACE
    loopback: bool = False
    seconds: float = 20.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> "Connection":
        """Honours HF_ENDPOINT; urllib itself reads HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY."""
        return cls(endpoint=environment.get("HF_ENDPOINT") or HUGGING_FACE)

    def address(self, record: WeightFile) -> str:
        if not record.url.startswith(f"{HUGGING_FACE}/"):
            return record.url
        return self.endpoint.rstrip("/") + record.url.removeprefix(HUGGING_FACE)

    def allows(self, url: str) -> bool:
        parts = urlsplit(url)
        if "@" in parts.netloc:  # a name and a password
            return False
        local = parts.hostname in ("127.0.0.1", "::1", "localhost")
        return parts.scheme == "https" or (self.loopback and parts.scheme == "http" and local)

    @cached_property
    def _opener(self) -> urllib.request.OpenerDirector:
        context = ssl.create_default_context()
        with suppress(ImportError):  # python.org's Python for macOS brings no certificates of its own
            import certifi

            context.load_verify_locations(certifi.where())
        return urllib.request.build_opener(_Redirects(self), urllib.request.HTTPSHandler(context=context))

    def open(self, url: str, start: int) -> http.client.HTTPResponse:
        """The answer to a request for the file from byte `start`. Nothing that tells who asks is ever sent."""
        if not self.allows(url):
            raise DownloadError(
                f"Expected an https address without a password, found another at {host_of(url)}. Is HF_ENDPOINT right?"
            )
        headers = {"User-Agent": "pulid-sdxl", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        return self._opener.open(urllib.request.Request(url, headers=headers), timeout=self.seconds)


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, connection: Connection):
        self.connection = connection

    def redirect_request(self, request, answer, code, message, headers, newurl):
        if not self.connection.allows(newurl):
            answer.close()
            raise DownloadError(
                f"{host_of(request.full_url)} redirects to {host_of(newurl)} without https, which is not followed."
            )
        return super().redirect_request(request, answer, code, message, headers, newurl)


class _Cut(Exception):
    """The connection ended early; going on from there may help."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


def fetch(
    record: WeightFile,
    folder: Path,
    progress: Progress = lambda done, total: None,
    recognise: Callable[[Path], None] | None = None,
    connection: Connection | None = None,
) -> Path:
    """Fetch the file into `folder` and return its path there. What an earlier try left is gone on from.

    progress   called some times a second and while waiting; what it raises ends the download, and what came is kept
    recognise  raises WeightsError unless the file is what it should be; asked where nobody published a hash

    Several processes may ask for one file at once: one fetches it, the others wait for that.
    Raises DownloadError; then nothing new lies under the file's name.
    """
    connection = connection or Connection.of_environment()
    target = folder / record.name
    before = _identity(target)
    try:
        folder.mkdir(parents=True, exist_ok=True)

        def wait() -> None:
            progress(0, record.size)
            connection.sleep(1)

        with _alone(folder / f"{record.name}.lock", wait):
            if _identity(target) not in (None, before):  # somebody else fetched it while this one waited
                return target
            part = _Download(record, folder, progress, recognise, connection).part()
            os.replace(part, target)
            return target
    except DownloadError as error:
        raise DownloadError(f"{record.name} could not be fetched. {error} {_by_hand(record, target)}") from error
    except OSError as error:
        raise DownloadError(
            f"{record.name} could not be written to {shown(folder)} ({error.strerror or type(error).__name__}). "
            f"{'Make room there' if error.errno in NO_SPACE else 'Check the rights and the disk'}, then run again: "
            f"what came is kept, and the next try goes on from there. {_by_hand(record, target)}"
        ) from error


@dataclass
class _Download:
    record: WeightFile
    folder: Path
    progress: Progress
    recognise: Callable[[Path], None] | None
    connection: Connection
    told: float = -1.0  # when progress was last told

    def part(self) -> Path:
        """The whole file, checked, under its temporary name."""
        resumed = bool(self._kept())
        failures = 0
        while True:
            part = self._kept()
            before = part.stat().st_size if part else 0
            try:
                part = part if part and before == self.record.size else self._receive(part)
                break
            except _Cut as cut:
                part = self._kept()
                size = part.stat().st_size if part else 0
                failures = 0 if size > before else failures + 1
                if failures == TRIES:
                    raise DownloadError(f"{cut} {TRIES} times in a row. {_kept_words(part, size)}Try later.") from cut
                self._wait(min(cut.wait or 2.0**failures, LONGEST_WAIT), size)
        fault = self._fault(part)
        if fault is None:
            return part
        part.unlink()
        if resumed:  # what an earlier try left may have been the bad part
            return self.part()
        raise DownloadError(f"{self._host} gave something else than its maker published: {fault}. It was deleted.")

    def _receive(self, part: Path | None) -> Path:
        """Append to the part, or begin one, until the server has no more; _Cut where it ends early."""
        start = part.stat().st_size if part else 0
        with self._answer(start) as answer:
            tag = self._tag(answer.headers)
            begins = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
            goes_on = answer.status == 206 and begins and int(begins[1]) == start and part == self._part(tag)
            if part and not goes_on:
                part.unlink()
                if answer.status == 206:  # the middle of another file: ask for its beginning
                    return self._receive(None)
                start = 0
            length = answer.headers.get("Content-Length")
            total = start + int(length) if length and length.isdecimal() else self.record.size
            self._check_offer(answer, start, total)
            part = self._part(tag)
            with part.open("ab") as file:
                end = self._write(answer, file, start, total)
            if total and end < total:
                raise _Cut(f"{self._host} stopped after {end} of {total} bytes")
            return part

    def _answer(self, start: int) -> http.client.HTTPResponse:
        try:
            return self.connection.open(self.connection.address(self.record), start)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 416:  # more is kept than the server has
                    for part in self._parts():
                        part.unlink()
                    raise _Cut(f"{self._host} has a shorter file than was kept") from error
                if error.code in PASSING:
                    asked = error.headers.get("Retry-After", "")
                    wait = float(asked) if asked.isdecimal() else None
                    raise _Cut(f"{self._host} is busy or broken (HTTP {error.code})", wait) from error
                words = ANSWERS.get(error.code, "did not give it")
                mirror = " Unset HF_ENDPOINT to ask huggingface.co." if self._mirrored else ""
                raise DownloadError(f"{self._host} {words} (HTTP {error.code}).{mirror}") from error
        except urllib.error.URLError as error:
            raise self._unreachable(error.reason) from error
        except (OSError, http.client.HTTPException) as error:
            raise _Cut(f"{self._host} broke the connection off ({type(error).__name__})") from error

    def _unreachable(self, reason: object) -> Exception:
        if isinstance(reason, socket.gaierror):
            return DownloadError(
                f"{self._host} cannot be found: this machine is offline, or needs a proxy (HTTPS_PROXY) or a mirror "
                "(HF_ENDPOINT)."
            )
        if isinstance(reason, ssl.SSLCertVerificationError):
            return DownloadError(
                f"The certificate of {self._host} cannot be trusted ({reason.verify_message}): a proxy or a virus "
                "scanner may be in between. Name its certificate in SSL_CERT_FILE."
            )
        return _Cut(f"{self._host} cannot be reached ({getattr(reason, 'strerror', None) or reason})")

    def _check_offer(self, answer: http.client.HTTPResponse, start: int, total: int | None) -> None:
        if answer.headers.get_content_type() == "text/html":
            raise DownloadError(
                f"{self._host} answered with a web page instead of the file: a login, a notice of your network, or a "
                "mirror that lacks it."
            )
        if None not in (total, self.record.size) and total != self.record.size:
            raise DownloadError(f"Expected {self.record.size} bytes, {self._host} offers {total}: another file.")
        missing = (total or self.record.size or 0) - start
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            raise DownloadError(
                f"It needs {missing / 1e6:.0f} MB more, and {shown(self.folder)} has {free / 1e6:.0f} MB free. "
                "Make room there."
            )

    def _write(self, answer: http.client.HTTPResponse, file, start: int, total: int | None) -> int:
        end = start
        try:
            while chunk := self._read(answer):
                if end == 0 and (verdict := not_weights(chunk[:64])):
                    raise DownloadError(f"What {self._host} gave {verdict}.")
                end += len(chunk)
                if end > (self.record.size or LARGEST):
                    raise DownloadError(
                        f"{self._host} sends more than {self.record.size or LARGEST} bytes: another file."
                    )
                file.write(chunk)
                self._tell(end, total)
        finally:
            file.flush()
            os.fsync(file.fileno())
        self._tell(end, total, last=True)
        return end

    def _read(self, answer: http.client.HTTPResponse) -> bytes:
        try:
            return answer.read1(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _Cut(f"{self._host} broke the connection off ({type(error).__name__})") from error

    def _tell(self, done: int, total: int | None, last: bool = False) -> None:
        now = self.connection.clock()
        if last or now - self.told >= PROGRESS_SECONDS:
            self.told = now
            self.progress(done, total)

    def _wait(self, seconds: float, done: int) -> None:
        while seconds > 0:
            self.progress(done, self.record.size)
            self.connection.sleep(min(seconds, 1.0))
            seconds -= 1.0

    def _fault(self, part: Path) -> str | None:
        """What keeps the file from being what was asked for."""
        size = part.stat().st_size
        if fault := fault_of(self.record, part, lambda done: self._tell(size, size)):
            return fault
        if self.recognise and not self.record.sha256:
            try:
                self.recognise(part)
            except WeightsError as error:
                return str(error)
        return None

    # A part carries in its name which file it is the beginning of: the published hash, else what the server calls its
    # version. Without either it is never gone on from.

    def _tag(self, headers) -> str | None:
        version = headers.get("ETag") or headers.get("Last-Modified")
        if self.record.sha256 or not version:
            return self.record.sha256
        return hashlib.sha256(version.encode()).hexdigest()

    def _part(self, tag: str | None) -> Path:
        return self.folder / f"{self.record.name}.{(tag or 'unversioned')[:12]}.part"

    def _parts(self) -> list[Path]:
        pattern = re.compile(re.escape(self.record.name) + r"\.\w{1,12}\.part")
        return sorted(path for path in self.folder.iterdir() if pattern.fullmatch(path.name))

    def _kept(self) -> Path | None:
        """What an earlier try left and this one may go on from; anything else it left is deleted."""
        *old, part = [None, *self._parts()]
        useless = part and (part == self._part(None) or part.stat().st_size > (self.record.size or float("inf")))
        for path in filter(None, (*old, part if useless else None)):
            path.unlink()
        return None if useless else part

    @property
    def _host(self) -> str:
        return host_of(self.connection.address(self.record))

    @property
    def _mirrored(self) -> bool:
        return self.connection.address(self.record) != self.record.url


def host_of(url: str) -> str:
    """The host alone: what follows it may hold a signature, what precedes it a password."""
    return urlsplit(url).hostname or "an address without a host"


def _by_hand(record: WeightFile, target: Path) -> str:
    return f"By hand: download {record.url} and put it at {shown(target)}."


def _kept_words(part: Path | None, size: int) -> str:
    return f"{size} bytes are kept in {part.name}, and the next try goes on from there. " if part else ""


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def _alone(path: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock between processes. The system lifts it when its process ends, however that ends."""
    while True:
        file = path.open("ab")
        try:
            if _lock(file) and _is_still(path, file):
                break
        except BaseException:
            file.close()
            raise
        file.close()
        wait()
    try:
        yield
    finally:
        if os.name == "nt":  # an open file cannot be deleted there, and one that somebody waits for neither
            file.close()
            with suppress(OSError):
                path.unlink()
        else:
            path.unlink(missing_ok=True)
            file.close()


def _lock(file) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _is_still(path: Path, file) -> bool:
    """Whether the file that was locked is the one that lies there, not one that its last holder deleted."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
