"""Steps of SDXL's UNet on a card, with each way of adding an identity and without, for bench_card.py."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..pulid import kernels
from ..pulid.attention import METHODS
from ..pulid.sites import SITES
from .card import TOKENS, WEIGHT, Bench, Figure
from .published import most_used, published

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

IP_TOKENS = 16  # of the IPAdapter-like patch below ours


def steps(bench: Bench) -> Iterator[Figure]:
    """A step of the UNet with each way of adding an identity, over the same step without."""
    for batch in (2,) if bench.card.kind == "cpu" else (2, 8):
        calls = {name: step(bench, model, batch) for name, model in models(bench, batch).items()}
        with eagerly():
            for method in METHODS:
                calls[f"eager: {method}"] = eagerly()(step(bench, bench.apply(bench.model, method), batch))
        times = bench.card.medians(calls, bench.repeats)
        plain = times.pop("unpatched")
        where = partial(Figure, f"step, {batch}")
        yield where("unpatched", plain, "ms")
        with_ip = times.pop("IPAdapter-like")
        yield where("IPAdapter-like", with_ip - plain, "ms")
        others = times["as published"] - plain
        for name, taken in times.items():
            added = taken - (with_ip if name.endswith("over IPAdapter-like") else plain)
            one = name in {f"{method}, {version}" for method in METHODS for version in TOKENS}
            limit = 2.0 if one and batch == 2 and bench.card.kind != "cpu" else None
            yield where(f"{name}: added", added, "ms")
            yield where(f"{name}: added, percent of a step", 100 * added / plain, "%", limit)
            if one:
                yield where(f"{name}: added, over the published way", added / others, "", 0.25 if limit else None)
        yield from waiting(bench, calls, where)


def waiting(bench: Bench, calls: Mapping[str, Callable], where: Callable[..., Figure]) -> Iterator[Figure]:
    """Whether a step makes the host wait for the device; warmed up already."""
    if bench.card.kind != "cuda":
        yield where("steps in which the host waits", None, note="CUDA alone can tell")
        return
    waited = {}
    for name, call in calls.items():
        try:
            with bench.card.nothing_waits():
                call()
        except RuntimeError as problem:
            waited[name] = str(problem).splitlines()[0]
    ours = {name: why for name, why in waited.items() if name.startswith(("unpatched", *METHODS))}
    yield where("steps of ours in which the host waits", len(ours), "", 0, note=str(ours or ""))


def graphs(bench: Bench) -> Iterator[Figure]:
    """The whole step as one CUDA graph: what is added when launching costs nothing."""
    if bench.card.kind != "cuda":
        yield Figure("cuda graph", "a step", None, note="CUDA only")
        return
    chosen = {"unpatched": bench.model} | {method: bench.apply(bench.model, method) for method in METHODS}
    calls = {name: bench.card.as_one([step(bench, model, 2)]) for name, model in chosen.items()}
    times = bench.card.medians(calls, bench.repeats)
    plain = times.pop("unpatched")
    yield Figure("cuda graph", "a step, batch 2, unpatched", plain, "ms")
    for name, taken in times.items():
        yield Figure("cuda graph", f"  {name}: added", taken - plain, "ms")
        yield Figure("cuda graph", f"  {name}: added, percent of a step", 100 * (taken - plain) / plain, "%")


def compiling(bench: Bench) -> Iterator[Figure]:
    """Graph breaks under torch.compile of the UNet."""
    import torch._dynamo as dynamo

    small = Bench(bench.card, bench.comfyui, bench.repeats, small=True)
    found = {}
    for name, model in (("unpatched", small.model), ("fidelity", small.apply(small.model, "fidelity"))):
        dynamo.reset()
        dynamo.utils.counters.clear()
        with compiled(small, backend="eager"):
            step(small, model, 2)()
        breaks = dynamo.utils.counters["graph_break"]
        found[name] = sum(breaks.values())
        yield Figure("compile", f"graph breaks, {name}", found[name], note="; ".join(list(breaks)[:2])[:200])
    yield Figure("compile", "graph breaks that are ours", found["fidelity"] - found["unpatched"], "", 0)


def compiled_time(bench: Bench) -> Iterator[Figure]:
    """A step under torch.compile with inductor, patched and not. Takes minutes: only where it is asked for."""
    times = {}
    for name, model in (("unpatched", bench.model), ("fidelity", bench.apply(bench.model, "fidelity"))):
        torch._dynamo.reset()
        with compiled(bench):
            call = step(bench, model, 2)
            start = time.perf_counter()
            call()
            bench.card.wait()
            yield Figure("compile", f"first step, {name}", time.perf_counter() - start, "s")
            times[name] = bench.card.medians({name: call}, bench.repeats)[name]
        yield Figure("compile", f"a compiled step, batch 2, {name}", times[name], "ms")
    added = times["fidelity"] - times["unpatched"]
    yield Figure("compile", "  added, percent of a step", 100 * added / times["unpatched"], "%")


@contextmanager
def compiled(bench: Bench, **options: str) -> Iterator[None]:
    """Inside, the UNet is compiled."""
    base = bench.model.model
    network = base.diffusion_model
    base.diffusion_model = torch.compile(network, **options)
    try:
        yield
    finally:
        base.diffusion_model = network


def step(bench: Bench, model: "ModelPatcher", batch: int) -> Callable[[], Tensor]:
    """A call of the UNet as sampling makes it, half of the batch negative."""
    card, side, network = bench.card, bench.pixels // 8, bench.model.model.diffusion_model
    x, context, y = card.randn(batch, 4, side, side), card.randn(batch, 77, 2048), card.randn(batch, 2816)
    timesteps = torch.full((batch,), 500.0, device=card.device)
    own = {"cond_or_uncond": [1, 0], "sigmas": torch.ones(1, device=card.device)}
    options = {**model.model_options["transformer_options"], **own}
    options |= as_sampled(options, x)
    return lambda: network(x, timesteps, context, y, transformer_options=options)


def as_sampled(options: Mapping, x: Tensor) -> dict[str, Any]:
    """What our wrappers leave in the options while sampling, for a batch whose first half is negative."""
    from ..nodes import patch, rows

    masks = [one.mask for one in options.get(patch.INSTALLED, ()) if one.mask is not None]
    uuids, pictures, size = ("negative", "positive"), len(x) // 2, tuple(x.shape[-2:])
    run = rows.SamplingRun(frozenset({"positive"}), {}, [], [], pictures, size, {}, masks)
    placement = run._own(tuple(x.shape), uuids, None)
    for mask in masks:
        mask.prepare(x, placement)
    return {rows.KEY: rows.Call(run, placement), "uuids": list(uuids)}


def models(bench: Bench, batch: int) -> "dict[str, ModelPatcher]":
    """Every way of adding an identity, by its name."""
    mask = torch.zeros(1, bench.pixels, bench.pixels)
    mask[..., : bench.pixels // 2] = 1
    plain, apply = bench.model, bench.apply
    made = {"unpatched": plain}
    made |= {f"{method}, {version}": apply(plain, method, version) for method in METHODS for version in TOKENS}
    made["fidelity, v1, with a mask"] = one = apply(plain, "fidelity", mask=mask)
    made["two people, a mask each"] = apply(one, "fidelity", seed=1, mask=1 - mask)
    made["IPAdapter-like"] = with_ip_adapter(bench, batch)
    made["fidelity, v1, over IPAdapter-like"] = apply(made["IPAdapter-like"], "fidelity")
    method = METHODS["fidelity"]["v1"]
    theirs = {"zero_tokens": method.zero_tokens, "weight": WEIGHT}
    made["as published"] = over(bench, batch, partial(published, fusion=method.fusion, **theirs))
    made["as the most used pack does"] = over(bench, batch, partial(most_used, **theirs), skip_middle=True)
    return made


def over(bench: Bench, batch: int, add: Callable[..., Tensor], skip_middle: bool = False) -> "ModelPatcher":
    """A MODEL whose sites answer add(q, base, tokens, to_k, to_v, heads), as other packs compute it."""
    tokens = bench.card.randn(2, TOKENS["v1"], 2048).repeat_interleave(batch // 2, dim=0)
    to_k, to_v = bench.projections.to_k, bench.projections.to_v

    def answer(site: int, q: Tensor, base: Tensor, heads: int) -> Tensor:
        return add(q, base, tokens, to_k[site].weight, to_v[site].weight, heads)

    return answering(bench, answer, skip_middle)


def with_ip_adapter(bench: Bench, batch: int) -> "ModelPatcher":
    """A MODEL with what IPAdapter does at each site: attention to picture tokens, added."""
    from comfy.ldm.modules.attention import optimized_attention

    keys, values = ([bench.card.randn(batch, IP_TOKENS, width) for width in bench.widths] for _ in "kv")

    def answer(site: int, q: Tensor, base: Tensor, heads: int) -> Tensor:
        return base + 0.5 * optimized_attention(q, keys[site], values[site], heads)

    return answering(bench, answer)


def answering(bench: Bench, answer: Callable[..., Tensor], skip_middle: bool = False) -> "ModelPatcher":
    """A MODEL whose sites answer answer(site, q, base, heads) in place of base."""
    from comfy.ldm.modules.attention import optimized_attention

    patched = bench.model.clone()
    for index, site in enumerate(SITES):

        def attend(q, k, v, options, index=index):
            heads = options["n_heads"]
            return answer(index, q, optimized_attention(q, k, v, heads, transformer_options=options), heads)

        if not (skip_middle and site.part == "middle"):
            patched.set_model_attn2_replace(attend, site.part, site.number, site.block)
    return patched


@contextmanager
def eagerly() -> Iterator[None]:
    """Inside, patches are made, and act, without the fused kernels."""
    quickest = kernels._kernels
    kernels._kernels = lambda device, dtype: None
    try:
        yield
    finally:
        kernels._kernels = quickest
