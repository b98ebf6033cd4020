"""Reference photographs on their way to the hosted service: encoded, then inside the request or through its storage.

The authors' demo shrinks photographs to 1024 pixels. The way of upload is that of fal's JavaScript client, in which the
key goes to fal's own address and the photograph, without a key, to the place that it names.
"""

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from yarl import URL

from ..pulid.errors import InputError
from .endpoints import check_address, is_loopback, is_public
from .errors import BadAnswer, Refused
from .journal import Journal
from .pictures import decode_data_uri
from .queue import QueueClient
from .transport import Transport, repeated

LONGEST_SIDE = 1024  # pixels
LARGEST_PNG = 10**6  # bytes; beyond, a JPEG of high quality
JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}  # 4:4:4
LARGEST_INLINE, LARGEST_INLINE_TOTAL = 2**20, 4 * 2**20  # bytes of one, of all, that go inside a request
TRANSPORTS = ("auto", "data URI", "upload")
EXPIRES = 3600  # seconds
MARGIN = 60  # seconds; an upload this close to its end is made again


@dataclass(frozen=True)
class Reference:
    """A photograph to send: encoded bytes, or an address (or data URI) of the user's own, never both."""

    digest: str
    url: str = ""
    content_type: str = ""
    data: bytes = field(default=b"", repr=False)
    note: str = ""  # what the user should know about how it was encoded

    @property
    def data_uri(self) -> str:
        return f"data:{self.content_type};base64,{base64.b64encode(self.data).decode()}"


def encode(image: Tensor, as_is: bool = False) -> Reference:
    """(H, W, 3 or 4) 0..1 -> PNG, or JPEG where that is large; alpha lies on white, the long side is at most 1024."""
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4) or not image.numel():
        raise InputError(f"Expected a picture of (height, width, 3), found {tuple(image.shape)}.")
    if not bool(image.isfinite().all()):
        raise InputError("A reference picture holds NaN or infinite values. Check the node it comes from.")
    pixels = (image.detach().float().clamp(0, 1).cpu().numpy() * 255).round().astype(np.uint8)
    picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    note = ""
    if picture.mode == "RGBA":
        note = "has transparent parts, which were sent as white"
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB")
    if not as_is and max(picture.size) > LONGEST_SIDE:
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    data, content_type = _save(picture, format="PNG"), "image/png"
    if len(data) > LARGEST_PNG:
        data, content_type = _save(picture, **JPEG), "image/jpeg"
    return Reference(hashlib.sha256(data).hexdigest(), content_type=content_type, data=data, note=note)


def _save(picture: Image.Image, **how: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, **how)
    return file.getvalue()


def read_lines(text: str) -> list[Reference]:
    """Addresses and data URIs, one a line, as references. Raises InputError."""
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    return [Reference(_digest_of(line, f"Line {number} of reference_urls"), url=line) for number, line in lines if line]


def _digest_of(line: str, name: str) -> str:
    """A hash of what a data URI holds, or of an address. Raises InputError."""
    if line.startswith("data:"):
        if not line.startswith("data:image/"):
            raise InputError(f"{name} is a data URI, but not of a picture (data:image/...).")
        try:
            return hashlib.sha256(decode_data_uri(line)).hexdigest()
        except BadAnswer as error:
            raise InputError(f"{name}: {error}") from None
    try:
        sound = URL(line).scheme == "https" and bool(URL(line).host)
    except ValueError:
        sound = False
    if not sound:
        raise InputError(f"{name} is neither an https:// address nor a data URI: {line[:60]!r}.")
    return hashlib.sha256(f"address {line}".encode()).hexdigest()


def unreachable_for_service(reference: Reference) -> bool:
    """True for an address that only this machine or its network can read; the service never will."""
    if not reference.url or reference.url.startswith("data:"):
        return False
    url = URL(reference.url)
    try:
        return is_loopback(url) or not is_public(url.host or "")
    except ValueError:
        return "." not in (url.host or "")  # a bare name belongs to a local network


def inline(references: Sequence[Reference], how: str) -> bool:
    """Whether pictures go inside the request ("data URI") or through the storage ("upload"); "auto" goes by size."""
    if how != "auto":
        return how == "data URI"
    sizes = [len(reference.data) for reference in references]
    return max(sizes, default=0) <= LARGEST_INLINE and sum(sizes) <= LARGEST_INLINE_TOTAL


@dataclass(frozen=True)
class ReferenceStorage:
    """Places photographs where the service can read them."""

    client: QueueClient  # for the call that needs a key
    transport: Transport  # for the one that must not have it; goes to public addresses only
    journal: Journal  # remembers uploads until shortly before they expire

    async def place(self, references: Sequence[Reference], how: str = "auto", needed: float = 0) -> tuple[str, ...]:
        """The `image_url` of each reference, readable for at least `needed` seconds where it is uploaded."""
        if inline(references, how):
            return tuple(reference.url or reference.data_uri for reference in references)
        seconds = max(EXPIRES, needed + MARGIN)
        return tuple([reference.url or await self.upload(reference, seconds, needed) for reference in references])

    async def upload(self, reference: Reference, seconds: float, needed: float) -> str:
        """The address of an uploaded photograph. Raises HostedError; a photograph is never left out.

        seconds  after which the service deletes it
        needed   seconds for which an earlier upload must still be there to be used again
        """
        name = hashlib.sha256(f"{self.client.endpoints.rest} {reference.digest}".encode()).hexdigest()
        if kept := self.journal.uploaded(name, needed + MARGIN):
            return kept
        upload_url, file_url = await self._initiate(reference, int(seconds))
        await self._put(upload_url, reference)
        self.journal.remember_upload(name, file_url, int(seconds))
        return file_url

    async def _initiate(self, reference: Reference, seconds: int) -> tuple[URL, str]:
        url = self.client.endpoints.rest / "storage/upload/initiate" % {"storage_type": "fal-cdn-v3"}
        lifecycle = json.dumps({"expiration_duration_seconds": seconds})
        headers = {"X-Fal-Object-Lifecycle": lifecycle, "X-Fal-Object-Lifecycle-Preference": lifecycle}
        suffix = reference.content_type.partition("/")[2]
        body = {"file_name": f"reference.{suffix}", "content_type": reference.content_type}
        reply = await self.client.repeat("POST", url, headers, json.dumps(body).encode())
        if reply.status >= 300:
            raise Refused(reply.failure.words("Uploading a reference picture failed"))
        answer = reply.json if isinstance(reply.json, dict) else {}
        upload_url, file_url = answer.get("upload_url"), answer.get("file_url")
        if not (upload_url and isinstance(upload_url, str) and file_url and isinstance(file_url, str)):
            raise BadAnswer("The service named no place to upload a reference picture to.")
        return check_address(upload_url, self.client.endpoints), file_url

    async def _put(self, url: URL, reference: Reference) -> None:
        headers = {"Content-Type": reference.content_type}
        reply = await repeated(lambda: self.transport.send("PUT", url, headers, reference.data), self.client.sleep)
        if reply.status >= 300:
            raise Refused(f"Uploading a reference picture failed (HTTP {reply.status}). Nothing was generated.")
