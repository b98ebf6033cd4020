"""Reference photographs on their way to the hosted service: encoded, then inside the request or through its storage.

The authors' demo shrinks photographs to 1024 pixels. The way of upload is that of fal's JavaScript client, in which the
key goes to fal's own address and the photograph, without a key, to the place that it names.
"""

import base64
import hashlib
import io
import json
import mimetypes
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from ..pulid.errors import InputError
from .api import LARGEST_ANSWER, UploadPlace, read_answer
from .endpoints import check_address, public_url
from .errors import BadAnswer, Refused, clean
from .pictures import decode_data_uri
from .queue import QueueClient
from .transport import Terms, repeated

LONGEST_SIDE = 1024  # pixels
LARGEST_PNG = 10**6  # bytes; beyond, a JPEG of high quality
LARGEST_INLINE, LARGEST_INLINE_TOTAL = 2**20, 4 * 2**20  # bytes of one, of all, that go inside a request
LARGEST_FILE = 90 * 2**20  # bytes; beyond, the service wants uploads in parts
TRANSPORTS = ("auto", "data URI", "upload")
SHORTEST_LIFE = 3600  # seconds that an upload is kept
MARGIN = 1800  # seconds that it outlives the waiting and running, for uploading the others and sending

_uploads: dict[str, tuple[float, float, str]] = {}  # in this process: when each was made, when it expires, its address


@dataclass(frozen=True)
class Reference:
    """A photograph to send: encoded bytes, or an address of the user's own, never both."""

    digest: str  # of what it shows, however it is compressed; of an address, its text
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
    return _encode(Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels), as_is)


def _encode(picture: Image.Image, as_is: bool) -> Reference:
    note = ""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        note = "has transparent parts, which were sent as white"
    picture = picture.convert("RGB")
    if not as_is:
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    picture.save(file := io.BytesIO(), "PNG")
    content_type = "image/png"
    if file.tell() > LARGEST_PNG:
        picture.save(file := io.BytesIO(), "JPEG", quality=95, subsampling=0)  # 4:4:4
        content_type = "image/jpeg"
    digest = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
    return Reference(digest, content_type=content_type, data=file.getvalue(), note=note)


def read_lines(text: str, as_is: bool = False) -> list[Reference]:
    """Addresses and data URIs, one a line, as references; pictures in data URIs are encoded anew. Raises InputError."""
    lines = [(f"Line {number} of reference_urls", line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    return [_read_line(line, name, as_is) for name, line in lines if line]


def _read_line(line: str, name: str, as_is: bool) -> Reference:
    if line.startswith("https://") and public_url(line):
        return Reference(hashlib.sha256(f"address {line}".encode("utf-8", "replace")).hexdigest(), url=line)
    if not line.startswith("data:"):
        raise InputError(
            f"{name} is neither a data URI nor an https:// address that the service can read, but {clean(line, 60)!r}. "
            "It cannot read this machine or a private network: connect the picture itself. Nothing was sent."
        )
    try:
        with Image.open(io.BytesIO(decode_data_uri(line))) as picture:
            if picture.width * picture.height > LARGEST_ANSWER:
                raise BadAnswer(f"A picture of {picture.width} x {picture.height} pixels is too large.")
            return _encode(ImageOps.exif_transpose(picture), as_is)
    except BadAnswer as error:
        raise InputError(f"{name}: {error}") from None
    except Exception as error:  # Pillow's are of every class
        raise InputError(f"{name} holds no picture that could be read ({type(error).__name__}).") from None


def read_file(folder: Path, name: str) -> Reference:
    """A file of a folder, of any kind, as it is. Raises InputError."""
    path = (folder / name).absolute()
    if ".." in path.parts or not path.is_relative_to(folder.absolute()) or not path.is_file():
        raise InputError(f"{clean(name, 80)!r} is not a file of ComfyUI's input folder. Choose one from the list.")
    if path.stat().st_size > LARGEST_FILE:
        raise InputError(f"{clean(name, 80)!r} is larger than {LARGEST_FILE // 2**20} MiB, which cannot be uploaded.")
    data, kind = path.read_bytes(), mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return Reference(hashlib.sha256(kind.encode() + data).hexdigest(), content_type=kind, data=data)


def inline(references: Sequence[Reference], how: str) -> bool:
    """Whether pictures go inside the request ("data URI") or through the storage ("upload"); "auto" goes by size."""
    if how != "auto":
        return how == "data URI"
    sizes = [len(reference.data) for reference in references]
    return max(sizes, default=0) <= LARGEST_INLINE and sum(sizes) <= LARGEST_INLINE_TOTAL


async def place(references: Sequence[Reference], client: QueueClient, how: str, needed: float) -> tuple[str, ...]:
    """The `image_url` of each reference, readable for at least `needed` seconds where it is uploaded."""
    if inline(references, how):
        return tuple(reference.url or reference.data_uri for reference in references)
    seconds = max(SHORTEST_LIFE, needed + MARGIN)
    return tuple([reference.url or await upload(reference, client, seconds, needed) for reference in references])


async def upload(reference: Reference, client: QueueClient, seconds: float, needed: float) -> str:
    """The address of a photograph in the service's storage, which deletes it after so many seconds. Raises HostedError.

    An earlier upload is used again where it will still be there after the seconds that are `needed`.
    """
    known = f"{client.endpoints.rest} {client.payer} {reference.content_type} {reference.digest}"
    now, (made, expires, address) = time.time(), _uploads.get(known, (0.0, 0.0, ""))
    if made <= now < expires - needed:
        return address
    lifecycle = json.dumps({"expiration_duration_seconds": int(seconds)})
    headers = {"X-Fal-Object-Lifecycle": lifecycle, "X-Fal-Object-Lifecycle-Preference": lifecycle}
    suffix = mimetypes.guess_extension(reference.content_type) or ".bin"
    body = json.dumps({"file_name": f"reference{suffix}", "content_type": reference.content_type}).encode()
    url = client.endpoints.rest / "storage/upload/initiate" % {"storage_type": "fal-cdn-v3"}
    reply = await repeated(lambda: client.call("POST", url, headers, body), client.sleep)
    if reply.status >= 300:
        raise client.refusal(reply, "Uploading a reference picture failed, so nothing was sent")
    there = read_answer(UploadPlace, reply.json)
    upload_url, terms = check_address(there.upload_url, client.endpoints), Terms(client.terms.seconds, public=True)
    kind = {"Content-Type": reference.content_type}  # without the key, which the storage must not have
    reply = await repeated(lambda: client.send("PUT", upload_url, kind, reference.data, terms), client.sleep)
    if reply.status >= 300:
        raise Refused(f"Uploading a reference picture failed (HTTP {reply.status}). Nothing was generated.")
    _uploads[known] = now, now + int(seconds), there.file_url
    return there.file_url
