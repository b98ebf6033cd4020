"""The fused attention against a plain loop over images, heads, positions and tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pulid_sdxl.pulid.attention import METHODS, Fusion, IdProjections, SiteKV, fuse, mask_to_tokens

OFFICIAL = (Fusion.PLAIN, Fusion.ORTHOGONAL, Fusion.ORTHOGONAL_V2)


def by_hand(q, base, keys, values, rows, heads, fusion, zero_tokens, weight, mask):
    """The definition of facts and paper, one image, head and position at a time, in float64."""
    q, base, keys, values = (t.double() for t in (q, base, keys, values))
    batch, positions, channels = q.shape
    dim = channels // heads
    zeros = torch.zeros(zero_tokens, channels, dtype=torch.float64)
    out = base.clone()
    for b in range(batch):
        k, v = torch.cat((keys[rows[b]], zeros)), torch.cat((values[rows[b]], zeros))
        attended = torch.zeros(positions, channels, dtype=torch.float64)
        leaning = torch.zeros(positions, dtype=torch.float64)
        for h in range(heads):
            part = slice(h * dim, (h + 1) * dim)
            for n in range(positions):
                logits = k[:, part] @ q[b, n, part]
                attended[n, part] = (logits / math.sqrt(dim)).softmax(0) @ v[:, part]
                leaning[n] += logits.softmax(0)[:5].sum() / heads
        projected = (base[b] * attended).sum(0) / (base[b] ** 2).sum(0) * base[b]
        added = {
            Fusion.PLAIN: attended,
            Fusion.ORTHOGONAL: attended - projected,
            Fusion.ORTHOGONAL_V2: attended + (leaning[:, None] - 1) * projected,
        }[fusion]
        where = 1.0 if mask is None else mask[b if len(mask) > 1 else 0].double()[:, None]
        out[b] += weight * where * added
    return out


def tensors(seed, batch, positions, heads, dim, tokens, rows):
    generator = torch.Generator().manual_seed(seed)
    q, base = torch.randn(2, batch, positions, heads * dim, generator=generator)
    keys, values = torch.randn(2, rows, tokens, heads * dim, generator=generator)
    return q, base, keys, values


def kv_of(keys, values, heads, zero_tokens=0, weight=1.0):
    return SiteKV(keys, values).prepare(heads, zero_tokens, weight)


sizes = {
    "seed": st.integers(0, 2**31),
    "batch": st.integers(1, 4),
    "positions": st.integers(1, 9),
    "heads": st.integers(1, 4),
    "dim": st.integers(1, 8),
    "tokens": st.integers(5, 12),
    "rows": st.integers(1, 3),
}


@settings(deadline=None, max_examples=60)
@given(
    **sizes,
    fusion=st.sampled_from(OFFICIAL),
    zero_tokens=st.integers(0, 30),
    weight=st.floats(-1, 5),
    masks=st.sampled_from([0, 1, 4]),
    data=st.data(),
)
def test_fuse_equals_a_plain_loop(
    seed, batch, positions, heads, dim, tokens, rows, fusion, zero_tokens, weight, masks, data
):
    q, base, keys, values = tensors(seed, batch, positions, heads, dim, tokens, rows)
    which = data.draw(st.lists(st.integers(0, rows - 1), min_size=batch, max_size=batch))
    mask = (
        torch.rand(batch if masks > 1 else 1, positions, generator=torch.Generator().manual_seed(seed))
        if masks
        else None
    )
    kept = [t.clone() for t in (q, base, keys, values)]
    out = fuse(q, base, kv_of(keys, values, heads, zero_tokens, weight), which, fusion, mask=mask)
    expected = by_hand(q, base, keys, values, which, heads, fusion, zero_tokens, weight, mask)
    # The projection divides by sum base^2: what float32 can give is measured against the size of what is added.
    size = 1 + (expected - base).abs().amax(dim=(1, 2), keepdim=True)
    assert ((out - expected).abs() <= 2e-5 * size).all()
    assert all(torch.equal(now, then) for now, then in zip((q, base, keys, values), kept, strict=True))


@settings(deadline=None, max_examples=20)
@given(**sizes, fusion=st.sampled_from(list(Fusion)))
def test_what_is_added_is_linear_in_the_weight_and_zero_at_zero(
    seed, batch, positions, heads, dim, tokens, rows, fusion
):
    q, base, keys, values = tensors(seed, batch, positions, heads, dim, tokens, rows)
    added = {
        weight: fuse(q, base, kv_of(keys, values, heads, 3, weight), [0] * batch, fusion) - base
        for weight in (0.0, 1.0, -2.0)
    }
    assert torch.equal(added[0.0], torch.zeros_like(base))
    size = 1 + added[1.0].abs().max()
    assert ((added[-2.0] + 2 * added[1.0]).abs() <= 1e-5 * size).all()


@settings(deadline=None, max_examples=20)
@given(**sizes, fusion=st.sampled_from(list(Fusion)), data=st.data())
def test_permuting_batch_rows_permutes_outputs(seed, batch, positions, heads, dim, tokens, rows, fusion, data):
    q, base, keys, values = tensors(seed, batch, positions, heads, dim, tokens, rows)
    kv, which = kv_of(keys, values, heads, 2), [i % rows for i in range(batch)]
    order = data.draw(st.permutations(range(batch)))
    out = fuse(q, base, kv, which, fusion)
    permuted = fuse(q[order], base[order], kv, [which[i] for i in order], fusion)
    assert torch.allclose(permuted, out[order], rtol=1e-5, atol=1e-5 * (1 + out.abs().max().item()))


@pytest.mark.parametrize("fusion", Fusion)
def test_mask_of_zeros_is_no_patch_and_mask_of_ones_is_no_mask(fusion):
    q, base, keys, values = tensors(0, 2, 6, 2, 4, 8, 2)
    kv = kv_of(keys, values, 2, 3)
    out, ones, zeros = (
        fuse(q, base, kv, [0, 1], fusion, mask=mask) for mask in (None, torch.ones(1, 6), torch.zeros(2, 6))
    )
    assert torch.equal(zeros, base)
    assert torch.allclose(ones, out, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fusion", Fusion)
def test_strength_on_the_device_is_the_same_as_weight(fusion):
    q, base, keys, values = tensors(0, 2, 6, 2, 4, 8, 2)
    weighted = fuse(q, base, kv_of(keys, values, 2, 3, 0.6), [0, 1], fusion)
    scheduled = fuse(q, base, kv_of(keys, values, 2, 3), [0, 1], fusion, strength=torch.tensor(0.6))
    assert torch.allclose(weighted, scheduled, atol=1e-6)
    off = fuse(q, base, kv_of(keys, values, 2, 3), [0, 1], fusion, strength=torch.tensor(0.0))
    assert torch.equal(off, base)


@pytest.mark.parametrize("fusion", Fusion)
def test_a_channel_that_is_zero_everywhere_gives_no_nan(fusion):
    q, base, keys, values = tensors(0, 1, 6, 2, 4, 8, 1)
    base[:, :, 3] = 0
    assert fuse(q, base, kv_of(keys, values, 2, 8), [0], fusion).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_projection_costs_no_further_rounding_at_the_size_of_base(dtype):
    q, base, keys, values = tensors(0, 2, 1024, 4, 64, 10, 2)
    errors = {}
    for fusion in OFFICIAL:
        exact = fuse(q.double(), base.double(), kv_of(keys.double(), values.double(), 4, 8, 0.8), [0, 1], fusion)
        kv = SiteKV(keys, values).prepare(4, 8, 0.8, dtype)
        errors[fusion] = (fuse(q.to(dtype), base.to(dtype), kv, [0, 1], fusion) - exact).norm().item()
    assert max(errors.values()) <= 1.06 * errors[Fusion.PLAIN]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fusion", Fusion)
def test_half_precision_stays_within_its_rounding_of_float32(fusion, dtype):
    q, base, keys, values = tensors(0, 2, 4096, 2, 64, 10, 2)
    base = base + 3  # a channel whose sum over positions passes float16's largest number, 65504
    base[:, :, 0] += 30
    exact = fuse(q, base, kv_of(keys, values, 2, 8, 0.8), [0, 1], fusion)
    rounded = fuse(
        *(t.to(dtype) for t in (q, base)), kv_of(keys.to(dtype), values.to(dtype), 2, 8, 0.8), [0, 1], fusion
    )
    assert rounded.dtype == dtype
    step = torch.finfo(dtype).eps
    assert ((rounded.float() - exact).abs() <= 8 * step * (1 + base.abs())).all()


def test_other_layouts_of_memory_give_the_same():
    q, base, keys, values = tensors(0, 2, 6, 2, 4, 8, 2)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, base)]
    assert not strided[0].is_contiguous()
    for fusion in Fusion:
        out = fuse(q, base, kv_of(keys, values, 2, 3), [0, 1], fusion)
        assert torch.allclose(fuse(*strided, kv_of(keys, values, 2, 3), [0, 1], fusion), out, atol=1e-6)


def test_zero_tokens_cost_one_row_however_many_they_are():
    _, _, keys, values = tensors(0, 1, 1, 2, 4, 10, 2)
    assert kv_of(keys, values, 2, 80).values.shape == (2, 2, 11, 4)
    assert kv_of(keys, values, 2, 0).values.shape == (2, 2, 10, 4)


def test_projections_take_their_widths():
    projections = IdProjections([4, 6], token_width=3)
    tokens = torch.randn(2, 5, 3)
    first, second = projections.project(tokens)
    assert (first.keys.shape, second.values.shape) == ((2, 5, 4), (2, 5, 6))
    assert torch.equal(second.values, tokens @ projections.to_v[1].weight.T)


def test_weighted_values_are_rounded_once():
    keys, values = torch.randn(2, 2, 10, 8)
    kv = SiteKV(keys, values).prepare(2, 3, 0.8, torch.bfloat16)
    assert all(t.dtype == torch.bfloat16 for t in (kv.keys, kv.values, kv.log_counts, kv.unscaling))
    rounded = (values * 0.8).bfloat16()
    assert torch.equal(kv.values[:, :, :10].transpose(1, 2).flatten(2), rounded)
    assert not torch.equal(values.bfloat16() * 0.8, rounded)


@pytest.mark.parametrize(("method", "version", "fusion", "zero_tokens"), [
    ("fidelity", "v1", Fusion.ORTHOGONAL_V2, 8), ("fidelity", "v1.1", Fusion.ORTHOGONAL_V2, 20),
    ("extreme style", "v1", Fusion.ORTHOGONAL, 16), ("extreme style", "v1.1", Fusion.ORTHOGONAL, 16),
    ("neutral", "v1", Fusion.PLAIN, 0), ("neutral", "v1.1", Fusion.PLAIN, 0),
])  # fmt: skip
def test_methods_are_the_authors(method, version, fusion, zero_tokens):
    assert (METHODS[method][version].fusion, METHODS[method][version].zero_tokens) == (fusion, zero_tokens)


def test_mask_to_tokens_gives_the_covered_share():
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :24] = 1
    assert mask_to_tokens(mask, (4, 4)).view(4, 4)[0].tolist() == [1, 0.5, 0, 0]
    assert mask_to_tokens(torch.ones(3, 5, 7), (9, 2)).shape == (3, 18)


def test_mask_to_tokens_can_read_the_middle_instead():
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :24] = 1
    # The middle of the second token lies between pixels 23 and 24, that of the first and third far from the edge.
    assert mask_to_tokens(mask, (4, 4), "bilinear").view(4, 4)[0].tolist() == [1, 0.5, 0, 0]
    mask[:, :, 23] = 0
    assert mask_to_tokens(mask, (4, 4), "bilinear").view(4, 4)[0].tolist() == [1, 0, 0, 0]
    assert mask_to_tokens(mask, (4, 4)).view(4, 4)[0].tolist() == [1, 7 / 16, 0, 0]
