"""What goes wrong with the hosted service: the exceptions, and what a failure is called and what to do next.

    HostedError           the hosted service, or the way to it
    ├── MissingKey        there is no key that could be used
    ├── Unreachable       no connection came about: nothing was sent
    ├── AnswerLost        sent, but no whole answer came back
    ├── BadAnswer         an answer that means nothing (not JSON, fields missing, not a picture)
    ├── Refused           the service said no, and nothing runs
    ├── AmbiguousSubmit   a request may have been accepted and billed, and nobody knows
    ├── JobFailed         accepted, and then it failed
    │   └── JobCancelled  it ended because somebody asked for it
    ├── HostedLimit       a limit of time, or of pictures, that the user has set
    ├── UnsafeAddress     an address that must not be read from or sent to
    └── Interrupted       the user stopped waiting

Kinds of failures are from https://docs.fal.ai/errors and
https://fal.ai/docs/documentation/model-apis/request-errors.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..pulid.errors import PulidError


class HostedError(PulidError):
    """The hosted service, or the way to it."""


class MissingKey(HostedError):
    """There is no key that could be used."""


class Unreachable(HostedError, ConnectionError):
    """No connection came about, so nothing was sent."""


class AnswerLost(HostedError, ConnectionError):
    """A request was sent, wholly or in part, and no whole answer came back."""


class BadAnswer(HostedError, ValueError):
    """An answer that means nothing."""


class Refused(HostedError):
    """The service said no, and nothing runs."""


class AmbiguousSubmit(HostedError):
    """A request may have been accepted and billed, and nobody knows."""


class JobFailed(HostedError):
    """A request was accepted, and then failed."""


class JobCancelled(JobFailed):
    """A request was accepted, and ended because somebody asked for it."""


class HostedLimit(HostedError):
    """A limit of time, or of pictures, that the user has set."""


class UnsafeAddress(HostedError, ValueError):
    """An address that must not be read from or sent to."""


class Interrupted(HostedError):
    """The user stopped waiting."""


# --- What a failure is called ---

NOT_BILLED = "By fal's terms it was not billed. Queue the prompt again to send it once more."
HOSTS = (
    "The address must be readable by anyone; some hosts block such readers, limit them, or take them for robots. "
    "Connect the picture itself instead, or upload it."
)
CANCELLED = "It was cancelled. Queue the prompt again to send it anew."
NOT_STARTED = "No machine took it up in time, so nothing ran. Queue the prompt again."
BY_KIND = {
    "content_policy_violation": "The service's content check refused it. It is not sent again.",
    "face_detection_error": "The service found no face there. Use a photograph with a clear, large face.",
    "file_download_error": f"The service could not fetch it. {HOSTS}",
    "image_load_error": f"The service could not read it as a picture. {HOSTS}",
    "file_too_large": "Use a smaller file, or leave reference_size at 1024.",
    "client_cancelled": CANCELLED,
    "client_disconnected": CANCELLED,
    "startup_timeout": NOT_STARTED,
}
BY_STATUS = {
    400: "The service did not understand the request.",
    401: "The key is wrong, or missing. Check FAL_KEY or the key file; it reads id:secret.",
    403: "The key's scope does not allow this model. Make a key of scope API at fal.ai/dashboard/keys.",
    404: "The service does not know it: the request id is wrong or of another account, or it has expired.",
    405: "The address, probably a proxy, does not pass this kind of call.",
    408: NOT_STARTED,
    412: "The proxy does not accept this address as its target.",
    413: "The request is too large. Set transport to upload.",
    415: "The proxy does not pass this kind of content.",
    422: "The service refused these values. Time that a machine spent on them may still be charged.",
    429: "The service is busy, or a limit of this account is reached. Wait a little and queue the prompt again.",
    499: CANCELLED,
}
LOCKED = (
    "The account is locked, mostly for its balance: see fal.ai/dashboard/billing. "
    "A lock that stays after a top-up needs fal's support."
)
GOES_ON = (
    " Queue the prompt again to ask once more: it is not sent a second time. Where the service no longer knows it, "
    "force_resubmit sends it anew."
)
OUTCOME_UNKNOWN = (
    "The request may have been accepted and billed. It is not sent again on its own: look at "
    "fal.ai/dashboard/requests. If it is there, fetch its pictures by its id (PuLID Hosted Result); "
    "if it is not, switch force_resubmit on to send it again."
)
LONGEST_DETAIL = 600  # characters of the service's own words


@dataclass(frozen=True)
class Problem:
    """One thing that the service says is wrong: where, what, and its kind, each "" where it does not say."""

    where: str
    message: str
    kind: str = ""

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.where, self.message)))


@dataclass(frozen=True)
class Failure:
    """What the service says about a failure. `retryable` is None where it does not say."""

    status: int
    problems: tuple[Problem, ...]
    retryable: bool | None = None
    own_limit: bool = False  # the service gave up at the limit that the request itself named
    units: str = ""  # that the service billed for it

    @property
    def kinds(self) -> set[str]:
        return {problem.kind for problem in self.problems} - {""}

    def words(self, doing: str, request_id: str = "") -> str:
        """`doing` is the half sentence "Fetching the result failed" and its like."""
        detail = "; ".join(filter(None, map(str, self.problems)))[:LONGEST_DETAIL]
        said = f" {detail.rstrip('.')}." if detail else ""
        named = f" (request {request_id})" if request_id else ""
        status = "" if self.status == 200 else f" (HTTP {self.status})"
        free = " Nothing was billed." if self.units == "0" else ""
        again = " The service says that sending it again may help." if self.retryable else ""
        return f"{doing}{status}.{said} {self._advice()}{free}{again}{named}"

    def _advice(self) -> str:
        if self.own_limit:
            return NOT_STARTED
        for kind in BY_KIND:
            if kind in self.kinds:
                return BY_KIND[kind]
        if self.status == 403 and any("locked" in problem.message.lower() for problem in self.problems):
            return LOCKED
        if self.status >= 500:
            return NOT_BILLED
        return BY_STATUS.get(self.status, "Look at the request at fal.ai/dashboard/requests.")


def read_failure(status: int, headers: Mapping[str, str], body: bytes) -> Failure:
    """Both styles of error body, a bare text, and anything else a gateway may send; header names in lower case."""
    try:
        data = json.loads(body)
    except ValueError:
        data = None
    flag = headers.get("x-fal-retryable", headers.get("x-fal-needs-retry", "")).lower()
    return Failure(
        status,
        tuple(_problems(data, headers.get("x-fal-error-type", ""))),
        retryable={"true": True, "false": False}.get(flag),
        units=headers.get("x-fal-billable-units", ""),
        own_limit=status == 504 and headers.get("x-fal-request-timeout-type", "").lower() == "user",
    )


def reported_failure(error: Any, kind: Any) -> Failure:
    """A failure that a status of COMPLETED carries in `error` and `error_type`."""
    with suppress(ValueError, TypeError):
        error = json.loads(error)  # the detail of a model's error, as a text
    return Failure(200, tuple(_problems({"detail": error, "error_type": kind}, "")))


def failed_job(failure: Failure, request_id: str) -> JobFailed:
    """What a job that failed raises."""
    kind = JobCancelled if failure.status == 499 or "client_cancelled" in failure.kinds else JobFailed
    return kind(failure.words("The request failed", request_id))


def _problems(data: Any, kind: str) -> Iterator[Problem]:
    data = data if isinstance(data, Mapping) else {}
    kind = data.get("error_type") or kind
    detail = data.get("detail", data.get("error", data.get("message")))
    for entry in detail if isinstance(detail, list) else [detail]:
        if isinstance(entry, Mapping):
            own_kind = entry.get("type") or kind
            yield Problem(_place(entry.get("loc")), str(entry.get("msg") or ""), str(own_kind or ""))
        elif entry is not None or kind:
            yield Problem("", "" if entry is None else str(entry), str(kind or ""))


def _place(loc: Any) -> str:
    """["body", "reference_images", 0, "image_url"] -> "reference 1"."""
    parts = [part for part in loc if part != "body"] if isinstance(loc, list) else []
    if len(parts) > 1 and parts[0] == "reference_images" and isinstance(parts[1], int):
        return f"reference {parts[1] + 1}"
    return ".".join(map(str, parts))
