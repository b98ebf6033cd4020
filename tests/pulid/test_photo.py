"""pulid/photo.py: what a graph gives, as the detectors take it."""

import cv2
import numpy as np
import pytest
import torch
from pulid_sdxl.pulid.errors import InputError
from pulid_sdxl.pulid.photo import cut_off, digest, read_photo, shrunk, washed_out


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)


def test_a_photograph_of_whole_levels_comes_back_as_it_was(photo):
    assert np.array_equal(read_photo(torch.from_numpy(photo) / 255), photo)


def test_a_large_photograph_is_shrunk_as_the_authors_do():
    levels = np.random.default_rng(1).integers(0, 256, (1500, 1111, 3), dtype=np.uint8)
    photo = read_photo(torch.from_numpy(levels) / 255)
    expected = cv2.resize(levels, (int(1111 * 1024 / 1500), 1024), interpolation=cv2.INTER_LANCZOS4)
    assert np.array_equal(photo, expected)


def test_a_photograph_can_keep_its_size():
    levels = np.random.default_rng(1).integers(0, 256, (1500, 1111, 3), dtype=np.uint8)
    assert np.array_equal(read_photo(torch.from_numpy(levels) / 255, long_edge=1500), levels)


def test_transparency_is_laid_on_white():
    image = torch.tensor([0.2, 0.4, 0.6, 0.5]).repeat(100, 20, 1)
    image[70:, :, 3] = 0.25
    assert read_photo(image)[[0, 99], 0].tolist() == [[153, 178, 204], [204, 217, 230]]  # 255 (1 - opacity (1 - c))


def test_a_grey_photograph_gets_three_equal_channels():
    photo = read_photo(torch.full((20, 30, 1), 0.2))
    assert photo.shape == (20, 30, 3) and (photo == 51).all() and photo.flags.c_contiguous


def test_values_outside_the_range_are_clipped_and_half_precision_is_read():
    image = torch.tensor([-0.5, 1.5, 1.0], dtype=torch.float16).expand(20, 20, 3)
    assert read_photo(image)[0, 0].tolist() == [0, 255, 255]


def test_reading_leaves_the_image_as_it_was():
    image = torch.rand(20, 20, 4)
    before = image.clone()
    read_photo(image)[:] = 0
    assert torch.equal(image, before)


@pytest.mark.parametrize(
    ("shape", "expected"), [((64, 16, 3), (64, 16)), ((200, 8000, 3), (25, 1024)), ((8000, 4000, 1), (1024, 512))]
)
def test_unusual_sizes_are_read(shape, expected):
    assert read_photo(torch.rand(shape)).shape == (*expected, 3)


@pytest.mark.parametrize(("image", "words"), [
    (torch.rand(1, 1, 3), "1 x 1 px is too small"), (torch.rand(64, 15, 3), "15 x 64 px is too small"),
    (torch.rand(16, 8000, 3), "8000 x 16 px is too small or too narrow"),
    (torch.rand(0, 0, 3), "0 x 0 px is too small"), (torch.rand(20, 20, 2), "1, 3 or 4 channels.*20, 20, 2"),
    (torch.rand(1, 20, 20, 3), "height, width, channels.*1, 20, 20, 3"),
    (torch.zeros(20, 20, 3, dtype=torch.uint8), "float image.*uint8"),
    (torch.full((20, 20, 3), torch.nan), "NaN or infinite"), (torch.full((20, 20, 3), torch.inf), "NaN or infinite"),
])  # fmt: skip
def test_what_is_not_a_photograph_is_refused_in_words(image, words):
    with pytest.raises(InputError, match=words):
        read_photo(image)


def test_a_digest_follows_content_shape_and_type():
    zeros = torch.zeros(4, 6)
    others = zeros + 1e-7, zeros.view(6, 4), zeros.half(), zeros.to(torch.int32)
    assert digest(zeros) == digest(torch.zeros(6, 4).T)
    assert len({digest(zeros), *map(digest, others)}) == 5


def test_pixels_of_0_to_255_are_told_as_that():
    with pytest.raises(InputError, match="up to 255; expected 0 to 1"):
        read_photo(torch.full((64, 64, 3), 255.0))
    read_photo(torch.full((64, 64, 3), 1.2))  # as upscalers leave it


def test_what_there_is_to_know_of_a_photograph_is_put_into_words():
    white = np.full((100, 100, 3), 255, np.uint8)
    assert washed_out(white) == "one colour all over (level 255 of 255)"
    white[:10, :10] = 0  # as a 16-bit grey picture comes: all but its darkest pixels white
    assert washed_out(white) == "99.0% white" and washed_out(255 - white) == "99.0% black"
    white[:20] = 100
    assert washed_out(white) is None
    beyond = "with pixels from -0.50 to 1.40: what lies beyond 0 to 1 is taken as black or white"
    assert cut_off(torch.tensor([-0.5, 1.4])) == beyond
    assert cut_off(torch.rand(9, 9, 3)) is None
    assert shrunk(torch.zeros(2048, 4096, 3)) == "shrunk from 4096 x 2048 to 1024 x 512 px (4.0 times)"
    assert shrunk(torch.zeros(64, 64, 3)) is None
