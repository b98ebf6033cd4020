"""The kernels against `fuse`, by Triton's interpreter: no GPU is needed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pulid_sdxl.pulid import kernels
from pulid_sdxl.pulid.attention import Fusion, SiteKV, fuse
from pulid_sdxl.pulid.kernels import fuse_for
from pulid_sdxl.tools import conformance

pytest.importorskip("triton")
from pulid_sdxl.pulid import attention_triton
from pulid_sdxl.pulid.triton_launch import Launch


def drawn(seed, batch, positions, heads, width, tokens, rows, zero_tokens):
    generator = torch.Generator().manual_seed(seed)
    q, base = torch.randn(2, batch, positions, heads * width, generator=generator)
    keys, values = torch.randn(2, rows, tokens, heads * width, generator=generator)
    mask = torch.rand(batch, positions, generator=generator)
    return q, base, SiteKV(keys, values).prepare(heads, zero_tokens, 0.8), mask


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**31), batch=st.integers(1, 3), positions=st.sampled_from([1, 64, 127, 128, 129, 300]),
    heads=st.integers(1, 3), width=st.sampled_from(attention_triton.WIDTHS), tokens=st.integers(5, 80),
    rows=st.integers(1, 3), zero_tokens=st.sampled_from([0, 1, 20]), fusion=st.sampled_from(list(Fusion)),
    masks=st.sampled_from([0, 1, 3]), strength=st.sampled_from([None, 0.0, 0.6]), data=st.data(),
)  # fmt: skip
def test_the_kernels_give_what_fuse_gives(
    seed, batch, positions, heads, width, tokens, rows, zero_tokens, fusion, masks, strength, data
):
    q, base, kv, mask = drawn(seed, batch, positions, heads, width, tokens, rows, zero_tokens)
    which = data.draw(st.lists(st.integers(0, rows - 1), min_size=batch, max_size=batch))
    more = None if strength is None else torch.tensor(strength), mask[:masks] if masks else None
    assert attention_triton.fits(kv)
    expected = fuse(q, base, kv, which, fusion, *more)
    kept = [t.clone() for t in (q, base)]
    out = attention_triton.fuse(q, base, kv, which, fusion, *more)
    size = 1 + (expected - base).abs().max()
    assert (out - expected).abs().max() <= 2e-5 * size
    assert torch.equal(q, kept[0]) and torch.equal(base, kept[1])


@pytest.mark.parametrize("fusion", Fusion)
def test_more_blocks_than_one_table_holds(fusion):
    positions = attention_triton.SUMS_BLOCK * (attention_triton.TABLE + 1) + 5
    q, base, kv, _ = drawn(0, 1, positions, 1, 16, 6, 1, 8)
    out, expected = (way(q, base, kv, [0], fusion) for way in (attention_triton.fuse, fuse))
    assert (out - expected).abs().max() <= 2e-5 * (1 + (expected - base).abs().max())


@pytest.mark.parametrize("fusion", Fusion)
def test_half_precision_is_as_near_to_float32_as_the_eager_way(fusion):
    q, base, kv, _ = drawn(0, 2, 300, 2, 64, 10, 2, 8)
    exact = fuse(q, base, kv, [0, 1], fusion)
    half = q.half(), base.half(), kv.to(torch.float16), [0, 1], fusion
    ours, eager = ((way(*half).float() - exact).abs().max() for way in (attention_triton.fuse, fuse))
    assert attention_triton.fuse(*half).dtype == torch.float16
    assert ours <= 1.1 * eager


@pytest.mark.skipif(not conformance.FOLDER.is_dir(), reason="no folder of reference vectors")
@pytest.mark.parametrize("part", [conformance.attention_official, conformance.attention_shared_workflows])
def test_the_reference_vectors(part):
    lines = list(part(conformance.Reference(conformance.FOLDER), attention_triton.fuse))
    assert len(lines) > 6 and [str(line) for line in lines if not line.holds] == []


@pytest.mark.parametrize(("width", "tokens", "dtype"), [(40, 10, "float32"), (64, 129, "float32"), (64, 10, "float64")])
def test_what_does_not_fit_is_left_to_the_eager_way(width, tokens, dtype):
    _, _, kv, _ = drawn(0, 1, 8, 2, width, tokens, 1, 0)
    assert not attention_triton.fits(kv.to(getattr(torch, dtype)))


def test_on_a_cpu_the_eager_way_is_taken():
    assert fuse_for(drawn(0, 1, 8, 2, 64, 10, 1, 0)[2]) is fuse


def test_a_card_on_which_the_kernels_fail_is_told_once_and_served_by_the_eager_way(monkeypatch, caplog):
    monkeypatch.setenv("PULID_ATTENTION", "triton")

    def broken(*args):
        raise RuntimeError("no C compiler found")

    monkeypatch.setattr(torch, "Generator", broken)  # the first that asks the card for anything
    tried = torch.device("cuda", 7), torch.float16
    assert [kernels._kernels(*tried), kernels._kernels(*tried)] == [None, None]
    assert len(caplog.records) == 1 and "no C compiler found" in caplog.text


def test_the_user_can_keep_to_the_eager_way(monkeypatch):
    monkeypatch.setenv("PULID_ATTENTION", "eager")
    monkeypatch.setattr(torch, "Generator", None)
    assert kernels._kernels(torch.device("cuda", 8), torch.float16) is None


class Kernel:
    """In the place of Triton's: what it is asked to compile, and what of that is launched."""

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def compile_and_launch(*arguments, num_warps):
            self.compiled.append((grid, num_warps, arguments))
            return Launched(self)

        return compile_and_launch


class Launched:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launched.append((grid, arguments))


def test_a_kernel_is_asked_for_once_for_each_set_of_sizes_and_then_launched_by_addresses():
    kernel, x = Kernel(), torch.zeros(8)
    launch = Launch(kernel)
    for numbers, tensors in (
        ((8, "sum"), (x, None)),
        ((8, "sum"), (x, None)),
        ((8, "max"), (x, None)),
        ((8, "sum"), (x, x)),
    ):
        launch((1, 2, 1), tensors, numbers, 4)
    assert [arguments for _, _, arguments in kernel.compiled] == [
        (x, None, 8, "sum"),
        (x, None, 8, "max"),
        (x, x, 8, "sum"),
    ]
    assert kernel.launched == [((1, 2, 1), (x.data_ptr(), None, 8, "sum"))]


def test_a_tensor_that_begins_elsewhere_than_kernels_expect_is_left_to_triton():
    kernel, x = Kernel(), torch.zeros(8)
    launch = Launch(kernel)
    for tensor in (x, x[1:], x[1:], x[4:]):
        launch((1, 1, 1), (tensor,), (), 4)
    assert len(kernel.compiled) == 3 and kernel.launched == [((1, 1, 1), (x[4:].data_ptr(),))]


def test_tensors_on_several_devices_are_refused(monkeypatch):
    here, there = torch.zeros(8), torch.zeros(8)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 0 if tensor is there else -1)
    with pytest.raises(ValueError, match="unpack"):
        Launch(Kernel())((1, 1, 1), (here, there), (), 4)
