"""The sites by themselves on a card, for bench_card.py: against the references, float64, and what must be moved."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from ..pulid.attention import METHODS, Fusion, SiteKV
from ..pulid.kernels import eager, fuse_for
from .card import FULL, TOKENS, WEIGHT, Bench, Card, Figure
from .conformance import FOLDER, Reference, attention_official, attention_shared_workflows

HEAD = 64  # channels of one
CALLS = 200  # that the host makes ahead of a card, which are fewer than its queue holds


WAYS = {"fused": fuse_for, "eager": eager}


def correctness(bench: Bench) -> Iterator[Figure]:
    """The reference vectors in float32, by whatever way this device takes."""
    where = partial(Figure, "correct")
    if not FOLDER.is_dir():
        yield where("reference vectors", None, note=f"none at {FOLDER}; set PULID_REFERENCE")
        return
    from . import host_unet

    reference = Reference(FOLDER, bench.card.kind)
    with patch.dict(os.environ, {"PULID_ATTENTION": os.environ.get("PULID_ATTENTION", "triton")}):  # in float32, too
        for name, way in WAYS.items():

            def attend(q, base, kv, rows, fusion, *more, way=way, **named):
                return way(kv, fusion)(q, base, rows, *more, **named)

            for part in (attention_official, attention_shared_workflows):
                errors = [line.error for line in part(reference, attend)]
                yield where(f"{part.__name__}, {name}: worst of {len(errors)}", max(errors), "", 2e-5)
        for line in host_unet.lines(reference):
            yield where(line.vector, line.error, "", 2e-5)


def precision(bench: Bench) -> Iterator[Figure]:
    """A whole site, from its input to its output, with and without an identity: relative errors against float64."""
    for dtype in (torch.float16, torch.bfloat16):
        for width in sorted(set(bench.widths)):
            site = Site.draw(bench, width, dtype)
            exact = site.exactly()
            unpatched = error(site.out(None), exact.out(None))
            for fusion in Fusion:
                what = f"{str(dtype).removeprefix('torch.')}, {width} channels, {fusion.value}: over unpatched"
                yield Figure("precision", what, error(site.out(fusion), exact.out(fusion)) / unpatched, "", 1.1)


@dataclass(frozen=True)
class Site:
    """One cross-attention with its weights (C, inputs), and an identity's tokens."""

    x: Tensor
    context: Tensor
    tokens: Tensor
    weights: dict[str, Tensor]

    @classmethod
    def draw(cls, bench: Bench, width: int, dtype: torch.dtype) -> "Site":
        inputs = {"q": width, "k": 2048, "v": 2048, "id_k": 2048, "id_v": 2048, "out": width}
        weights = {name: bench.card.randn(width, size).to(dtype) * size**-0.5 for name, size in inputs.items()}
        shapes = (2, positions(bench, width), width), (2, 77, 2048), (2, TOKENS["v1"], 2048)
        return cls(*(bench.card.randn(*shape).to(dtype) for shape in shapes), weights)

    def exactly(self) -> "Site":
        """The same in float64, on the CPU."""
        weights = {name: weight.cpu().double() for name, weight in self.weights.items()}
        return Site(*(t.cpu().double() for t in (self.x, self.context, self.tokens)), weights)

    def out(self, fusion: Fusion | None) -> Tensor:
        heads = self.x.shape[-1] // HEAD
        q, k, v = self._linear("q", self.x), self._linear("k", self.context), self._linear("v", self.context)
        split = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        attended = functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        if fusion is not None:
            # As the projections compute, whatever they are stored in.
            tokens = self.tokens.to(torch.promote_types(q.dtype, torch.float32))
            kv = SiteKV(self._linear("id_k", tokens), self._linear("id_v", tokens)).prepare(heads, 8, WEIGHT, q.dtype)
            attended = WAYS["fused"](kv, fusion)(q, attended, [1, 0])
        return self._linear("out", attended)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.weights[name].to(x))


