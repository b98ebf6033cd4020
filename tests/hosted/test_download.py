"""Pictures on their way in: which addresses are read, and what is decoded."""

import asyncio
import base64
import io

import pytest
from PIL import Image
from pulid_sdxl.hosted import download
from pulid_sdxl.hosted.addresses import Addresses
from pulid_sdxl.hosted.api import HostedImage
from pulid_sdxl.hosted.download import Downloader, check_address, decode, decode_data_uri, is_public, public_only
from pulid_sdxl.hosted.transport import Reply
from pulid_sdxl.pulid.errors import BadAnswer, Refused, UnsafeAddress
from yarl import URL

HERE = Addresses(cdn=URL("http://127.0.0.1:5000"))


def picture(kind="PNG", size=(6, 4), mode="RGB", color=(10, 200, 30)):
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


# ---- Addresses ----


@pytest.mark.parametrize("address", ["8.8.8.8", "151.101.1.1", "2606:4700::1111", "2a00:1450:4001:81b::200e"])
def test_addresses_of_the_internet_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "192.0.2.1",
        "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1",
        "fec0::1", "ff02::1", "::ffff:10.0.0.1", "::10.0.0.1", "64:ff9b::a00:1", "64:ff9b:1::a00:1", "2002:a00:1::",
        "2001:0:a00:1::", "2001:db8::1", "100::1",
    ],
)  # fmt: skip
def test_addresses_that_are_or_may_stand_for_private_ones_are_not(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://v3.fal.media/a.png",
        "https://v3.fal.media:8443/a.png",
        "https://me@v3.fal.media/a.png",
        "https://10.0.0.1/a.png",
        "https://[::1]/a.png",
        "http://127.0.0.1:5001/a.png",
        "http://localhost:5000/a.png",
        "ftp://v3.fal.media/a.png",
        "file:///etc/passwd",
        "a.png",
        "//v3.fal.media/a.png",
    ],
)
def test_addresses_that_are_not_safe_are_refused(url):
    with pytest.raises(UnsafeAddress):
        check_address(URL(url), HERE)


@pytest.mark.parametrize("url", ["https://v3.fal.media/a.png", "https://8.8.8.8/a.png", "http://127.0.0.1:5000/a.png"])
def test_public_addresses_and_the_configured_storage_are_read(url):
    assert check_address(URL(url), HERE) == URL(url)


@pytest.mark.parametrize(
    ("host", "port", "found", "safe"),
    [
        ("v3.fal.media", 443, ["8.8.8.8", "2606:4700::1"], True),
        ("v3.fal.media", 443, ["8.8.8.8", "10.0.0.1"], False),
        ("2130706433", 443, ["127.0.0.1"], False),
        ("127.0.0.1", 5000, ["127.0.0.1"], True),
        ("127.0.0.1", 5001, ["127.0.0.1"], False),
    ],
)
def test_every_address_that_a_name_leads_to_must_be_public(host, port, found, safe):
    async def look_up(host, port):
        return found

    resolve = public_only(HERE, look_up)
    if safe:
        assert asyncio.run(resolve(host, port)) == found
    else:
        with pytest.raises(UnsafeAddress, match="private address"):
            asyncio.run(resolve(host, port))


# ---- Fetching ----


class Web:
    """A transport that knows some addresses; keeps what it was asked."""

    def __init__(self, **pages):
        self.pages = {f"https://host/{name}": page for name, page in pages.items()}
        self.asked = []

    async def send(self, method, url, headers=None, body=None, terms=None):
        self.asked.append((str(url), headers))
        return self.pages[str(url)]


def page(content=b"", status=200, **headers):
    headers = {"content_type": "image/png"} | headers
    return Reply(status, {name.replace("_", "-"): value for name, value in headers.items()}, content)


def fetch(web, name):
    return asyncio.run(Downloader(web, Addresses()).fetch(f"https://host/{name}"))


