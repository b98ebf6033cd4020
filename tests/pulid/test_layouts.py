"""A mask for each person: nobody's touches another's, at any size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pulid_sdxl.pulid.errors import InputError
from pulid_sdxl.pulid.faces import Face, FoundFaces
from pulid_sdxl.pulid.layouts import REACHES, masks_of, people_of, read_boxes, write_boxes
from pulid_sdxl.tools.fakes.networks import LANDMARKS

LEFT, RIGHT = (0.2, 0.2, 0.32, 0.4), (0.6, 0.25, 0.72, 0.45)


def disjoint(masks):
    """The second highest value of any pixel."""
    return 0.0 if len(masks) < 2 else masks.topk(2, dim=0).values[1].max().item()


box = st.tuples(*[st.floats(-0.1, 0.95)] * 2, *[st.floats(0.02, 0.5)] * 2).map(
    lambda drawn: (drawn[0], drawn[1], drawn[0] + drawn[2], drawn[1] + drawn[3])
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(box, min_size=1, max_size=5),
    st.sampled_from(list(REACHES)),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_masks_are_disjoint_and_sum_to_one_at_most(boxes, reach, feather, eighths):
    width, height = (8 * side for side in eighths)
    masks = masks_of(boxes, reach, feather, (width, height))
    assert masks.shape == (len(boxes), height, width)
    assert masks.min() >= 0 and masks.max() <= 1
    assert disjoint(masks) <= 1e-6
    assert masks.sum(dim=0).max() <= 1


@pytest.mark.parametrize("side", range(8, 2049, 8))
def test_every_multiple_of_eight_is_a_size(side):
    masks = masks_of([LEFT, RIGHT], "body", 0.1, (side, 8))
    assert masks.shape == (2, 8, side) and disjoint(masks) <= 1e-6
    assert masks_of([LEFT, RIGHT], "head", 0.1, (8, side)).shape == (2, side, 8)


@pytest.mark.parametrize("reach", REACHES)
def test_people_who_change_places_change_masks(reach):
    there, back = masks_of([LEFT, RIGHT], reach, 0.2, (96, 64)), masks_of([RIGHT, LEFT], reach, 0.2, (96, 64))
    assert torch.equal(there, back.flip(0))
    assert there.amax(dim=(1, 2)).tolist() == [1, 1]


def test_a_mask_is_whole_at_its_face_and_reaches_as_far_as_it_says():
    for reach, (beside, above, below) in REACHES.items():
        [mask] = masks_of([(0.4, 0.4, 0.6, 0.6)], reach, 0.0, (400, 400))
        rows, columns = torch.nonzero(mask, as_tuple=True)
        width = height = 80
        assert rows.min() == max(0, 160 - round(above * height)) and columns.min() == max(
            0, 160 - round(beside * width)
        )
        assert rows.max() == min(399, 239 + round(below * height))
        assert mask[200, 200] == 1


def test_reaches_grow():
    sums = [masks_of([(0.45, 0.3, 0.55, 0.4)], reach, 0.1, (256, 256)).sum() for reach in REACHES]
    assert sums == sorted(sums) and len(set(sums)) == 4


def test_the_nearest_face_wins_and_the_border_of_equal_ones_lies_midway():
    faces = [(0.3, 0.4, 0.4, 0.5), (0.5, 0.4, 0.6, 0.5)]
    masks = masks_of(faces, "head and shoulders", 0.0, (200, 100))
    owner = masks.argmax(dim=0)[45]
    covered = masks.sum(dim=0)[45] > 0
    columns = torch.arange(200)
    assert covered[41:139].all()
    assert owner[covered & (columns < 90)].unique().tolist() == [0]
    assert owner[covered & (columns >= 90)].unique().tolist() == [1]


def test_a_mask_ends_softly_at_its_edge_and_at_a_neighbour():
    def steepest(feather):
        masks = masks_of([(0.3, 0.4, 0.4, 0.5), (0.5, 0.4, 0.6, 0.5)], "head and shoulders", feather, (800, 400))
        return max(masks.diff(dim=side).abs().max().item() for side in (1, 2))

    # Upwards the region reaches 44 px, sideways 120, where a neighbour's falls as one's own rises.
    assert steepest(0.2) == pytest.approx(1 / (0.2 * 44), rel=0.1)
    assert steepest(0.0) == 1


def test_the_largest_faces_are_placed_in_the_order_asked_for():
    def face(x, side):
        return Face((x, 50.0, x + side, 50.0 + side), LANDMARKS, 0.9)

    found = FoundFaces([face(300.0, 40), face(20.0, 60), face(150.0, 10)], [], "")
    boxes = people_of(found, 2, "left to right", (400, 200))
    assert boxes == [(20 / 400, 50 / 200, 80 / 400, 110 / 200), (300 / 400, 50 / 200, 340 / 400, 90 / 200)]
    assert people_of(found, 2, "right to left", (400, 200)) == boxes[::-1]
    with pytest.raises(InputError, match="shows 3 faces, and 4 people"):
        people_of(found, 4, "left to right", (400, 200))
    with pytest.raises(InputError, match="shows 1 face, and"):
        people_of(FoundFaces(found.detected[:1], [], ""), 2, "largest", (400, 200))


def test_boxes_that_are_written_are_read():
    assert read_boxes(write_boxes([LEFT, RIGHT]), 2) == [LEFT, RIGHT]
    assert read_boxes("\n 0.1, 0.2, 0.3, 0.4 \n\n", 1) == [(0.1, 0.2, 0.3, 0.4)]


@pytest.mark.parametrize(("text", "people", "words"), [
    ("0.1 0.2 0.3 0.4", 2, "Boxes for 2 needed.*found 1"),
    ("0.1 0.2 0.3 0.4\n0.5 0.2 0.4 0.4", 2, r"Line 2 of boxes .*'0\.5 0\.2 0\.4 0\.4'"), ("left", 1, "Line 1 of boxes"),
    ("10 20 300 400", 1, "shares of the picture"), ("0.1 0.2 nan 0.4", 1, "Line 1"), ("0.1 0.2 0.3", 1, "Line 1"),
])  # fmt: skip
def test_boxes_that_are_none_are_refused_in_words(text, people, words):
    with pytest.raises(InputError, match=words):
        read_boxes(text, people)
