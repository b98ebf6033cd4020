"""What a failure of the hosted service is called, and what to do next: one table by kind, one by status.

Kinds are from https://docs.fal.ai/errors and https://fal.ai/docs/documentation/model-apis/request-errors.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .transport import Reply

NOT_BILLED = "By fal's terms it was not billed. Queue the prompt again to send it once more."
HOSTS = (
    "The address must be readable by anyone; some hosts block such readers, limit them, or take them for robots. "
    "Connect the picture itself instead, or upload it."
)
BY_KIND = {
    "content_policy_violation": "The service's content check refused it. It is not sent again.",
    "face_detection_error": "The service found no face there. Use a photograph with a clear, large face.",
    "file_download_error": f"The service could not fetch it. {HOSTS}",
    "image_load_error": f"The service could not read it as a picture. {HOSTS}",
    "file_too_large": "Use a smaller file, or leave reference_size at 1024.",
    "client_cancelled": "It was cancelled. Queue the prompt again to send it anew.",
    "client_disconnected": "It was cancelled. Queue the prompt again to send it anew.",
    "startup_timeout": "No machine took it up in time, so nothing ran. Queue the prompt again.",
}
KEY = "The key is wrong, or missing. Check FAL_KEY or the key file; it reads id:secret."
BY_STATUS = {
    400: "The service did not understand the request.",
    401: KEY,
    403: "The key's scope does not allow this model. Make a key of scope API at fal.ai/dashboard/keys.",
    404: "The service does not know it: the request id is wrong or of another account, or it has expired.",
    405: "The address, probably a proxy, does not pass this kind of call.",
    408: "No machine took it up in time, so nothing ran. Queue the prompt again.",
    412: "The proxy does not accept this address as its target.",
    413: "The request is too large. Set transport to upload.",
    415: "The proxy does not pass this kind of content.",
    422: "The service refused these values. Time that a machine spent on them may still be charged.",
    429: "The service is busy, or a limit of this account is reached. Wait a little and queue the prompt again.",
    499: BY_KIND["client_cancelled"],
}
LOCKED = (
    "The account is locked, mostly for its balance: see fal.ai/dashboard/billing. "
    "A lock that stays after a top-up needs fal's support."
)
NODE_NAMES = {"image_size": "image_size, width or height"}  # where the node's name differs from the service's
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
            return BY_STATUS[408]
        for kind in BY_KIND:
            if kind in self.kinds:
                return BY_KIND[kind]
        if self.status == 403 and any("locked" in problem.message.lower() for problem in self.problems):
            return LOCKED
        if self.status >= 500:
            return NOT_BILLED
        return BY_STATUS.get(self.status, "Look at the request at fal.ai/dashboard/requests.")


def read_failure(reply: Reply) -> Failure:
    """Both styles of error body, a bare text, and anything else a gateway may send."""
    try:
        data = json.loads(reply.body)
    except ValueError:
        data = None
    flag = reply.headers.get("x-fal-retryable", reply.headers.get("x-fal-needs-retry", "")).lower()
    return Failure(
        reply.status,
        tuple(_problems(data, reply.headers.get("x-fal-error-type", ""))),
        retryable={"true": True, "false": False}.get(flag),
        units=reply.headers.get("x-fal-billable-units", ""),
        own_limit=reply.status == 504 and reply.headers.get("x-fal-request-timeout-type", "").lower() == "user",
    )


def reported_failure(error: Any, kind: Any) -> Failure:
    """A failure that a status of COMPLETED carries in `error` and `error_type`."""
    with suppress(ValueError, TypeError):
        error = json.loads(error)  # the detail of a model's error, as a text
    return Failure(200, tuple(_problems({"detail": error, "error_type": kind}, "")))


def _problems(data: Any, kind: str):
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
    if parts:
        parts[0] = NODE_NAMES.get(parts[0], parts[0])
    return ".".join(map(str, parts))