def test_redirects_are_followed_a_few_times_without_credentials():
    web = Web(
        a=page(status=302, location="/b"),
        b=page(status=307, location="https://host/c"),
        c=page(status=301, location="d"),
        d=page(b"picture"),
        z=page(status=302, location="/a"),
    )

    assert fetch(web, "a") == b"picture"
    assert all(headers == {"Accept": "image/*"} for _, headers in web.asked)
    with pytest.raises(UnsafeAddress, match="more than 3 times"):
        fetch(web, "z")


@pytest.mark.parametrize("target", ["http://host/b", "https://10.0.0.1/b", "https://[", "https://me@host/b"])
def test_every_redirect_is_checked(target):
    web = Web(a=page(status=302, location=target))

    with pytest.raises(UnsafeAddress):
        fetch(web, "a")
    assert len(web.asked) == 1


@pytest.mark.parametrize("kind", ["image/png", "image/anything; x=y", "application/octet-stream", "IMAGE/JPEG"])
def test_content_of_a_pictures_type_is_taken(kind):
    assert fetch(Web(a=page(b"x", content_type=kind)), "a") == b"x"


def test_other_content_is_refused():
    with pytest.raises(BadAnswer, match="text/html"):
        fetch(Web(a=page(b"x", content_type="text/html")), "a")


@pytest.mark.parametrize("status", [404, 410])
def test_pictures_that_have_expired_are_said_to_have(status):
    with pytest.raises(Refused, match=r"expired .*7 days.*force_resubmit"):
        fetch(Web(a=page(status=status)), "a")


def pictures(web, *images):
    return asyncio.run(Downloader(web, Addresses()).pictures(images))


def test_pictures_come_in_order_and_differences_are_noted():
    web = Web(a=page(picture(size=(6, 4))), b=page(picture(size=(2, 2))))
    length = len(picture(size=(6, 4)))

    found, notes = pictures(
        web,
        HostedImage("https://host/a", width=6, height=4, file_size=length),
        HostedImage("https://host/b", width=9, height=2, file_size=1),
    )

    assert [image.size for image in found] == [(6, 4), (2, 2)]
    assert notes[1] == "Picture 2: 9 width were announced, 2 came." and len(notes) == 2


def test_a_picture_inside_the_answer_is_taken_from_there():
    uri = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"

    [image], _ = pictures(Web(), HostedImage(uri))

    assert image.getpixel((0, 0)) == (10, 200, 30)


def test_one_job_brings_so_much_and_no_more(monkeypatch):
    monkeypatch.setattr(download, "JOB_BYTES", 2 * len(picture()))

    with pytest.raises(BadAnswer, match="together are larger"):
        pictures(Web(a=page(picture())), *[HostedImage("https://host/a")] * 3)


# ---- Decoding ----


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_bytes_become_the_picture_they_are(kind):
    image = decode(picture(kind))

    assert (image.mode, image.size, image.getpixel((3, 2))) == ("RGB", (6, 4), (10, 200, 30))


@pytest.mark.parametrize(("mode", "color"), [("L", 7), ("RGBA", (1, 2, 3, 4)), ("P", 5), ("1", 1)])
def test_every_kind_of_picture_becomes_rgb(mode, color):
    assert decode(picture(mode=mode, color=color)).mode == "RGB"
    assert decode(picture("JPEG", mode="CMYK", color=(1, 2, 3, 4))).mode == "RGB"


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"<html>", b"\x00" * 99, b"BM" + bytes(99)])
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(BadAnswer, match="PNG, JPEG or WebP"):
        decode(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("part", [0.3, 0.8])
def test_a_damaged_picture_is_an_error_and_never_grey(kind, part):
    data = picture(kind, size=(64, 64))

    with pytest.raises(BadAnswer, match="damaged"):
        decode(data[: int(part * len(data))])


def test_the_size_is_checked_before_decoding(monkeypatch):
    monkeypatch.setattr(download, "LARGEST_PIXELS", 6 * 4 - 1)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))

    with pytest.raises(BadAnswer, match="6 x 4 pixels is larger"):
        decode(picture())


@pytest.mark.parametrize("uri", ["data:image/png,abc", "data:image/png;base64,***", "data:", "data:;base64,a"])
def test_a_damaged_data_uri_is_an_error(uri):
    with pytest.raises(BadAnswer):
        decode_data_uri(uri)
