"""What goes wrong with the hosted service: the exceptions, and what a failure is called and what to do next.

    HostedError           the hosted service, or the way to it
    ├── Unreachable       not wholly sent, so nothing was accepted
    ├── AnswerLost        no whole answer came back
    ├── BadAnswer         an answer that means nothing (not JSON, fields missing, not a picture)
    ├── Refused           the service said no, and nothing runs
    │   └── Gone          it does not have, or no longer has, what was asked for
    ├── AmbiguousSubmit   a request may have been accepted and billed, and nobody knows
    ├── JobFailed         accepted, and then it failed: the service or the model itself says so
    │   └── JobCancelled  it ended because somebody asked for it
    ├── HostedLimit       a limit of time, or of pictures, that the user has set
    └── Interrupted       the user stopped waiting

Kinds of failures: https://docs.fal.ai/errors and https://fal.ai/docs/documentation/model-apis/request-errors.
"""

from dataclasses import dataclass

from ..pulid.errors import PulidError


# fmt: off
class HostedError(PulidError): ...
class Unreachable(HostedError, ConnectionError): ...
class AnswerLost(HostedError, ConnectionError): ...
class BadAnswer(HostedError, ValueError): ...
class Refused(HostedError): ...
class Gone(Refused): ...
class AmbiguousSubmit(HostedError): ...
class JobFailed(HostedError): ...
class JobCancelled(JobFailed): ...
class HostedLimit(HostedError): ...
class Interrupted(HostedError): ...
# fmt: on

# --- What a failure is called ---

NOT_BILLED = "By fal's terms it was not billed. Queue the prompt again to send it once more."
HOSTS = (
    "The address must be readable by anyone; some hosts block such readers, limit them, or take them for robots. "
    "Connect the picture itself instead, or upload it."
)
CANCELLED = "It was cancelled. Queue the prompt again to send it anew."
BY_KIND = {  # of what the service or the model says of a job, so it is evidence
    "content_policy_violation": "The service's content check refused it. It is not sent again.",
    "face_detection_error": "The service found no face there. Use a photograph with a clear, large face.",
    "file_download_error": f"The service could not fetch it. {HOSTS}",
    "image_load_error": f"The service could not read it as a picture. {HOSTS}",
    "file_too_large": "Use a smaller file, or leave reference_size at 1024.",
    "startup_timeout": "No machine took it up in time, so nothing ran. Queue the prompt again.",
    **dict.fromkeys(("client_cancelled", "client_disconnected"), CANCELLED),
    **dict.fromkeys(("internal_error", "internal_server_error", "downstream_service_error"), NOT_BILLED),
    **dict.fromkeys(("request_timeout", "generation_timeout"), NOT_BILLED),
}
NO_ANSWER = "The service, or something on the way to it, gave no answer of its own; that says nothing about a request."
BY_STATUS = {
    400: "The service did not understand the request.",
    401: "The key is wrong, or missing. Check FAL_KEY or the key file; it reads id:secret.",
    403: "The key's scope does not allow this model. Make a key of scope API at fal.ai/dashboard/keys.",
    404: "The service does not know it: the request id is wrong or of another account, or it has expired.",
    405: "The address, probably a proxy, does not pass this kind of call.",
    408: NO_ANSWER,
    412: "The proxy does not accept this address as its target.",
    413: "The request is too large. Set transport to upload.",
    415: "The proxy does not pass this kind of content.",
    422: "The service refused these values. Time that a machine spent on them may still be charged.",
    429: "The service is busy, or a limit of this account is reached. Wait a little and queue the prompt again.",
    499: NO_ANSWER,
}
THE_PROXYS = "That is for the proxy: its own key, or its leave for you (PULID_FAL_PROXY_URL). No key is sent from here."
LOCKED = "The account is locked: see fal.ai/dashboard/billing. A lock that stays after a top-up needs fal's support."


def clean(text: object, longest: int = 600) -> str:
    """A text of somebody else's, fit for a log and a screen: one line, at most so long, without control characters."""
    shown = str(text)[: 2 * longest]
    return "".join(sign if sign.isprintable() else " " for sign in shown).strip()[:longest]


# What to do about an accepted request of which no more is known, and about one that may not have been accepted.
NOT_LOST = (
    "Request {0} is not lost. Queue the prompt again to ask once more: it is not sent a second time. "
    "Where the service no longer knows it, put {0} into force_resubmit; that sends, and pays, anew."
)
OUTCOME_UNKNOWN = (
    "The request may have been accepted and billed. It is not sent again on its own: look at "
    "fal.ai/dashboard/requests. If it is there, fetch its pictures by its id (PuLID Hosted Result); "
    "if it is not, put {0} into force_resubmit to send it again."
)


@dataclass(frozen=True)
class Failure:
    """What the service says about a failure. `retryable` is None where it does not say."""

    status: int
    said: str = ""
    kinds: frozenset[str] = frozenset()  # as the service or the model calls it: evidence of what became of a job
    retryable: bool | None = None
    units: str = ""  # that the service billed for it

    def words(self, doing: str, request_id: str = "", proxied: bool = False) -> str:
        """`doing` is the half sentence "Fetching the result failed" and its like; "The request failed" needs evidence.

        Nothing is said about the bill unless the service or the model itself told how the request ended. `proxied` is
        for what went through the user's proxy, which adds the key.
        """
        said = clean(self.said).rstrip(".")
        parts = (
            f"{doing}." if self.status == 200 else f"{doing} (HTTP {self.status}).",
            f"{said}." if said else "",
            self._advice(proxied),
            "Nothing was billed." if self.kinds and self.units == "0" else "",
            "The service says that sending it again may help." if self.kinds and self.retryable else "",
            f"(request {request_id})" if request_id else "",
        )
        return " ".join(filter(None, parts))

    def _advice(self, proxied: bool) -> str:
        if known := [words for kind, words in BY_KIND.items() if kind in self.kinds]:
            return known[0]
        if proxied and self.status in (401, 403, 407):
            return THE_PROXYS
        if self.status == 403 and "locked" in self.said.lower():
            return LOCKED
        if self.status >= 500 or any(kind.startswith("runner_") for kind in self.kinds):
            return NOT_BILLED if self.kinds else NO_ANSWER
        return BY_STATUS.get(self.status, "Look at the request at fal.ai/dashboard/requests.")


def failed_job(failure: Failure, request_id: str) -> JobFailed:
    """What a job raises of which the service or the model says that it failed."""
    kind = JobCancelled if "client_cancelled" in failure.kinds else JobFailed
    return kind(failure.words("The request failed", request_id))
