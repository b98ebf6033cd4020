"""The kernels against `fuse`, by Triton's interpreter, and Triton's compiler for cards: no GPU is needed."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pulid_sdxl.pulid import kernels
from pulid_sdxl.pulid.attention import Fusion, SiteKV, fuse
from pulid_sdxl.pulid.kernels import fuse_for
from pulid_sdxl.tools import conformance

pytest.importorskip("triton")
from pulid_sdxl.pulid import fused as ours
from pulid_sdxl.pulid.fused import Fused
from triton.runtime.errors import OutOfResources

PRETENDED = Path(__file__).with_name("pretended_card.py")


def fused(q, base, kv, rows, fusion, *more, **named):
    return Fused(kv, fusion)(q, base, rows, *more, **named)


def drawn(seed, batch, positions, heads, width, tokens, rows, zero_tokens):
    generator = torch.Generator().manual_seed(seed)
    q, base = torch.randn(2, batch, positions, heads * width, generator=generator)
    keys, values = torch.randn(2, rows, tokens, heads * width, generator=generator)
    mask = torch.rand(batch, positions, generator=generator)
    return q, base, SiteKV(keys, values).prepare(heads, zero_tokens, 0.8), mask


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**31), batch=st.integers(1, 3), positions=st.sampled_from([1, 64, 127, 128, 129, 300]),
    heads=st.integers(1, 3), width=st.sampled_from(ours.WIDTHS), tokens=st.integers(5, 80),
    rows=st.integers(1, 3), zero_tokens=st.sampled_from([0, 1, 20]), fusion=st.sampled_from(list(Fusion)),
    masks=st.sampled_from([0, 1, 3]), strength=st.sampled_from([None, 0.0, 0.6]), data=st.data(),
)  # fmt: skip
def test_the_kernels_give_what_fuse_gives(
    seed, batch, positions, heads, width, tokens, rows, zero_tokens, fusion, masks, strength, data
):
    q, base, kv, mask = drawn(seed, batch, positions, heads, width, tokens, rows, zero_tokens)
    which = data.draw(st.lists(st.integers(0, rows - 1), min_size=batch, max_size=batch))
    more = None if strength is None else torch.tensor(strength), mask[:masks] if masks else None
    assert ours.fits(kv)
    expected = fuse(q, base, kv, which, fusion, *more)
    kept = [t.clone() for t in (q, base)]
    out = fused(q, base, kv, which, fusion, *more)
    size = 1 + (expected - base).abs().max()
    assert (out - expected).abs().max() <= 2e-5 * size
    assert torch.equal(q, kept[0]) and torch.equal(base, kept[1])
    assert torch.equal(fused(q, base, kv, which, fusion, *more, overwrite=True), out) and torch.equal(base, out)


@pytest.mark.parametrize("fusion", Fusion)
def test_more_blocks_than_one_table_holds(fusion):
    positions = ours.SUMS_BLOCK * (ours.TABLE + 1) + 5
    q, base, kv, _ = drawn(0, 1, positions, 1, 16, 6, 1, 8)
    out, expected = (way(q, base, kv, [0], fusion) for way in (fused, fuse))
    assert (out - expected).abs().max() <= 2e-5 * (1 + (expected - base).abs().max())


@pytest.mark.parametrize("fusion", Fusion)
def test_half_precision_is_nearer_to_float64_than_the_eager_way(fusion):
    q, base, kv, _ = drawn(0, 2, 300, 2, 64, 10, 2, 8)
    exact = fuse(q.double(), base.double(), kv.to(torch.float64), [0, 1], fusion)
    half = q.half(), base.half(), kv.to(torch.float16), [0, 1], fusion
    assert fused(*half).dtype == torch.float16
    ours, eager = ((way(*half) - exact).norm() for way in (fused, fuse))
    assert ours <= eager


@pytest.mark.skipif(not conformance.FOLDER.is_dir(), reason="no folder of reference vectors")
@pytest.mark.parametrize("part", [conformance.attention_official, conformance.attention_shared_workflows])
def test_the_reference_vectors(part):
    lines = list(part(conformance.Reference(conformance.FOLDER), fused))
    assert len(lines) > 6 and [str(line) for line in lines if not line.holds] == []


@pytest.mark.parametrize(("width", "tokens", "dtype"), [(40, 10, "float32"), (64, 129, "float32"), (64, 10, "float64")])
def test_what_does_not_fit_is_left_to_the_eager_way(width, tokens, dtype):
    _, _, kv, _ = drawn(0, 1, 8, 2, width, tokens, 1, 0)
    assert not ours.fits(kv.to(getattr(torch, dtype)))


def test_on_a_cpu_the_eager_way_is_taken():
    assert not isinstance(fuse_for(drawn(0, 1, 8, 2, 64, 10, 1, 0)[2], Fusion.PLAIN), Fused)


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


@pytest.mark.parametrize("people", [1, 5])
def test_a_batch_that_one_launch_does_not_hold_goes_in_parts(people):
    batch = ours.ROWS_BITS + 3
    q, base, kv, mask = drawn(0, batch, 5, 1, 16, 6, people + 1, 8)
    rows = [image % (people + 1) for image in range(batch)]
    for more in ((), (torch.tensor(0.5), mask), (None, mask[:1])):
        out, expected = (way(q, base, kv, rows, Fusion.ORTHOGONAL_V2, *more) for way in (fused, fuse))
        assert (out - expected).abs().max() <= 2e-5 * (1 + (expected - base).abs().max())


def test_kernels_are_launched_on_the_card_that_holds_the_tensors(monkeypatch):
    """Triton launches on the current device, which another pack may leave at another card than the model's."""
    current = [0]

    @contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    class Elsewhere(Fused):
        def _launch(self, *args):
            assert current == [0, 1]
            return super()._launch(*args)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 1)
    q, base, kv, _ = drawn(0, 2, 8, 2, 16, 6, 2, 8)
    assert Elsewhere(kv, Fusion.PLAIN)(q, base, [0, 1]).shape == q.shape and current == [0]


