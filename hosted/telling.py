"""What a user is told about a request that went through, without the photographs and the pictures themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from .api import IDEAL_REFERENCES, HostedAnswer, HostedImage, HostedRequest
from .client import Status, Ticket
from .storage import Reference, unreachable_for_service

LONGEST_TEXT = 64  # characters of what is no address, such as a picture in a text


def describe(
    ticket: Ticket, answer: HostedAnswer, status: Status, timings: Mapping[str, Any], notes: Sequence[str]
) -> dict[str, Any]:
    """What the service said, as JSON's values; the seed as text."""
    return {
        "seed": answer.seed,
        "request_id": ticket.request_id,
        "urls": [_shown(image.url) for image in answer.images],
        "images": [_facts(image) for image in answer.images],
        "timings": dict(timings),
        "request": None,
        "logs": list(status.logs),
        "notes": list(notes),
    }


def remarks(request: HostedRequest, references: Sequence[Reference], came: int) -> list[str]:
    """What a user should know about a request, although it went through; `came` is the number of pictures."""
    far = [number for number, reference in enumerate(references, 1) if unreachable_for_service(reference)]
    found = (
        (came != request.num_images, f"{request.num_images} pictures were asked for, {came} came."),
        (len(references) > IDEAL_REFERENCES, f"{len(references)} references were sent; {IDEAL_REFERENCES} are ideal."),
        (bool(far), f"The service cannot read addresses of a private network: reference {', '.join(map(str, far))}."),
    )
    noted = [
        f"Reference {number} {reference.note}." for number, reference in enumerate(references, 1) if reference.note
    ]
    return [text for holds, text in found if holds] + noted


def shown_request(request: HostedRequest, references: Sequence[Reference]) -> dict[str, Any]:
    """The request's JSON with addresses as they are and photographs as their type."""
    shown = tuple(_shown(reference.url or reference.content_type) for reference in references)
    return replace(request, reference_images=shown).body()


def _facts(image: HostedImage) -> dict[str, Any]:
    """What the service said about a picture, long texts cut."""
    said = {name: value for name, value in asdict(image).items() if value is not None}
    return {name: _shown(value) if name in ("url", "file_data") else value for name, value in said.items()}


def _shown(url: str) -> str:
    """An address as it is, a picture in a text as its start."""
    return url if url.startswith(("http://", "https://")) or len(url) <= LONGEST_TEXT else f"{url[:LONGEST_TEXT]}..."
