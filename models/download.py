"""Fetches a file of the catalogue from Hugging Face: it arrives whole under its name, or not at all.

huggingface_hub does the talking, in a process of its own (hub_process.py): HF_ENDPOINT, HF_TOKEN, proxies and
certificates are its business. Source: https://huggingface.co/docs/huggingface_hub/guides/download
"""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from ..pulid.errors import DownloadError, WeightsError
from ..pulid.packages import import_package
from .catalogue import Copy, WeightFile
from .locate import fault_of, file_state, in_the_way, shown

HUGGING_FACE = "https://huggingface.co"
STAGING = ".pulid-download"  # a folder beside the file, for what is not whole yet
PROGRAM = Path(__file__).with_name("hub_process.py")
POLL = 0.1  # seconds between two looks at what has come

ANSWERS = {
    401: "asks for a login, or has no such repository; if HF_TOKEN is set, is it right?",
    403: "refuses to give it",
    404: "has no such file",
    410: "has no such file any more",
    429: "is asked too often",
    451: "may not give it in your country",
}
REASONS = {  # by a kind of error among its causes
    "gaierror": "cannot be found: this machine is offline, or needs a proxy (HTTPS_PROXY) or a mirror (HF_ENDPOINT).",
    "SSLCertVerificationError": "shows a certificate that cannot be trusted: a proxy or a virus scanner may be in "
    "between. Name its certificate in SSL_CERT_FILE and REQUESTS_CA_BUNDLE.",
    "OfflineModeIsEnabled": "is not asked while HF_HUB_OFFLINE is set.",
    **dict.fromkeys(
        ("ImportError", "AttributeError", "TypeError"),
        "is not asked: this huggingface_hub lacks what is needed here. Install its newest version.",
    ),
}
NO_ROOM = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}

Progress = Callable[[int, int | None], None]  # bytes that are there, bytes in all; may raise to stop
Recognise = Callable[[Path], None]


class _Refused(Exception):
    """This copy cannot be had; another one may."""