def test_what_a_card_has_no_room_for_is_told_once_and_served_by_the_eager_way(monkeypatch, caplog):
    launched = []

    def too_large(self, *args):
        launched.append(args)
        raise OutOfResources(128, 64, "shared memory")

    monkeypatch.setattr(Fused, "_launch", too_large)
    q, base, kv, _ = drawn(0, 2, 8, 2, 16, 6, 2, 8)
    expected = fuse(q, base, kv, [0, 1], Fusion.ORTHOGONAL)
    for site in (Fused(kv, Fusion.ORTHOGONAL) for _ in range(2)):
        assert all(torch.equal(site(q, base, [0, 1], overwrite=True), expected) for _ in range(3))
    assert len(launched) == 2 and caplog.text.count("shared memory") == 1


@pytest.fixture(scope="module", params=[75, 90, 120])
def card(request, tmp_path_factory):
    """What a card of this compute capability launches, by fusion: at first, then, for queries that begin at an odd
    address, and under torch.compile."""
    cache = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_INTERPRET": "0"}
    command = [sys.executable, PRETENDED, str(request.param)]
    done = subprocess.run(command, env=os.environ | cache, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_cards_of_all_generations_launch_one_kernel_or_two_and_from_the_second_time_on_by_addresses(card):
    kernels_of = {"none": ["output"], "ortho": ["sums", "output"], "ortho_v2": ["sums", "output"]}
    assert len(card) == 2 * len(Fusion)
    for name, (first, second, shifted, compiled) in card.items():
        assert [one["launch"] for one in second] == [one["launch"] for one in first]
        assert all(one["by_triton"] for one in first) and not any(one["by_triton"] for one in second)
        expected = kernels_of.get(name.partition(",")[0], ["sums", "headless", "output"])
        assert all(one["by_triton"] for one in shifted)
        for launches in (first, shifted, compiled):
            assert [one["launch"][0] for one in launches] == expected, name
        assert [one["launch"] for one in compiled] == [one["launch"] for one in first]
