"""Pictures for people to look at: what must be seen in them."""

import numpy as np
import pytest
import torch
from pulid_sdxl.pulid.layouts import masks_of
from pulid_sdxl.pulid.preview import (
    KEPT,
    LEFT_OUT,
    OTHER,
    PEOPLE,
    WORDS,
    Card,
    Column,
    contact_sheet,
    draw_people,
    on_one_size,
    score_chart,
)  # fmt: skip

PHOTO = np.full((120, 90, 3), 128, np.uint8)


def pixels(picture, color):
    """Rows and columns of the pixels of exactly this colour."""
    return torch.nonzero((picture == torch.tensor(color, dtype=torch.uint8)).all(dim=-1), as_tuple=True)


def card(number, place=1, taken=True, why="", bars=None):
    return Card(PHOTO, number, (20.0, 30.0, 60.0, 80.0), place, taken, why, 0.8, bars or {"size": (0.5, "120 px")})


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (5, 5), (6, 5), (60, 5)])
def test_a_sheet_shows_every_photograph(count, columns):
    sheet = contact_sheet([card(number) for number in range(count)])
    assert sheet.dtype == torch.uint8 and sheet.shape[1] == contact_sheet([card(0)] * columns).shape[1]
    single = contact_sheet([card(0)]).shape[0]
    assert sheet.shape[0] == single + (-(-count // 5) - 1) * (single - 14)


def test_who_is_taken_is_green_and_who_is_left_out_red():
    taken, spare, out = (contact_sheet([one]) for one in (card(1), card(1, 9, False), card(1, None, False, "no face")))
    for sheet, green, red in ((taken, True, False), (spare, False, False), (out, False, True)):
        assert bool(len(pixels(sheet, KEPT)[0])) == green and bool(len(pixels(sheet, LEFT_OUT)[0])) == red


def test_a_longer_bar_is_a_better_mark():
    greens = [len(pixels(contact_sheet([card(1, bars={"size": (share, "")})]), KEPT)[0]) for share in (0.1, 0.5, 1.0)]
    assert greens == sorted(set(greens))


def bar(chart, color, left, right):
    """Height in px of the bar of this colour between two columns of the chart."""
    rows, columns = pixels(chart, color)
    inside = rows[(columns >= left) & (columns < right) & (rows < 52 + 260)]
    return (inside.max() - inside.min() + 1).item()


def test_bars_are_as_high_as_their_scores_and_lines_lie_where_they_say():
    chart = score_chart(
        [Column(PHOTO, number, score, True) for number, score in enumerate((1.0, 0.5), 1)], 0.7, 0.3, "two"
    )
    middle = 54 + 96  # of the room for two columns of 96 px
    assert bar(chart, KEPT, 54, middle - 12) == pytest.approx(260, abs=2)
    assert bar(chart, KEPT, middle + 12, middle + 90) == pytest.approx(130, abs=2)
    beyond = chart[:, 54 + 2 * 96 + 20 :]  # to the right of the bars
    white, yellow = pixels(beyond, WORDS)[0].float(), pixels(beyond, OTHER)[0].float()
    assert white.median() == pytest.approx(52 + 260 * 0.3, abs=2)
    assert yellow.median() == pytest.approx(52 + 260 * 0.7, abs=2)


@pytest.mark.parametrize("scores", [[None], [-0.4, None, 0.2], [0.9] * 200])
def test_charts_of_all_kinds_are_drawn(scores):
    columns = [Column(PHOTO, number, score, False) for number, score in enumerate(scores)]
    assert score_chart(columns, None, None, "").float().std() > 1


def test_each_person_has_a_colour_on_their_face():
    boxes = [(0.1, 0.3, 0.3, 0.7), (0.6, 0.3, 0.8, 0.7)]
    drawn = draw_people(PHOTO, masks_of(boxes, "head", 0.1, (400, 200)), boxes)
    assert drawn.shape == (200, 400, 3)
    for (x0, _, x1, _), color in zip(boxes, PEOPLE, strict=False):
        columns = pixels(drawn, color)[1]
        assert len(columns) and 400 * x0 - 2 <= columns.min() and columns.max() <= 400 * x1 + 2


def test_pictures_of_several_sizes_become_one_batch():
    batch = on_one_size([torch.ones(4, 6, 3, dtype=torch.uint8), torch.ones(5, 2, 3, dtype=torch.uint8)])
    assert batch.shape == (2, 5, 6, 3) and batch.sum(dim=(1, 2, 3)).tolist() == [72, 30]
