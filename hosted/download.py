"""Fetches pictures from addresses that somebody else names, without being led anywhere else.

Only https, only public addresses, checked after the name is looked up and connected to as checked, at every redirect
again; no credentials; bytes, pixels and types are limited before anything is decoded.
"""

import asyncio
import base64
import binascii
import io
import ipaddress
import socket
from dataclasses import dataclass

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from yarl import URL

from ..pulid.errors import AnswerLost, BadAnswer, HostedError, Refused, UnsafeAddress
from .addresses import Addresses, is_loopback
from .api import HostedImage
from .patience import Sleep, repeated
from .transport import Reply, Resolve, Terms, Transport

REDIRECTS = 3
IMAGE_BYTES, JOB_BYTES = 64 * 2**20, 256 * 2**20
LARGEST_PIXELS = 64 * 2**20
PICTURE_TERMS = Terms(seconds=120, limit=IMAGE_BYTES, idle=30)
MAGIC = {b"\x89PNG\r\n\x1a\n": PngImageFile, b"\xff\xd8\xff": JpegImageFile, b"RIFF": WebPImageFile}
EXPIRED = (
    "Its pictures have expired (the service keeps them for 7 days or longer) and cannot be fetched again. Switch "
    "force_resubmit on to have new ones made."
)

# Parts of the public IPv6 range that lead to IPv4 addresses, which may be private.
TUNNELS = [ipaddress.ip_network(text) for text in ("2002::/16", "2001::/32")]  # 6to4, Teredo
PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")  # NAT64, mapped and local addresses lie outside of it


def is_public(address: str) -> bool:
    """True for an address on the internet that cannot stand for another one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6 and (ip not in PUBLIC_IPV6 or any(ip in tunnel for tunnel in TUNNELS)):
        return False
    return ip.is_global and not ip.is_multicast


async def look_up(host: str, port: int) -> list[str]:
    """All addresses that the system knows for a name."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(entry[4][0] for entry in found))


def public_only(addresses: Addresses, look_up: Resolve = look_up) -> Resolve:
    """A lookup that raises UnsafeAddress unless every address of a host is public, or it is our own storage's."""

    async def resolve(host: str, port: int) -> list[str]:
        found = await look_up(host, port)
        own = is_loopback(addresses.cdn) and (host, port) == (addresses.cdn.host, addresses.cdn.port)
        if not own and not all(map(is_public, found)):
            raise UnsafeAddress(
                f"{host} leads to a private address, where no picture of the service can be. Not fetched."
            )
        return found

    return resolve


def check_address(url: URL, addresses: Addresses) -> URL:
    """The address, or UnsafeAddress. Numbers are checked here, since no lookup comes for them; names when looked up."""
    if addresses.is_own_storage(url):
        return url
    if url.scheme != "https" or url.user or url.password or url.port != 443 or not url.host:
        raise UnsafeAddress(
            f"Expected a plain https address from the service, found one of scheme {url.scheme!r}, port {url.port}"
            f"{', with a user name' if url.user else ''}. It was not read."
        )
    try:
        public = is_public(url.host)
    except ValueError:
        return url  # a name
    if not public:
        raise UnsafeAddress(f"{url.host} is a private address, where no picture of the service can be. Not read.")
    return url


@dataclass(frozen=True)
class Downloader:
    """Fetches and decodes the pictures of an answer.

    transport  one whose lookups go through `public_only`
    terms      of one picture; its seconds are for all tries together
    """

    transport: Transport
    addresses: Addresses
    sleep: Sleep = asyncio.sleep
    terms: Terms = PICTURE_TERMS

    async def pictures(self, images: tuple[HostedImage, ...]) -> tuple[tuple[Image.Image, ...], list[str]]:
        """RGB pictures in order, and notes on what differs from what the service announced."""
        pictures, notes, total = [], [], 0
        for number, image in enumerate(images, start=1):
            data = decode_data_uri(image.url) if image.url.startswith("data:") else await self.fetch(image.url)
            total += len(data)
            if total > JOB_BYTES:
                raise BadAnswer(
                    f"The pictures together are larger than {JOB_BYTES // 2**20} MiB; the rest was not read."
                )
            pictures.append(decode(data))
            notes += _differences(number, image, len(data), pictures[-1].size)
        return tuple(pictures), notes

    async def fetch(self, address: str) -> bytes:
        """The bytes behind an address; repeated where its failure may pass. Raises HostedError."""
        tries = repeated(lambda: self._follow(address), self.sleep)
        try:
            return _body(await asyncio.wait_for(tries, self.terms.seconds))
        except asyncio.TimeoutError:
            raise AnswerLost(f"A picture did not arrive within {self.terms.seconds:g} s.") from None

    async def _follow(self, address: str) -> Reply:
        url = check_address(read_url(address), self.addresses)
        for _ in range(REDIRECTS + 1):
            reply = await self.transport.send("GET", url, {"Accept": "image/*"}, terms=self.terms)
            if not 300 <= reply.status < 400 or "location" not in reply.headers:
                return reply
            url = check_address(url.join(read_url(reply.headers["location"])), self.addresses)
        raise UnsafeAddress(f"The service's picture was forwarded more than {REDIRECTS} times. It was not read.")


def read_url(address: str) -> URL:
    try:
        return URL(address)
    except ValueError:
        raise UnsafeAddress("The service named an address that is none. It was not read.") from None


def _body(reply: Reply) -> bytes:
    if reply.status in (404, 410):
        raise Refused(EXPIRED)
    if reply.status != 200:
        raise Refused(f"The picture could not be read (HTTP {reply.status}). Queue the prompt again to fetch it anew.")
    kind = reply.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if not kind.startswith("image/") and kind not in ("application/octet-stream", "binary/octet-stream"):
        raise BadAnswer(f"Expected a picture, found content of type {kind[:60]!r}.")
    return reply.body


def decode_data_uri(uri: str) -> bytes:
    """The bytes of a base64 data URI. Raises BadAnswer."""
    head, _, data = uri.partition(",")
    if not head.endswith(";base64"):
        raise BadAnswer("Expected a data URI with ;base64, found another kind.")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error:
        raise BadAnswer("A data URI is damaged: its base64 text cannot be read.") from None


def decode(data: bytes) -> Image.Image:
    """PNG, JPEG or WebP bytes -> an RGB picture. Raises BadAnswer, before decoding where the size is too large."""
    kind = next((kind for magic, kind in MAGIC.items() if data.startswith(magic)), None)
    if kind is None:
        raise BadAnswer("Expected a PNG, JPEG or WebP picture, found something else.")
    try:
        # Not Image.open, whose own limit warns in some cases and says less in the others.
        with kind(io.BytesIO(data)) as image:
            if image.width * image.height > LARGEST_PIXELS:
                raise BadAnswer(
                    f"A picture of {image.width} x {image.height} pixels is larger than this pack decodes "
                    f"({LARGEST_PIXELS // 2**20} million)."
                )
            return image.convert("RGB")
    except HostedError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise BadAnswer(f"A picture is damaged: {kind.format} could not be read ({type(error).__name__}).") from None


def _differences(number: int, image: HostedImage, length: int, size: tuple[int, int]) -> list[str]:
    announced = (("bytes", image.file_size, length), ("width", image.width, size[0]), ("height", image.height, size[1]))
    return [
        f"Picture {number}: {expected} {what} were announced, {found} came."
        for what, expected, found in announced
        if expected is not None and expected != found
    ]
