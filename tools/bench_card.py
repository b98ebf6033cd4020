"""What PuLID costs on a card, from one run: `python3 run.py bench --device cuda [--json FILE]`; also mps, xpu, cpu.

Where nothing can be installed, with the packages of ComfyUI and of this pack at hand:
`python3 tools bench_card --device cuda --comfyui FOLDER`. Weights are random and made on the device. On a CPU the UNet
has a fifth of its width, to try the script out. docs/performance.md says what the rows mean.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..pulid import kernels
from ..pulid.attention import METHODS, Fusion, IdProjections, SiteKV, fuse
from ..pulid.identity import IdEmbedding
from ..pulid.kernels import fuse_for
from ..pulid.networks import Managed, PulidWeights, on_cpu
from ..pulid.sites import SITES
from . import TOOLS, comfy_host
from . import arguments as command_line
from .conformance import FOLDER, Reference, attention_official, attention_shared_workflows
from .published import most_used, published

WEIGHT, TOKENS = 0.8, {"v1": 10, "v1.1": 32}
FULL, FIFTH = 320, 64  # model channels
HEAD = 64
IP_TOKENS = 16  # of the IPAdapter-like patch below ours


@dataclass(frozen=True)
class Figure:
    """One measurement; without a value, `note` says why there is none."""

    section: str
    what: str
    value: float | None
    unit: str = ""
    limit: float | None = None  # at most
    note: str = ""

    def __str__(self) -> str:
        value = "-" if self.value is None else f"{self.value:.4g}"
        limit = "" if self.limit is None else f"at most {self.limit:g}{'' if self.holds else '  MISSED'}"
        return f"{self.section:12} {self.what:62} {value:>10} {self.unit:6} {limit} {self.note}".rstrip()

    @property
    def holds(self) -> bool:
        return self.limit is None or (self.value is not None and self.value <= self.limit)


class Card:
    """A device, its clock and its memory."""

    def __init__(self, kind: str):
        self.kind, self.device = kind, torch.device(kind)
        self.dtype = torch.float32 if kind == "cpu" else torch.float16
        self._module: Any = None if kind == "cpu" else getattr(torch, kind)

    @property
    def name(self) -> str:
        return self._module.get_device_name() if self.kind in ("cuda", "xpu") else platform.processor() or self.kind

    def wait(self) -> None:
        if self._module is not None:
            self._module.synchronize()

    def milliseconds(self, call: Callable[[], object]) -> float:
        """By the device's own events; on a CPU by the clock."""
        if self._module is None:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        events = self._module.event if self.kind == "mps" else self._module
        start, end = events.Event(enable_timing=True), events.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        self.wait()
        return start.elapsed_time(end)

    def medians(self, calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
        """Of each call, in ms, after a call or two to warm up; in turn: what else the machine does falls on all."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        warming = min(2, repeats)
        for repeat in range(repeats + warming):
            for name, call in calls.items():
                taken = self.milliseconds(call)
                if repeat >= warming:
                    times[name].append(taken)
        return {name: statistics.median(values) for name, values in times.items()}

    @contextmanager
    def nothing_waits(self) -> Iterator[None]:
        """Inside, whatever makes the host wait for a CUDA device raises."""
        if self.kind == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if self.kind == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    def fill(self, network: torch.nn.Module) -> None:
        """Random weights of a sane size, made on the device."""
        drawn = torch.Generator(self.device).manual_seed(0)
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=drawn)
            else:
                parameter.fill_(float(name.endswith("weight")))

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)


class Bench:
    """What the sections share: the device, a MODEL, projections and identities."""

    def __init__(self, card: Card, comfyui: str, repeats: int):
        self.card, self.comfyui, self.repeats = card, comfyui, repeats
        self.channels = FIFTH if card.kind == "cpu" else FULL
        self.pixels = 256 if card.kind == "cpu" else 1024

    @property
    def positions(self) -> dict[int, int]:
        """Channels in the published UNet -> image tokens of a site."""
        return {640: (self.pixels // 16) ** 2, 1280: (self.pixels // 32) ** 2}

    @cached_property
    def widths(self) -> tuple[int, ...]:
        return tuple(site.channels * self.channels // FULL for site in SITES)

    @cached_property
    def model(self):
        made = comfy_host.sdxl(self.channels, self.card.dtype, seed=None, device=self.card.kind)
        self.card.fill(made.model.diffusion_model)
        return made

    @cached_property
    def projections(self) -> IdProjections:
        from ..nodes.host import OPERATIONS

        factory = {"operations": OPERATIONS, "device": self.card.device, "dtype": self.card.dtype}
        made = IdProjections(self.widths, **factory).requires_grad_(False)
        self.card.fill(made)
        return made

    @cached_property
    def managed_projections(self) -> Managed[IdProjections]:
        from ..nodes import host

        return host.managed(self.projections)

    def identity(self, version: str, seed: int = 0) -> IdEmbedding:
        drawn = torch.Generator().manual_seed(seed)
        cond, uncond = torch.randn(2, 1, TOKENS[version], 2048, generator=drawn)
        return IdEmbedding(cond, uncond, version, "bench")

    def apply(self, model, method: str, version: str = "v1", seed: int = 0, mask: Tensor | None = None):
        from ..nodes.apply import PulidApply
        from .fakes import networks as fakes

        pulid = fakes.loaded(PulidWeights(version, "bench", on_cpu(torch.nn.Identity()), self.managed_projections))
        return PulidApply.execute(model, pulid, self.identity(version, seed), method, WEIGHT, 0.0, 1.0, mask)[0]

    def step(self, model, batch: int) -> Callable[[], Tensor]:
        """A call of the UNet as sampling makes it, half of the batch negative."""
        side, network = self.pixels // 8, self.model.model.diffusion_model
        x, context = self.card.randn(batch, 4, side, side), self.card.randn(batch, 77, 2048)
        y, timesteps = self.card.randn(batch, 2816), torch.full((batch,), 500.0, device=self.card.device)
        own = {"cond_or_uncond": [1, 0], "sigmas": torch.ones(1, device=self.card.device)}
        options = {**model.model_options["transformer_options"], **own}
        options |= as_sampled(options, x)
        return lambda: network(x, timesteps, context, y, transformer_options=options)

    def over(self, model, batch: int, add: Callable[..., Tensor], skip_middle: bool = False):
        """A MODEL whose sites answer add(q, base, tokens, to_k, to_v, heads), as other packs compute it."""
        from comfy.ldm.modules.attention import optimized_attention

        patched, tokens = model.clone(), self.card.randn(2, TOKENS["v1"], 2048)
        tokens = tokens.repeat_interleave(batch // 2, dim=0)
        for index, site in enumerate(SITES):
            weights = self.projections.to_k[index].weight, self.projections.to_v[index].weight

            def answer(q, k, v, options, weights=weights):
                base = optimized_attention(q, k, v, options["n_heads"], transformer_options=options)
                return add(q, base, tokens, *weights, options["n_heads"])

            if not (skip_middle and site.part == "middle"):
                patched.set_model_attn2_replace(answer, site.part, site.number, site.block)
        return patched

    def with_ip_adapter(self, batch: int):
        """A MODEL with what IPAdapter does at each site: attention to picture tokens, added."""
        from comfy.ldm.modules.attention import optimized_attention

        patched = self.model.clone()
        for site, width in zip(SITES, self.widths, strict=True):
            keys, values = self.card.randn(batch, IP_TOKENS, width), self.card.randn(batch, IP_TOKENS, width)

            def answer(q, k, v, options, keys=keys, values=values):
                out = optimized_attention(q, k, v, options["n_heads"], transformer_options=options)
                return out + 0.5 * optimized_attention(q, keys, values, options["n_heads"])

            patched.set_model_attn2_replace(answer, site.part, site.number, site.block)
        return patched

    def site(self, width: int, batch: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, SiteKV]:
        """q, base and an identity's keys and values for a site of this width."""
        positions = self.positions[width * FULL // self.channels]
        q, base = self.card.randn(2, batch, positions, width).to(dtype or self.card.dtype)
        keys, values = self.card.randn(2, 2, TOKENS["v1"], width).to(q)
        return q, base, SiteKV(keys, values)


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


def rows_of(batch: int) -> list[int]:
    return [1] * (batch // 2) + [0] * (batch // 2)  # negative first, as the host has it


def eager(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def called() -> Tensor:
        with eagerly():
            return call()

    return called


@contextmanager
def eagerly() -> Iterator[None]:
    """Inside, patches are made, and act, without the fused kernels."""
    quickest = kernels._kernels
    kernels._kernels = lambda device, dtype: None
    try:
        yield
    finally:
        kernels._kernels = quickest


# --- Sections: what they yield is printed as it comes ---


def correctness(bench: Bench) -> Iterator[Figure]:
    """The reference vectors in float32, by whatever way this device takes."""
    where = partial(Figure, "correct")
    if not FOLDER.is_dir():
        yield where("reference vectors", None, note=f"none at {FOLDER}; set PULID_REFERENCE")
        return
    from . import host_unet

    reference = Reference(FOLDER, bench.card.kind)
    ways = {"fused": lambda q, base, kv, *more, **named: fuse_for(kv)(q, base, kv, *more, **named), "eager": fuse}
    for way, attend in ways.items():
        for part in (attention_official, attention_shared_workflows):
            errors = [line.error for line in part(reference, attend)]
            yield where(f"{part.__name__}, {way}: worst of {len(errors)}", max(errors), "", 2e-5)
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
        positions = bench.positions[width * FULL // bench.channels]
        shapes = (2, positions, width), (2, 77, 2048), (2, TOKENS["v1"], 2048)
        return cls(*(bench.card.randn(*shape).to(dtype) for shape in shapes), weights)

    def exactly(self) -> "Site":
        """The same in float64, on the CPU."""
        weights = {name: weight.cpu().double() for name, weight in self.weights.items()}
        return Site(*(t.cpu().double() for t in (self.x, self.context, self.tokens)), weights)

    def out(self, fusion: Fusion | None) -> Tensor:
        heads = self.x.shape[-1] // HEAD
        q, k, v = (
            torch.nn.functional.linear(of, self.weights[name])
            for name, of in (("q", self.x), ("k", self.context), ("v", self.context))
        )
        split = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        attended = torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        if fusion is not None:
            wide = torch.promote_types(
                q.dtype, torch.float32
            )  # as the projections compute, whatever they are stored in
            id_kv = (
                torch.nn.functional.linear(self.tokens.to(wide), self.weights[of].to(wide)) for of in ("id_k", "id_v")
            )
            kv = SiteKV(*id_kv).prepare(heads, 8, WEIGHT, q.dtype)
            attended = fuse_for(kv)(q, attended, kv, [1, 0], fusion)
        return torch.nn.functional.linear(attended, self.weights["out"])


def error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.cpu().double() - exact).norm() / exact.norm()).item()


def steps(bench: Bench) -> Iterator[Figure]:
    """A step of the UNet with each way of adding an identity, over the same step without."""
    for batch in (2,) if bench.card.kind == "cpu" else (2, 8):
        calls = {name: bench.step(model, batch) for name, model in models(bench, batch).items()}
        with eagerly():
            for method in METHODS:
                calls[f"eager: {method}"] = eager(bench.step(bench.apply(bench.model, method), batch))
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


def models(bench: Bench, batch: int) -> dict[str, Any]:
    """Name -> MODEL."""
    mask = torch.zeros(1, bench.pixels, bench.pixels)
    mask[..., : bench.pixels // 2] = 1
    apply = bench.apply
    made = {"unpatched": bench.model}
    made |= {f"{method}, {version}": apply(bench.model, method, version) for method in METHODS for version in TOKENS}
    made["fidelity, v1, with a mask"] = apply(bench.model, "fidelity", mask=mask)
    made["two people, a mask each"] = apply(
        apply(bench.model, "fidelity", mask=mask), "fidelity", seed=1, mask=1 - mask
    )
    made["IPAdapter-like"] = bench.with_ip_adapter(batch)
    made["fidelity, v1, over IPAdapter-like"] = apply(made["IPAdapter-like"], "fidelity")
    method = METHODS["fidelity"]["v1"]
    theirs = {"fusion": method.fusion, "zero_tokens": method.zero_tokens, "weight": WEIGHT}
    made["as published"] = bench.over(bench.model, batch, partial(published, **theirs))
    used = partial(most_used, zero_tokens=method.zero_tokens, weight=WEIGHT)
    made["as the most used pack does"] = bench.over(bench.model, batch, used, skip_middle=True)
    return made


def limit(bench: Bench) -> Iterator[Figure]:
    """The fused sites by themselves, over moving q and base twice and the output once at the measured bandwidth."""
    card = bench.card
    bandwidth = copying(card, bench.repeats)
    yield Figure("limit", "copying on the device, read and written", bandwidth, "GB/s")
    for batch in (2,) if card.kind == "cpu" else (2, 8):
        for name, versions in METHODS.items():
            method, passes = versions["v1"], 3 if versions["v1"].fusion is Fusion.PLAIN else 5
            sites = [bench.site(width, batch) for width in bench.widths]
            moved = passes * sum(q.nbytes for q, _, _ in sites)
            prepared = [kv.prepare(q.shape[-1] // HEAD, method.zero_tokens, WEIGHT) for q, _, kv in sites]
            ways = {"fused": [fuse_for(kv) for kv in prepared], "eager": [fuse] * len(sites)}
            rows, floor = rows_of(batch), moved / bandwidth / 1e6  # ms
            for way, functions in ways.items():
                called = [
                    partial(function, q, base, kv, rows, method.fusion)
                    for function, (q, base, _), kv in zip(functions, sites, prepared, strict=True)
                ]
                taken = card.medians({way: replayed(card, called)}, bench.repeats)[way]
                target_ratio = 1.5 if way == "fused" and card.kind != "cpu" else None
                yield Figure("limit", f"70 sites, batch {batch}, {name}, {way}", taken, "ms")
                yield Figure("limit", "  over moving what must move", taken / floor, "", target_ratio)


def copying(card: Card, repeats: int) -> float:
    """Bytes read and written by a copy on the device, in GB/s."""
    source = torch.ones(1 << (26 if card.kind == "cpu" else 30), dtype=torch.uint8, device=card.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / card.medians({"copy": lambda: target.copy_(source)}, repeats)["copy"] / 1e6


def replayed(card: Card, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """All calls as one; on CUDA as a graph, so that only the device's own time counts."""
    if card.kind != "cuda":
        return lambda: [call() for call in calls]
    for call in calls:
        call()
    card.wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def launches(bench: Bench) -> Iterator[Figure]:
    """Kernels per site, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    if bench.card.kind not in ("cuda", "xpu"):
        yield Figure("launches", "kernels per site", None, note=f"{bench.card.kind} launches none that can be counted")
        return
    activity = ProfilerActivity.CUDA if bench.card.kind == "cuda" else ProfilerActivity.XPU
    for name, versions in METHODS.items():
        method = versions["v1"]
        q, base, kv = bench.site(bench.widths[-1], 2)
        prepared = kv.prepare(q.shape[-1] // HEAD, method.zero_tokens, WEIGHT)
        for way, function in (("fused", fuse_for(prepared)), ("eager", fuse)):
            function(q, base, prepared, [1, 0], method.fusion)
            bench.card.wait()
            with profile(activities=[activity]) as profiled:
                function(q, base, prepared, [1, 0], method.fusion)
                bench.card.wait()
            kernels = [event for event in profiled.events() if event.device_type.name != "CPU"]
            yield Figure("launches", f"kernels per site, {name}, {way}", len(kernels))


def graphs(bench: Bench) -> Iterator[Figure]:
    """The whole step as one CUDA graph: what is added when launching costs nothing."""
    if bench.card.kind != "cuda":
        yield Figure("cuda graph", "a step", None, note="CUDA only")
        return
    chosen = {"unpatched": bench.model} | {method: bench.apply(bench.model, method) for method in METHODS}
    calls = {name: replayed(bench.card, [bench.step(model, 2)]) for name, model in chosen.items()}
    times = bench.card.medians(calls, bench.repeats)
    plain = times.pop("unpatched")
    yield Figure("cuda graph", "a step, batch 2, unpatched", plain, "ms")
    for name, taken in times.items():
        yield Figure("cuda graph", f"  {name}: added", taken - plain, "ms")
        yield Figure("cuda graph", f"  {name}: added, percent of a step", 100 * (taken - plain) / plain, "%")


def compiling(bench: Bench) -> Iterator[Figure]:
    """Graph breaks under torch.compile of the UNet; and where there is a card, a compiled step's time."""
    import torch._dynamo as dynamo

    small = Bench(bench.card, bench.comfyui, bench.repeats)
    small.channels, small.pixels = FIFTH, 256
    found = {}
    for name, model in (("unpatched", small.model), ("fidelity", small.apply(small.model, "fidelity"))):
        dynamo.reset()
        dynamo.utils.counters.clear()
        call = small.step(model, 2)
        network = small.model.model.diffusion_model
        small.model.model.diffusion_model = torch.compile(network, backend="eager")
        try:
            small.step(model, 2)()
            breaks = dynamo.utils.counters["graph_break"]
        finally:
            small.model.model.diffusion_model = network
        found[name] = sum(breaks.values())
        yield Figure("compile", f"graph breaks, {name}", found[name], note="; ".join(list(breaks)[:2])[:200])
        del call
    yield Figure("compile", "graph breaks that are ours", found["fidelity"] - found["unpatched"], "", 0)


def compiled_time(bench: Bench) -> Iterator[Figure]:
    """A step under torch.compile with inductor, patched and not. Takes minutes: only with --compile."""
    times = {}
    network = bench.model.model.diffusion_model
    for name, model in (("unpatched", bench.model), ("fidelity", bench.apply(bench.model, "fidelity"))):
        torch._dynamo.reset()
        bench.model.model.diffusion_model = torch.compile(network)
        try:
            call = bench.step(model, 2)
            start = time.perf_counter()
            call()
            bench.card.wait()
            yield Figure("compile", f"first step, {name}", time.perf_counter() - start, "s")
            times[name] = bench.card.medians({name: call}, bench.repeats)[name]
        finally:
            bench.model.model.diffusion_model = network
        yield Figure("compile", f"a compiled step, batch 2, {name}", times[name], "ms")
    added = times["fidelity"] - times["unpatched"]
    yield Figure("compile", "  added, percent of a step", 100 * added / times["unpatched"], "%")


def encoding(bench: Bench) -> Iterator[Figure]:
    """From photograph to identity, v1.1, with networks of the real sizes and random weights."""
    from . import bench_card_encode

    yield from bench_card_encode.figures(bench)


MEMORY_MODES = {"as it is": [], "--lowvram": ["--lowvram"], "--novram": ["--novram"], "dynamic VRAM": None}


def memory(bench: Bench) -> Iterator[Figure]:
    """Peak and settled memory, in a process of its own for each way that ComfyUI can be started."""
    if bench.card.kind not in ("cuda", "xpu"):
        yield Figure("memory", "peak and settled", None, note=f"{bench.card.kind} does not tell")
        return
    for name in MEMORY_MODES:
        command = [sys.executable, str(TOOLS), "bench_card_memory", bench.card.kind, bench.comfyui, name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
            yield Figure("memory", name, None, note=f"failed: {last[:160]}")
            continue
        for what, value, most in json.loads(done.stdout.splitlines()[-1]):
            yield Figure("memory", f"{name}: {what}", value, "MB", most)


SECTIONS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "correct": correctness,
    "precision": precision,
    "launches": launches,
    "limit": limit,
    "steps": steps,
    "graphs": graphs,
    "encode": encoding,
    "compile": compiling,
    "memory": memory,
}
EXTRA = {"compiled": compiled_time}


def run(bench: Bench, sections: Sequence[str]) -> Iterator[Figure]:
    """Every section; one that fails says so in its place, and the others go on."""
    for name in sections:
        try:
            with torch.inference_mode():
                yield from {**SECTIONS, **EXTRA}[name](bench)
        except Exception as problem:
            traceback.print_exc()
            yield Figure(name, "this section", None, note=f"FAILED: {type(problem).__name__}: {str(problem)[:160]}")


def main() -> int:
    arguments = command_line.bench()
    if not (arguments.device and arguments.comfyui):
        sys.exit("This measures a device in a ComfyUI: name both, with --device and --comfyui.")
    repeats = arguments.repeats or 10
    card = Card(arguments.device)
    comfy_host.enter(arguments.comfyui, device=arguments.device)
    from comfyui_version import __version__ as host_version

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    about = {
        "device": card.name,
        "torch": torch.__version__,
        "ComfyUI": host_version,
        "python": platform.python_version(),
    }
    print(about, flush=True)
    start, figures = time.perf_counter(), []
    for figure in run(Bench(card, arguments.comfyui, repeats), arguments.only or list(SECTIONS)):
        print(figure, flush=True)
        figures.append(figure)
    seconds = time.perf_counter() - start
    print(f"{seconds:.0f} s; missed: {sum(not figure.holds for figure in figures)}")
    if arguments.json:
        written = {**about, "seconds": round(seconds), "figures": [asdict(figure) for figure in figures]}
        arguments.json.write_text(json.dumps(written, indent=1) + "\n")
    return int(any(figure.note.startswith("FAILED") for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
