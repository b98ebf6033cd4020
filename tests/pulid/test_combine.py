"""How two identities become one, and what is left of each."""

import math
from dataclasses import replace

import pytest
import torch
from pulid_sdxl.pulid.encoders import FACE_WIDTH, HIDDEN_WIDTH, IdEncoder
from pulid_sdxl.pulid.errors import InputError, MismatchError
from pulid_sdxl.pulid.identity import PREVIEW_SIZE, IdEmbedding
from pulid_sdxl.pulid.preview import thumbnails
from pulid_sdxl.pulid.tokens import MODES, PEOPLE, combine, identity_of, uncond_tokens

TOKENS = {"v1": 10, "v1.1": 32}
CALCULATED = ("average", "add", "subtract")
ONE_FACE = [mode for mode in MODES if mode != PEOPLE]  # the modes that make one face of two


def tokens(rows, count, seed):
    return torch.randn(rows, count, 2048, generator=torch.Generator().manual_seed(seed))


def identity(seed, version="v1", rows=1, encoder="print", photographs=1):
    """Tokens as v1 lays them out for several photographs, or v1.1 for any number of them."""
    nobody = tokens(1, TOKENS[version], seed=1000)
    uncond = torch.cat((nobody, *[nobody[:, :5]] * (photographs - 1)), dim=1)
    return IdEmbedding(tokens(rows, uncond.shape[1], seed), uncond, version, encoder)


@pytest.fixture(params=TOKENS)
def pair(request):
    return identity(1, request.param), identity(2, request.param)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return IdEncoder().requires_grad_(False)


def encoded(encoder, photographs, **options):
    """An identity of these photographs, told apart by numbers."""
    drawn = [torch.Generator().manual_seed(number) for number in photographs]
    x = torch.cat([torch.randn(1, FACE_WIDTH, generator=g) for g in drawn])
    hidden = [torch.cat([torch.randn(1, 5, HIDDEN_WIDTH, generator=g) for g in drawn]) for _ in range(5)]
    return identity_of(encoder(x, hidden), uncond_tokens(encoder, 5), "v1", "print", **options)


@pytest.mark.parametrize(("mode", "id_mix"), [("mix", True), ("auxiliary", False)])
def test_joining_v1_identities_is_encoding_their_photographs_together(encoder, mode, id_mix):
    joined = combine(encoded(encoder, [1]), encoded(encoder, [2]), mode)

    together = encoded(encoder, [1, 2], id_mix=id_mix)
    assert torch.allclose(joined.cond, together.cond, atol=1e-5)
    assert torch.equal(joined.uncond, together.uncond)


@pytest.mark.parametrize(("mode", "taken"), [("mix", None), ("auxiliary", 5)])
def test_joining_takes_all_tokens_or_the_first_five_of_the_second_whatever_the_weight(pair, mode, taken):
    for weight in (0.0, 1.0):
        joined = combine(*pair, mode, weight).cond
        assert torch.equal(joined, torch.cat((pair[0].cond, pair[1].cond[:, :taken]), dim=1))


@pytest.mark.parametrize("mode", MODES)
def test_the_negative_branch_has_as_many_tokens_and_the_two_that_go_in_stay_as_they_are(pair, mode):
    before = [copy.clone() for one in pair for copy in (one.cond, one.uncond)]
    combined = combine(*pair, mode)

    assert combined.uncond.shape == (1, combined.tokens, 2048)
    assert (combined.version, combined.encoder) == (pair[0].version, "print")
    assert all(map(torch.equal, before, [kept for one in pair for kept in (one.cond, one.uncond)]))


@pytest.mark.parametrize(
    ("mode", "parts"),  # of the first, the second and nobody at a weight of a quarter
    [("average", (0.75, 0.25, 0)), ("add", (1, 0.25, -0.25)), ("subtract", (1, -0.25, 0.25))],
)
def test_what_a_weight_moves(pair, mode, parts):
    of_all = (pair[0].cond, pair[1].cond, pair[1].uncond)
    expected = sum(part * tokens for part, tokens in zip(parts, of_all, strict=True))
    assert torch.allclose(combine(*pair, mode, 0.25).cond, expected, atol=1e-5)
    assert torch.equal(combine(*pair, mode, 0.0).cond, pair[0].cond)


def test_a_whole_weight_is_the_second_and_a_person_less_themselves_is_nobody(pair):
    first, second = pair

    assert torch.equal(combine(*pair, "average", 1.0).cond, second.cond)
    assert torch.allclose(combine(first, first, "subtract", 1.0).cond, first.uncond, atol=1e-5)


@pytest.mark.parametrize("mode", ONE_FACE)
@pytest.mark.parametrize(("rows", "found"), [((1, 3), 3), ((3, 1), 3), ((3, 3), 3), ((1, 1), 1)])
def test_one_identity_serves_every_row_of_the_other(mode, rows, found):
    first, second = identity(1, rows=rows[0]), identity(2, rows=rows[1])

    combined = combine(first, second, mode)

    assert len(combined.cond) == found
    for row in range(found):
        alone = combine(
            replace(first, cond=first.cond[[min(row, rows[0] - 1)]]),
            replace(second, cond=second.cond[[min(row, rows[1] - 1)]]),
            mode,
        )
        assert torch.equal(combined.cond[row], alone.cond[0])


