"""How photographs and people combine into ID tokens."""

import pytest
import torch
from pulid_sdxl.pulid.encoders import ENCODERS, FACE_WIDTH, HIDDEN_WIDTH, IdEncoder, IdFormer
from pulid_sdxl.pulid.errors import InputError
from pulid_sdxl.pulid.identity import VisionFeatures
from pulid_sdxl.pulid.tokens import face_vectors, identity_of, read_weights, reads_together, uncond_tokens

PATCHES = 4


@pytest.fixture(scope="module", params=ENCODERS)
def version(request):
    return request.param


@pytest.fixture(scope="module")
def encoders():
    torch.manual_seed(0)
    made = {version: encoder().requires_grad_(False) for version, encoder in ENCODERS.items()}
    torch.nn.init.normal_(made["v1.1"].latents)
    torch.nn.init.normal_(made["v1.1"].proj_out, std=0.03)
    return made


def photographs(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FACE_WIDTH, generator=generator)
    return x, [torch.randn(count, 1 + PATCHES, HIDDEN_WIDTH, generator=generator) for _ in range(5)]


def make(encoder, version, count, photos="one person", id_mix=False):
    x, hidden = photographs(count)
    if reads_together(version, photos):
        x, hidden = x[None], [stream.flatten(0, 1)[None] for stream in hidden]
    return identity_of(encoder(x, hidden), uncond_tokens(encoder, 1 + PATCHES), version, "print", photos, id_mix)


def test_v1_joins_the_first_five_tokens_of_further_photographs(encoders):
    encoder = encoders["v1"]
    identity = make(encoder, "v1", 3)
    x, hidden = photographs(3)
    alone = [encoder(x[i : i + 1], [stream[i : i + 1] for stream in hidden]) for i in range(3)]
    assert torch.allclose(identity.cond, torch.cat((alone[0], alone[1][:, :5], alone[2][:, :5]), dim=1), atol=1e-5)
    uncond = uncond_tokens(encoder, 1 + PATCHES)
    assert torch.equal(identity.uncond, torch.cat((uncond, uncond[:, :5], uncond[:, :5]), dim=1))


def test_v1_id_mix_joins_all_tokens(encoders):
    identity = make(encoders["v1"], "v1", 3, id_mix=True)
    assert identity.cond.shape == identity.uncond.shape == (1, 30, 2048)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_v1_1_reads_all_photographs_and_gives_32_tokens(encoders, count):
    identity = make(encoders["v1.1"], "v1.1", count)
    assert identity.cond.shape == (1, 32, 2048)
    assert identity.tokens == 32


def test_v1_1_order_of_further_photographs_matters_less_than_which_they_are(encoders):
    two, three = make(encoders["v1.1"], "v1.1", 2), make(encoders["v1.1"], "v1.1", 3)
    assert not torch.allclose(two.cond, three.cond, atol=1e-3)


def test_average_is_the_mean_of_each_photographs_own_tokens(encoders, version):
    each = make(encoders[version], version, 3, photos="one identity per photo")
    mean = make(encoders[version], version, 3, photos="average")
    assert each.cond.shape[0] == 3
    assert torch.allclose(mean.cond[0], each.cond.mean(dim=0), atol=1e-5)


def test_one_photograph_is_the_same_however_photographs_combine(encoders, version):
    one, mean, each = (
        make(encoders[version], version, 1, photos=p) for p in ("one person", "average", "one identity per photo")
    )
    assert torch.allclose(one.cond, mean.cond, atol=1e-5)
    assert torch.allclose(one.cond, each.cond, atol=1e-5)


def test_uncond_of_noise_follows_its_seed_alone(encoders, version):
    encoder = encoders[version]
    zero, first, again, other = (
        uncond_tokens(encoder, 5, noise=noise, seed=seed) for noise, seed in ((0, 0), (0.5, 1), (0.5, 1), (0.5, 2))
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first, zero)


def test_face_vectors_put_arcface_first():
    features = VisionFeatures(torch.full((2, 768), 2.0), ())
    x = face_vectors(torch.ones(2, 512, dtype=torch.float64), features)
    assert x.shape == (2, FACE_WIDTH)
    assert x.dtype == torch.float32
    assert x[0, 511] == 1
    assert x[0, 512] == 2


def test_encoders_have_the_published_parameter_counts():
    assert len(IdEncoder(device="meta").state_dict()) == 110
    assert len(IdFormer(device="meta").state_dict()) == 312 - 140


@pytest.mark.parametrize(
    ("text", "count", "numbers"),
    [("1, 0.5, 0.5", 3, (1, 0.5, 0.5)), ("1 2\n3", 3, (1, 2, 3)), ("0.8", 3, (0.8,) * 3), ("-1", 1, (-1,))],
)
def test_numbers_are_one_for_all_or_one_each(text, count, numbers):
    assert read_weights(text, count, "people", least=-1) == numbers


@pytest.mark.parametrize(("text", "words"), [
    *((text, r"one for each of 3 people, .*found ") for text in ("", "1, 2")),
    *((f"1, {bad}, 3", rf"Weight 2 of 3 .* from 0 to 5, found '{bad}'") for bad in ("x", "nan", "inf", "-1", "6")),
])  # fmt: skip
def test_other_texts_are_no_weights_and_the_wrong_one_is_named(text, words):
    with pytest.raises(InputError, match=words):
        read_weights(text, 3, "people", 0, 5)
