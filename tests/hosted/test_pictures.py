"""Pictures on their way in, what is decoded of them, and that they are kept whole or not at all."""

import asyncio
import base64
import io
import json
import os
import stat
import struct
import time
import zlib
from contextlib import suppress

import pytest
from PIL import Image, ImageFile
from pulid_sdxl.hosted.api import HostedImage
from pulid_sdxl.hosted.endpoints import Endpoints
from pulid_sdxl.hosted.errors import BadAnswer, HostedError
from pulid_sdxl.hosted.pictures import Outcome, PictureStore, decode, fetch, fetch_all
from pulid_sdxl.hosted.queue import QueueClient
from pulid_sdxl.hosted.transport import Reply


def picture(kind="PNG", size=(6, 4), mode="RGB", color=(10, 200, 30)):
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


# ---- Fetching ----


class Web:
    """A transport that knows some addresses; keeps what it was asked."""

    def __init__(self, **pages):
        self.pages = {f"https://host.example/{name}": page for name, page in pages.items()}
        self.asked = []

    async def send(self, method, url, headers=None, body=None, terms=None):
        self.asked.append((str(url), headers))
        return self.pages[str(url)]


def page(content=b"", status=200, **headers):
    headers = {"content_type": "image/png"} | headers
    return Reply(status, {name.replace("_", "-"): value for name, value in headers.items()}, content)


def client(web):
    return QueueClient(web.send, Endpoints(), None)


def fetched(web, name):
    return asyncio.run(fetch(client(web), f"https://host.example/{name}"))


def test_redirects_are_followed_a_few_times_without_credentials():
    web = Web(
        a=page(status=302, location="/b"),
        b=page(status=307, location="https://host.example/c"),
        c=page(status=301, location="d"),
        d=page(b"picture"),
        z=page(status=302, location="/a"),
    )
    assert fetched(web, "a") == b"picture"
    assert all(headers == {"Accept": "image/*"} for _, headers in web.asked)
    with pytest.raises(HostedError, match="more than 3 times"):
        fetched(web, "z")


def pictures(web, *images, **limits):
    return asyncio.run(fetch_all(client(web), images, len(images), **limits))


def test_pictures_come_in_order_and_differences_are_noted():
    web = Web(a=page(picture(size=(6, 4))), b=page(picture(size=(2, 2))))
    length = len(picture(size=(6, 4)))
    found, notes = pictures(
        web,
        HostedImage(url="https://host.example/a", width=6, height=4, file_size=length),
        HostedImage(url="https://host.example/b", width=9, height=2, file_size=1),
    )
    assert [image.size for image in found] == [(6, 4), (2, 2)]
    assert notes[1] == "Picture 2: width 9 was announced, 2 came." and len(notes) == 2


def test_a_picture_in_file_data_needs_no_address():
    data = base64.b64encode(picture()).decode()
    [bare], _ = pictures(Web(), HostedImage(url="", file_data=data))
    [uri], _ = pictures(Web(), HostedImage(file_data=f"data:image/png;base64,{data}"))
    assert bare.tobytes() == uri.tobytes()
    for harm in ("***", base64.b64encode(b"no picture").decode()):
        with pytest.raises(BadAnswer):
            pictures(Web(), HostedImage(file_data=harm))
        [there], _ = pictures(Web(a=page(picture())), HostedImage(url="https://host.example/a", file_data=harm))
        assert there.tobytes() == bare.tobytes()


def test_one_answer_brings_so_much_and_no_more():
    images = [HostedImage(url="https://host.example/a")] * 3
    assert len(pictures(Web(a=page(picture())), *images, pixels=3 * 6 * 4)[0]) == 3
    found, [note] = pictures(Web(a=page(picture())), *images, pixels=3 * 6 * 4 - 1)
    assert len(found) == 2 and "6 x 4 pixels is larger" in note


def test_no_more_pictures_are_read_than_were_asked_for():
    web = Web(a=page(picture()))
    images = tuple([HostedImage(url="https://host.example/a")] * 3)
    found, notes = asyncio.run(fetch_all(client(web), images, asked=2))
    assert (len(found), len(web.asked)) == (2, 2)
    assert notes == ["2 pictures were asked for, 3 came; the others were not read."]


# ---- Decoding ----


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_bytes_become_the_picture_they_are(kind):
    image = decode(picture(kind))
    assert (image.mode, image.size, image.getpixel((3, 2))) == ("RGB", (6, 4), (10, 200, 30))


@pytest.mark.parametrize(("mode", "color"), [("L", 7), ("RGBA", (1, 2, 3, 4)), ("P", 5), ("1", 1)])
def test_every_kind_of_picture_becomes_rgb(mode, color):
    assert decode(picture(mode=mode, color=color)).mode == "RGB"
    assert decode(picture("JPEG", mode="CMYK", color=(1, 2, 3, 4))).mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("part", [0.3, 0.8, 0.95])
