"""How alike faces are, by arithmetic that can be done in the head."""

import csv
import itertools
import math

import pytest
import torch
from pulid_sdxl.pulid.cache import ResultCache
from pulid_sdxl.pulid.errors import InputError, NoFaceError
from pulid_sdxl.pulid.people import Rule, floor_of, match, mean_direction, passing, recognise_all, report, similarities
from pulid_sdxl.tools.fakes.networks import SpotAnalyzer


def vector(*values):
    return torch.tensor([*values, *[0.0] * (512 - len(values))])


def test_similarity_is_the_cosine_whatever_the_lengths():
    faces = torch.stack((vector(30), vector(0, 0.01), vector(-2), vector(3, 4)))

    scores = similarities(faces, mean_direction(vector(7)[None]))

    assert scores.tolist() == pytest.approx([1, 0, -1, 0.6])


def test_each_reference_counts_the_same_whatever_its_length():
    direction = mean_direction(torch.stack((vector(100), vector(0, 0.1))))

    assert direction[:2].tolist() == pytest.approx([0.5**0.5, 0.5**0.5])
    assert direction.norm().item() == pytest.approx(1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_recogniser_that_answers_with_nan_is_named(value):
    with pytest.raises(InputError, match="recogniser answered with NaN or infinite values"):
        mean_direction(vector(value)[None])
    with pytest.raises(InputError, match="provider"):
        similarities(vector(1, value)[None], vector(1))


# ---- Who is who ----


def at(*degrees):
    """Embeddings on a circle, (F, 512), as the recogniser gives them: of any length."""
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))
    faces = torch.zeros(len(degrees), 512)
    faces[:, 0], faces[:, 1] = angles.cos(), angles.sin()
    return faces * torch.linspace(5, 25, len(degrees))[:, None] if degrees else faces


def people(*degrees):
    return torch.nn.functional.normalize(at(*degrees), dim=-1)


def cosine(degrees):
    return pytest.approx(math.cos(math.radians(degrees)), abs=1e-6)


def test_each_person_has_a_face_of_their_own_even_where_both_are_most_like_one():
    # Person 1 lies at 0 degrees, person 2 at 20. Face 0 is nearest to both; alone, each would take it.
    likeness = match(at(12, 50), people(0, 20))
    assert likeness.faces == (0, 1)
    assert likeness.cosines == (cosine(12), cosine(30))
    assert likeness.score == cosine(30)


def test_the_matching_is_the_best_there_is_not_the_greedy_one():
    # Greedy takes face 0 for person 2 (5 degrees off) and leaves face 1 to person 1, 110 degrees off.
    likeness = match(at(25, 90), people(-20, 30))
    assert likeness.faces == (0, 1)
    assert likeness.cosines == (cosine(45), cosine(60))


@pytest.mark.parametrize("seed", range(20))
def test_no_other_matching_has_a_higher_sum(seed):
    drawn = torch.Generator().manual_seed(seed)
    count = 1 + seed % 4
    faces = torch.randn(count + seed % 3, 512, generator=drawn)
    directions = torch.nn.functional.normalize(torch.randn(count, 512, generator=drawn), dim=-1)

    likeness = match(faces, directions)

    cosines = torch.nn.functional.normalize(faces, dim=-1) @ directions.T
    best = max(
        sum(cosines[face, person].item() for person, face in enumerate(order))
        for order in itertools.permutations(range(len(faces)), count)
    )
    assert sum(likeness.cosines) == pytest.approx(best, abs=1e-5)
    assert len(set(likeness.faces)) == count


def test_three_faces_and_two_people():
    likeness = match(at(200, 85, 10), people(0, 90))
    assert (likeness.faces, likeness.count) == ((2, 1), 3)
    assert likeness.score == cosine(10)


@pytest.mark.parametrize("faces", [(), (10,)])
def test_with_fewer_faces_than_people_there_is_no_score(faces):
    likeness = match(at(*faces), people(0, 90))
    assert likeness.score is None
    assert likeness.faces == ((0, None) if faces else (None, None))


def test_the_floor_is_the_highest_that_any_stranger_reaches_with_anybody():
    assert floor_of([at(100, 170), at(), at(240)], people(0, 60)) == cosine(40)
    with pytest.raises(NoFaceError, match="strangers show no face"):
        floor_of([at(), at()], people(0))


# ---- Which pictures pass ----

SCORES = [0.2, 0.7, None, 0.5, 0.9, 0.5]


@pytest.mark.parametrize(
    ("rule", "passed"),
    [
        (Rule("at least", 0.5), [4, 1, 3, 5]),
        (Rule("best", 0.5, 3), [4, 1, 3]),
        (Rule("best", 0.99, 9), [4, 1, 3, 5, 0]),  # as many as there are, and never one without a face
        (Rule("best of those at least", 0.5, 2), [4, 1]),
        (Rule("best of those at least", 0.6, 5), [4, 1]),
        (Rule("at least", 0.95, best_if_none=True), [4]),
    ],
)
def test_what_passes(rule, passed):
    assert passing(SCORES, rule) == passed


def test_when_none_passes_the_best_is_named():
    with pytest.raises(InputError, match=r"threshold 0\.95; the best, picture 5, has 0\.900"):
        passing(SCORES, Rule("at least", 0.95))


@pytest.mark.parametrize("best_if_none", [False, True])
def test_without_a_face_anywhere_nothing_passes(best_if_none):
    with pytest.raises(NoFaceError, match="None of the 2 pictures shows a face for every person"):
        passing([None, None], Rule("best", best_if_none=best_if_none))


def test_the_report_is_a_table_of_all_pictures():
    likenesses = [match(at(60, 90), people(0, 90)), match(at(45), people(0, 90)), match(at(0, 90, 30), people(0, 90))]
    rows = list(csv.DictReader(report(likenesses, [2]).splitlines()))
    assert [(row["picture"], row["score"], row["rank"], row["faces"]) for row in rows] == [
        ("1", "0.5000", "", "2"), ("2", "", "", "1"), ("3", "1.0000", "1", "3"),
    ]  # fmt: skip
    assert rows[0]["person 2"] == "1.0000" and sorted((rows[1]["person 1"], rows[1]["person 2"])) == ["", "0.7071"]


# ---- Seeing ----


def picture(*spots):
    image = torch.full((200, 300, 3), 0.5)
    for x, y in spots:
        image[y, x] = 1
    return image


def test_a_picture_is_looked_at_once_and_every_face_may_be_the_last():
    analyzer, cache, steps = SpotAnalyzer(), ResultCache(2**20), []
    first = recognise_all(picture((50, 60), (200, 60)), analyzer, cache, lambda: steps.append(1))
    again = recognise_all(picture((50, 60), (200, 60)), analyzer, cache)
    assert again is first and analyzer.looks == 1 and len(steps) == 4  # two looks for faces, and one at each
    assert first.embeddings[:, 0].tolist() == [30, 180]
    assert recognise_all(picture(), analyzer, cache).embeddings.shape == (0, 512)


def test_weights_move_the_middle():
    pair = at(0, 90)
    middle = mean_direction(pair, torch.tensor((3.0, 1.0)))
    assert math.degrees(math.atan2(middle[1], middle[0])) == pytest.approx(math.degrees(math.atan2(1, 3)), abs=1e-4)
