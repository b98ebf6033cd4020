"""Pictures that were paid for are kept, whole or not at all, and the oldest make room."""

import os
import stat

import pytest
from PIL import Image
from pulid_sdxl.hosted.results import Outcome, Results, as_batches


def outcome(color="red", count=1, size=(8, 6), request_id="r"):
    images = tuple(Image.new("RGB", size, color) for _ in range(count))
    return Outcome(images, "17454220438242315174", request_id, {"seed": "17454220438242315174", "notes": []})


def test_what_was_kept_comes_back_the_same(tmp_path):
    kept = outcome(count=2)

    assert Results(tmp_path / "results").keep("r", kept)
    found = Results(tmp_path / "results").get("r")

    assert [image.tobytes() for image in found.images] == [image.tobytes() for image in kept.images]
    assert (found.seed, found.request_id, found.info) == (kept.seed, kept.request_id, kept.info)


def test_what_was_not_kept_is_none(tmp_path):
    assert Results(tmp_path).get("r") is None


@pytest.mark.parametrize("harm", ["missing", "damaged", "no facts"])
def test_damaged_files_count_as_none(tmp_path, harm):
    Results(tmp_path).keep("r", outcome())
    file = tmp_path / "r" / ("outcome.json" if harm == "no facts" else "0.png")
    file.unlink() if harm == "missing" else file.write_bytes(file.read_bytes()[:20])

    assert Results(tmp_path).get("r") is None


def test_a_second_outcome_takes_the_place_of_the_first(tmp_path):
    results = Results(tmp_path)
    results.keep("r", outcome("red", count=2))
    results.keep("r", outcome("blue"))

    assert [image.getpixel((0, 0)) for image in results.get("r").images] == [(0, 0, 255)]


def test_the_ones_not_used_for_longest_go_first(tmp_path):
    results = Results(tmp_path)
    results.keep("size", outcome())
    size = sum(file.stat().st_size for file in (tmp_path / "size").iterdir())
    results = Results(tmp_path / "few", largest=3 * size)
    for number in range(3):
        results.keep(str(number), outcome())
        os.utime(tmp_path / "few" / str(number), (number, number))
    results.get("0")  # used just now

    results.keep("3", outcome())

    assert sorted(place.name for place in (tmp_path / "few").iterdir()) == ["0", "2", "3"]


def test_the_newest_stays_even_if_it_is_too_large_alone(tmp_path):
    results = Results(tmp_path, largest=1)

    results.keep("r", outcome())

    assert results.get("r") is not None


def test_a_disk_that_takes_nothing_costs_no_pictures(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")

    assert not Results(tmp_path / "file").keep("r", outcome())
    assert "could not be kept" in caplog.text


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)

    assert not Results(tmp_path).keep("r", outcome())
    assert list(tmp_path.iterdir()) == []


def test_nobody_else_can_look_at_the_pictures(tmp_path):
    Results(tmp_path / "results").keep("r", outcome())

    assert stat.S_IMODE((tmp_path / "results").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("sizes", "expected"), [([1, 1, 1], [3]), ([1, 2, 2], [1, 2]), ([1, 2, 1], [1, 1, 1]), ([2], [1])]
)
def test_pictures_of_one_size_come_together_and_none_is_dropped(sizes, expected):
    images = [Image.new("RGB", (size, size)) for size in sizes]

    batches = as_batches(images)

    assert [len(batch) for batch in batches] == expected
    assert [image for batch in batches for image in batch] == images