@pytest.mark.parametrize("mode", ONE_FACE)
def test_other_numbers_of_identities_are_refused_with_both(mode):
    with pytest.raises(MismatchError, match=r"identity_1 holds 2 identities, identity_2 holds 3\."):
        combine(identity(1, rows=2), identity(2, rows=3), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("other", [identity(2, "v1.1"), identity(2, encoder="other")], ids=["version", "encoder"])
def test_identities_of_two_encoders_are_refused_with_both(mode, other):
    with pytest.raises(MismatchError) as refusal:
        combine(identity(1), other, mode)

    for one in (identity(1), other):
        assert f"PuLID {one.version} (encoder {one.encoder})" in str(refusal.value)


@pytest.mark.parametrize("mode", CALCULATED)
def test_different_numbers_of_tokens_join_but_are_not_calculated_with(mode):
    one, three = identity(1), identity(2, photographs=3)

    with pytest.raises(MismatchError, match="identity_1 has 10 tokens and identity_2 20: "):
        combine(one, three, mode)
    assert combine(one, three, "mix").tokens == 30
    assert combine(three, one, "auxiliary").tokens == 25


@pytest.mark.parametrize("mode", CALCULATED)
def test_as_many_tokens_that_play_other_parts_are_not_calculated_with(encoder, mode):
    three, mixed = encoded(encoder, [1, 2, 3]), encoded(encoder, [4, 5], id_mix=True)
    assert three.tokens == mixed.tokens == 20

    with pytest.raises(MismatchError, match="which play other parts"):
        combine(three, mixed, mode)


@pytest.mark.parametrize("mode", CALCULATED)
def test_the_rounding_of_another_machine_makes_no_other_layout(pair, mode):
    first, second = pair
    rounded = replace(second, uncond=second.uncond.half().float())

    assert torch.equal(combine(first, rounded, mode).uncond, first.uncond)


@pytest.mark.parametrize(("mode", "weight", "words"), [
    *(("average", weight, "between 0 and 1, found") for weight in (-0.1, 1.1, math.nan, math.inf)),
    ("blend", 1.0, r"'blend'.* mix, auxiliary, average, add, subtract"),
])  # fmt: skip
def test_a_weight_outside_its_range_and_an_unknown_mode_are_refused(pair, mode, weight, words):
    with pytest.raises(InputError, match=words):
        combine(*pair, mode, weight)


def shades(*values):
    return torch.stack([torch.full((PREVIEW_SIZE, PREVIEW_SIZE, 3), value, dtype=torch.uint8) for value in values])


@pytest.mark.parametrize(("first", "second", "shown"), [
    (None, None, None), (shades(1), None, [1]), (None, shades(2), [2]), (shades(1), shades(2, 3), [1, 2, 3]),
    (shades(*range(8)), shades(20, 21), [0, 1, 2, 3, 4, 5, 20, 21]),
    (shades(*range(8)), shades(*range(20, 28)), [0, 1, 2, 3, 20, 21, 22, 23]),
])  # fmt: skip
def test_the_faces_of_both_are_shown(pair, first, second, shown):
    found = combine(replace(pair[0], preview=first), replace(pair[1], preview=second), "mix").preview
    assert (found if found is None else found[:, 0, 0, 0].tolist()) == shown


def test_thumbnails_are_small():
    faces = torch.arange(20.0).div(19)[:, None, None, None].expand(-1, 3, 512, 512)

    small = thumbnails(faces)

    assert (small.shape, small.dtype) == ((20, PREVIEW_SIZE, PREVIEW_SIZE, 3), torch.uint8)
    assert small[:, 5, 5, 1].tolist() == [round(255 * index / 19) for index in range(20)]


# ---- People who stay people ----


def test_people_become_rows_in_order_whatever_their_numbers_and_the_weight():
    first, second = identity(1, rows=1), identity(2, rows=2)
    joined = combine(combine(first, second, PEOPLE, 0.0), first, PEOPLE, 1.0)
    assert torch.equal(joined.cond, torch.cat((first.cond, second.cond, first.cond)))
    assert torch.equal(joined.uncond, first.uncond)


def test_each_row_is_a_person_of_their_own_and_always_the_same_one():
    joined = replace(combine(identity(1), identity(2), PEOPLE), arcface=torch.eye(2, 512))
    people = joined.people
    assert people is joined.people
    assert [len(person.cond) for person in people] == [1, 1]
    assert torch.equal(torch.cat([person.cond for person in people]), joined.cond)
    assert torch.equal(torch.cat([person.arcface for person in people]), joined.arcface)
    assert all(torch.equal(person.uncond, joined.uncond) for person in people)


def test_people_of_different_layouts_are_refused():
    with pytest.raises(MismatchError, match="10 tokens and identity_2 15"):
        combine(identity(1), identity(2, photographs=2), PEOPLE)


def facing(*degrees):
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))
    return torch.stack([angles.cos(), angles.sin(), *[torch.zeros(len(degrees))] * 510], dim=1)


@pytest.mark.parametrize(("mode", "weight", "expected"), [
    ("mix", 0.9, facing(45)), ("auxiliary", 0.9, facing(45)), ("average", 0.5, facing(45)), ("average", 0.0, facing(0)),
    ("average", 1.0, facing(90)), ("people", 0.5, facing(0, 90)), ("add", 0.5, None), ("subtract", 0.5, None),
])  # fmt: skip
def test_what_the_recogniser_would_see(mode, weight, expected):
    pair = replace(identity(1), arcface=facing(0)), replace(identity(2), arcface=facing(90))
    found = combine(*pair, mode, weight).arcface
    assert found is None if expected is None else torch.allclose(found, expected, atol=1e-6)
    assert combine(pair[0], identity(2), mode, weight).arcface is None


def test_one_face_serves_every_row_of_the_others():
    first = replace(identity(1, rows=2), arcface=facing(0, 90))
    second = replace(identity(2), arcface=facing(45))
    assert torch.allclose(combine(first, second, "mix").arcface, facing(22.5, 67.5), atol=1e-6)