@pytest.mark.parametrize("filled", [False, True])
def test_a_damaged_picture_is_an_error_and_never_grey(kind, part, filled, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", filled)  # as other packs set it, for the whole process
    data = picture(kind, size=(64, 64))
    with pytest.raises(BadAnswer, match="damaged"):
        decode(data[: int(part * len(data))])


PILLOWS = (
    ZeroDivisionError, IndexError, KeyError, TypeError, OverflowError, MemoryError, RuntimeError, struct.error,
    zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning, UserWarning, AssertionError, NotImplementedError,
)  # fmt: skip


@pytest.mark.parametrize("raised", PILLOWS)
def test_whatever_pillow_raises_is_a_bad_answer(raised, monkeypatch):
    def fail(*_):
        raise raised("x")

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(BadAnswer, match=f"damaged.*{raised.__name__}"):
        decode(picture())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_with_any_byte_changed_is_read_or_is_a_bad_answer(kind):
    data = picture(kind, size=(9, 7))
    for place in range(len(data)):
        for value in (0, 0x7F, 0xFF):
            with suppress(BadAnswer):
                assert decode(data[:place] + bytes([value]) + data[place + 1 :], 10**6).mode == "RGB"


def test_the_size_is_checked_before_decoding(monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BadAnswer, match="6 x 4 pixels is larger"):
        decode(picture(), largest_pixels=6 * 4 - 1)


# ---- Keeping ----


def outcome(color="red", count=1, size=(8, 6), request_id="r"):
    images = tuple(Image.new("RGB", size, color) for _ in range(count))
    seed = "17454220438242315174"
    return Outcome(images=images, seed=seed, request_id=request_id, info={"seed": seed, "notes": []})


def test_what_was_kept_comes_back_the_same(tmp_path):
    kept = outcome(count=2)
    assert PictureStore(tmp_path / "results").put("r", kept)
    found = PictureStore(tmp_path / "results").get("r")
    assert [image.tobytes() for image in found.images] == [image.tobytes() for image in kept.images]
    assert (found.seed, found.request_id, found.info) == (kept.seed, kept.request_id, kept.info)


FACTS = {"images": 1, "seed": "7", "request_id": "r", "info": {"notes": []}}
DAMAGED = [
    b"", b"[]", b"{", b"[" * 10**5, b"\xff", b"null",
    *(json.dumps({**FACTS, **harm}).encode() for harm in (
        {"images": "x"}, {"images": 0}, {"images": 10**9}, {"seed": None}, {"request_id": "other"}, {"info": []},
        {"info": {}}, {"info": {"notes": 7}},
    )),
]  # fmt: skip


@pytest.mark.parametrize("facts", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_facts_count_as_none(tmp_path, facts):
    PictureStore(tmp_path).put("r", outcome())
    (tmp_path / "r" / "outcome.json").write_bytes(facts)
    assert PictureStore(tmp_path).get("r") is None


@pytest.mark.parametrize("harm", [None, b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_damaged_pictures_count_as_none(tmp_path, harm):
    PictureStore(tmp_path).put("r", outcome())
    file = tmp_path / "r" / "0.png"
    file.unlink() if harm is None else file.write_bytes(harm)
    assert PictureStore(tmp_path).get("r") is None


def test_pictures_are_kept_for_so_many_days_also_where_they_are_used(tmp_path):
    results = PictureStore(tmp_path, days=2)
    for name, days in (("old", 3), ("young", 1)):
        results.put(name, outcome(request_id=name))
        for file in (tmp_path / name).iterdir():
            os.utime(file, (time.time() - days * 86400,) * 2)
        assert results.get(name)
    results.shrink()
    assert [place.name for place in tmp_path.iterdir()] == ["young"]


def test_the_ones_not_used_for_longest_go_first(tmp_path):
    results = PictureStore(tmp_path)
    results.put("size", outcome())
    size = sum(file.stat().st_size for file in (tmp_path / "size").iterdir())
    results = PictureStore(tmp_path / "few", largest=3 * size)
    for number in range(3):
        results.put(str(number), outcome(request_id=str(number)))
        os.utime(tmp_path / "few" / str(number), (number, number))
    results.get("0")  # used just now
    results.put("3", outcome(request_id="3"))
    assert sorted(place.name for place in (tmp_path / "few").iterdir()) == ["0", "2", "3"]


def test_what_can_be_read_but_not_touched_is_there(tmp_path, monkeypatch):
    PictureStore(tmp_path).put("r", outcome())
    monkeypatch.setattr(os, "utime", lambda _: os.stat(tmp_path / "none"))  # raises an OSError, as on a read-only disk
    assert PictureStore(tmp_path).get("r") is not None


def test_who_drops_old_pictures_at_the_same_time_costs_no_new_ones(tmp_path):
    results = PictureStore(tmp_path)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "0.png").symlink_to("nothing")  # listed, and no longer there
    assert results.put("r", outcome()) and results.get("r") is not None


def test_the_newest_stays_even_if_it_is_too_large_alone(tmp_path):
    results = PictureStore(tmp_path, largest=1)
    results.put("r", outcome())
    assert results.get("r") is not None


def test_a_disk_that_takes_nothing_costs_no_pictures(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    assert not PictureStore(tmp_path / "file").put("r", outcome())
    assert "could not be kept" in caplog.text


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert not PictureStore(tmp_path).put("r", outcome())
    assert list(tmp_path.iterdir()) == []


def test_nobody_else_can_look_at_the_pictures(tmp_path):
    PictureStore(tmp_path / "results").put("r", outcome())
    assert stat.S_IMODE((tmp_path / "results").stat().st_mode) == 0o700