def fetch(
    record: WeightFile,
    folder: Path,
    progress: Progress = lambda done, total: None,
    recognise: Recognise | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Path:
    """Fetch the file into `folder` and return its path there. What an earlier try left is gone on from.

    progress     called some times a second and while waiting; what it raises ends the download, and what came is kept
    recognise    raises WeightsError unless the file is what it should be; asked where nobody published a hash
    environment  variables of huggingface_hub, HF_ENDPOINT and HF_TOKEN among them

    Several processes may ask for one file at once: one fetches it, the others wait for that.
    Raises DownloadError, then nothing new lies under the file's name; MissingPackage without huggingface_hub.
    """
    import_package("huggingface_hub")
    target, staging = folder / record.name, folder.absolute() / STAGING
    before = _state(target)
    try:
        with _alone(staging / f"{record.name}.lock", lambda: progress(0, record.size)):
            if _state(target) in (None, before):  # else somebody fetched it while this one waited
                os.replace(_Download(record, staging, progress, recognise, environment).part(), target)
        return target
    except DownloadError as error:
        by_hand = f"By hand: download {record.url} and put it at {shown(target)}."
        raise DownloadError(f"{record.name} could not be fetched. {error} {by_hand}") from error
    except OSError as error:
        raise DownloadError(
            f"{record.name} could not be written to {shown(folder)} ({error.strerror or type(error).__name__}). "
            + (in_the_way(target) or "Check the rights and the disk, or name another folder in extra_model_paths.yaml.")
            + " Then run again."
        ) from error


@dataclass
class _Download:
    """One file on its way into the folder for what is not whole yet; the rest as for `fetch`."""

    record: WeightFile
    staging: Path
    progress: Progress
    recognise: Recognise | None
    environment: Mapping[str, str]

    @property
    def host(self) -> str:
        """Who is asked; the rest of an address may hold a password."""
        return urlsplit(self.environment.get("HF_ENDPOINT") or HUGGING_FACE).hostname or "an address without a host"

    def part(self) -> Path:
        """The whole file, checked, under a temporary name. Asks one copy after the other."""
        refusals = []
        for copy in _in_order(self.record):
            # What it is the beginning of: bytes of one hash come from any copy, those of a commit from there alone.
            part = self.staging / f"{self.record.name}.{(self.record.sha256 or copy.revision)[:12]}.part"
            try:
                self._receive_whole(copy, part)
                return part
            except _Refused as error:
                refusals.append(str(error))
        mirror = " Unset HF_ENDPOINT to ask huggingface.co." if self.host != urlsplit(HUGGING_FACE).hostname else ""
        raise DownloadError(" ".join(dict.fromkeys(refusals)) + mirror if refusals else "It is to be had by hand only.")

    def _receive_whole(self, copy: Copy, part: Path) -> None:
        began = _size(part)
        if began != self.record.size:
            self._receive(copy, part)
        if fault := self._fault(part):
            part.unlink()
            if began:  # what an earlier try left may have been the bad part
                return self._receive_whole(copy, part)
            raise _Refused(f"{self.host} gave something else for {copy.repo_id} than was published: {fault}.")
        return None

    def _receive(self, copy: Copy, part: Path) -> None:
        """Ask again while each try brings more: until version 2, huggingface_hub gives up where a connection is cut."""
        before = _size(part)
        while answer := self._ask(copy, part):
            cut = not answer.get("status") and answer.get("kinds") and answer.get("errno") not in NO_ROOM
            if not cut or _size(part) <= before:
                self._tell(answer, part)
            before = _size(part)

    def _ask(self, copy: Copy, part: Path) -> dict[str, Any]:
        """What hub_process.py reports: nothing if all went well."""
        alone = ["-s"] if sys.flags.no_user_site else []  # how ComfyUI's portable Python is started
        names = [copy.repo_id, copy.path, copy.revision, str(part), str(self.record.size or 0)]
        with subprocess.Popen(
            [sys.executable, *alone, str(PROGRAM), *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**self.environment, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        ) as process:
            try:
                while process.poll() is None:
                    self.progress(_size(part), self.record.size)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(POLL)
            except BaseException:
                process.kill()
                raise
            said = process.stdout.read() if process.stdout else b""
        return json.loads(said) if said else {"kinds": [f"exit code {process.returncode}"]}

    def _tell(self, answer: dict[str, Any], part: Path) -> NoReturn:
        """Raise it in words."""
        status, kinds = answer.get("status"), answer.get("kinds", ())
        room = f"Make room at {shown(self.staging.parent)}"
        kept = f" {_size(part)} bytes are kept, and the next try goes on from there." if _size(part) else ""
        if "offered" in answer:
            raise _Refused(
                f"Expected {self.record.size} bytes, {self.host} offers {answer['offered']}: another file, or a login "
                "or notice of your network."
            )
        if status:
            words = ANSWERS.get(status, "is busy or broken" if status >= 500 else "did not give it")
            raise _Refused(f"{self.host} {words} (HTTP {status}).")
        if "missing" in answer:
            need, free = (f"{answer[key] / 1e6:.0f} MB" for key in ("missing", "free"))
            raise DownloadError(f"It needs {need} more, and {free} are free. {room}.")
        if answer.get("errno") in NO_ROOM:
            raise DownloadError(f"The disk is full. {room}, then run again.{kept}")
        words = f"cannot be reached, or broke the connection off ({kinds[0]}). Try later."
        words = next((REASONS[kind] for kind in kinds if kind in REASONS), words)
        raise DownloadError(f"{self.host} {words}{kept}")

    def _fault(self, part: Path) -> str | None:
        """What keeps the file from being what was asked for."""
        size = _size(part)
        if fault := fault_of(self.record, part, lambda done: self.progress(size, size)):
            return fault
        if self.recognise and not self.record.sha256:
            try:
                self.recognise(part)
            except WeightsError as error:
                return str(error)
        self.progress(size, size)
        return None


def _in_order(record: WeightFile) -> Iterator[Copy]:
    """The copies, then `main` of those at a commit, which is gone once its owner rewrites history: the hash decides."""
    yield from record.copies
    if record.sha256:
        yield from (replace(copy, revision="main") for copy in record.copies if copy.pinned)


def _state(path: Path) -> tuple[str, int, int] | None:
    with suppress(OSError):
        return file_state(path)
    return None


def _size(path: Path) -> int:
    return (_state(path) or ("", 0, 0))[1]


@contextmanager
def _alone(path: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock between processes. The system lifts it when its process ends, however that ends."""
    filelock = import_package("filelock")
    lock = filelock.FileLock(str(path))
    while not lock.is_locked:
        path.parent.mkdir(parents=True, exist_ok=True)  # its last holder may just have removed it
        with suppress(filelock.Timeout, FileNotFoundError):
            lock.acquire(timeout=POLL)
            break
        wait()
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):  # another waits for it, or a part is kept
            path.unlink(missing_ok=True)
            path.parent.rmdir()
