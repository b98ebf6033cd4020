"""Photographs on their way out: how they are encoded, which way they go, and what becomes of an upload."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from pulid_sdxl.hosted.references import Reference, encode, inline, read_file, read_lines
from pulid_sdxl.pulid.errors import InputError


def decoded(reference):
    return np.asarray(Image.open(io.BytesIO(reference.data)))


def noise(height, width, channels=3):
    return torch.rand(height, width, channels, generator=torch.Generator().manual_seed(0))


# ---- encode ----


def test_a_small_photograph_travels_without_loss():
    image = noise(40, 30)
    reference = encode(image)
    assert reference.content_type == "image/png"
    assert np.array_equal(decoded(reference), (image * 255).round().numpy())
    assert reference.data_uri == f"data:image/png;base64,{base64.b64encode(reference.data).decode()}"


def test_brightness_is_not_stretched():
    assert set(decoded(encode(torch.full((8, 8, 3), 0.5))).flatten()) == {128}


def test_a_large_photograph_is_shrunk_to_1024_and_keeps_its_shape():
    assert decoded(encode(noise(1500, 3000))).shape == (512, 1024, 3)
    assert decoded(encode(noise(1100, 30), as_is=True)).shape == (1100, 30, 3)


def test_a_photograph_that_is_large_as_a_png_travels_as_a_fine_jpeg():
    reference = encode(noise(1024, 1024))
    with Image.open(io.BytesIO(reference.data)) as image:
        assert (reference.content_type, image.format) == ("image/jpeg", "JPEG")
        assert {layer[1:3] for layer in image.layer} == {(1, 1)}  # 4:4:4
        assert not image.getexif()


def test_transparent_parts_lie_on_white():
    image = torch.zeros(2, 2, 4)
    image[0, :, 3] = 1  # black above, nothing below
    reference = encode(image)
    assert decoded(reference)[:, 0].tolist() == [[0, 0, 0], [255, 255, 255]]
    assert "transparent" in reference.note and encode(noise(4, 4)).note == ""


@pytest.mark.parametrize("image", [torch.zeros(0, 4, 3), torch.zeros(4, 4), torch.zeros(4, 4, 2)])
def test_what_is_no_picture_is_refused(image):
    with pytest.raises(InputError, match="Expected a picture"):
        encode(image)


def test_a_picture_of_nan_is_refused():
    with pytest.raises(InputError, match="NaN"):
        encode(torch.full((4, 4, 3), torch.nan))


# ---- Addresses of the user's own ----


def test_addresses_and_data_uris_are_taken_line_by_line():
    uri = encode(noise(4, 4)).data_uri
    lines = read_lines(f"\n https://example.com/a.png \n\n{uri}\n")
    assert [line.url for line in lines] == ["https://example.com/a.png", ""]
    assert lines[1] == encode(noise(4, 4))  # what it shows counts, not how it came, and so do its size and way
    assert read_lines("") == read_lines(" \n ") == []


@pytest.mark.parametrize(("line", "words"), [
    ("example.com/a.png", "neither a data URI nor an https"),
    ("http://example.com/a.png", "neither a data URI nor an https"),
    ("file:///etc/passwd", "neither a data URI nor an https"),
    ("https://", "neither a data URI nor an https"),
    ("https://[", "neither a data URI nor an https"),
    ("data:text/plain;base64,eA==", "no picture that could be read"),
    ("data:image/png;base64,***", "damaged"),
    ("data:image/png,abc", ";base64"),
    ("data:image/png;base64,eA==", "no picture that could be read"),
])  # fmt: skip
def test_a_line_that_cannot_be_sent_is_named(line, words):
    with pytest.raises(InputError, match=f"Line 2 of reference_urls.*{words}"):
        read_lines(f"https://example.com/a.png\n{line}")


@pytest.mark.parametrize("host", [
    "localhost", "LOCALHOST.", "a.localhost", "127.0.0.1", "127.1", "0", "2130706433", "0177.0.0.1", "0x7f.1",
    "127.0.0.1.", "10.0.0.1..", "192.168.1.9", "169.254.169.254", "[::]", "[::1]", "[::ffff:127.0.0.1]",
    "[64:ff9b::a00:1]", "nas", "nas.local", "router.lan", "x.internal", "\uff11\uff12\uff17.1", "100.64.0.1",
])  # fmt: skip
def test_addresses_that_only_this_network_can_read_are_refused(host):
    with pytest.raises(InputError, match="Line 1 of reference_urls"):
        read_lines(f"https://{host}/a.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_picture_in_a_line_is_known_by_its_pixels_and_keeps_to_the_size(kind):
    file = io.BytesIO()
    Image.new("RGB", (2000, 40), (10, 20, 30)).save(file, kind)
    line = f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
    [small], [large] = read_lines(line), read_lines(line, as_is=True)
    assert (decoded(small).shape, decoded(large).shape) == ((20, 1024, 3), (40, 2000, 3))
    assert small.digest == encode(torch.from_numpy(decoded(small).copy()) / 255).digest


def test_a_file_of_any_kind_is_read_from_the_folder_and_from_nowhere_else(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("hello")
    (tmp_path / "secret").write_text("x")
    file = read_file(tmp_path / "in", "a.txt")
    assert (file.data, file.content_type) == (b"hello", "text/plain")
    for name in ("../secret", str(tmp_path / "secret"), "b.txt", "", "../in/../secret"):
        with pytest.raises(InputError, match="not a file of ComfyUI's input folder"):
            read_file(tmp_path / "in", name)


# ---- Which way ----


@pytest.mark.parametrize(("sizes", "how", "expected"), [
    ([2**20], "auto", True),
    ([2**20 + 1], "auto", False),
    ([2**20] * 4, "auto", True),
    ([2**20] * 5, "auto", False),
    ([2**23], "data URI", True),
    ([1], "upload", False),
    ([], "auto", True),
])  # fmt: skip
def test_large_photographs_are_uploaded(sizes, how, expected):
    photos = [Reference("d", content_type="image/png", data=bytes(size)) for size in sizes]
    assert inline(photos, how) is expected
