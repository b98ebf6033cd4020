"""How alike faces are, by arithmetic that can be done in the head."""

import pytest
import torch
from pulid_sdxl.pulid.errors import InputError
from pulid_sdxl.pulid.people import mean_direction, similarities


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