def error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.cpu().double() - exact).norm() / exact.norm()).item()


def launches(bench: Bench) -> Iterator[Figure]:
    """Kernels per site, by torch's profiler, and how long the host takes to launch them."""
    from torch.profiler import ProfilerActivity, profile

    if bench.card.kind not in ("cuda", "xpu"):
        yield Figure("launches", "kernels per site", None, note=f"{bench.card.kind} launches none that can be counted")
        return
    activity = ProfilerActivity.CUDA if bench.card.kind == "cuda" else ProfilerActivity.XPU
    for name, versions in METHODS.items():
        method = versions["v1"]
        q, base, kv = parts_of_a_site(bench, bench.widths[-1], 2)
        prepared = kv.prepare(q.shape[-1] // HEAD, method.zero_tokens, WEIGHT)
        for way, of in WAYS.items():
            attend = of(prepared, method.fusion)
            attend(q, base, [1, 0])
            bench.card.wait()
            with profile(activities=[activity]) as profiled:
                attend(q, base, [1, 0])
                bench.card.wait()
            kernels = [event for event in profiled.events() if event.device_type.name != "CPU"]
            yield Figure("launches", f"kernels per site, {name}, {way}", len(kernels))
            start = time.perf_counter()
            for _ in range(CALLS):
                attend(q, base, (1, 0))
            yield Figure("launches", "  the host's time for a call", 1e6 * (time.perf_counter() - start) / CALLS, "us")
            bench.card.wait()


def limit(bench: Bench) -> Iterator[Figure]:
    """The fused sites by themselves, over moving q and base twice and the output once at the measured bandwidth."""
    card = bench.card
    bandwidth = copying(card, bench.repeats)
    yield Figure("limit", "copying on the device, read and written", bandwidth, "GB/s")
    for batch in (2,) if card.kind == "cpu" else (2, 8):
        rows = [1] * (batch // 2) + [0] * (batch // 2)  # negative first, as the host has it
        for name, versions in METHODS.items():
            method, passes = versions["v1"], 3 if versions["v1"].fusion is Fusion.PLAIN else 5
            sites = [parts_of_a_site(bench, width, batch) for width in bench.widths]
            moved = passes * sum(q.nbytes for q, _, _ in sites)
            prepared = [kv.prepare(q.shape[-1] // HEAD, method.zero_tokens, WEIGHT) for q, _, kv in sites]
            floor = moved / bandwidth / 1e6  # ms
            for way, of in WAYS.items():
                fusing = (of(kv, method.fusion) for kv in prepared)
                called = [partial(attend, q, base, rows) for attend, (q, base, _) in zip(fusing, sites, strict=True)]
                taken = card.medians({way: card.as_one(called)}, bench.repeats)[way]
                target_ratio = 1.5 if way == "fused" and card.kind != "cpu" else None
                yield Figure("limit", f"70 sites, batch {batch}, {name}, {way}", taken, "ms")
                yield Figure("limit", "  over moving what must move", taken / floor, "", target_ratio)


def copying(card: Card, repeats: int) -> float:
    """Bytes read and written by a copy on the device, in GB/s."""
    source = torch.ones(1 << (26 if card.kind == "cpu" else 30), dtype=torch.uint8, device=card.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / card.medians({"copy": lambda: target.copy_(source)}, repeats)["copy"] / 1e6


def parts_of_a_site(bench: Bench, width: int, batch: int) -> tuple[Tensor, Tensor, SiteKV]:
    """q, base and an identity's keys and values for a site of this width."""
    q, base = bench.card.randn(2, batch, positions(bench, width), width)
    keys, values = bench.card.randn(2, 2, TOKENS["v1"], width)
    return q, base, SiteKV(keys, values)


def positions(bench: Bench, width: int) -> int:
    """Image tokens of the sites of this width."""
    published = width * FULL // bench.channels
    return (bench.pixels // {640: 16, 1280: 32}[published]) ** 2
