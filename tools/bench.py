"""Measures what PuLID costs, as ratios of one run: `python3 run.py bench [--quick] [--json FILE]`.

Compared with the published formulation (tools/published.py): keys and values projected at every step, attention
computed twice, everything after it in float32. Absolute times are this machine's; the ratios are what travels.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..pulid.attention import METHODS, IdProjections, SiteKV, fuse
from ..pulid.networks import PulidWeights, on_cpu
from ..pulid.sites import SITES
from . import TOOLS
from . import arguments as command_line
from .published import published

VERSION, TOKENS, WEIGHT = "v1", 10, 0.8
ROWS = [1, 0]  # a batch of two: negative, positive
FIFTH, FULL = 64, 320  # model channels
BARE = {  # operators that move no data
    "view", "_unsafe_view", "transpose", "t", "permute", "unsqueeze", "squeeze", "slice", "select", "split", "unbind",
    "expand", "as_strided", "detach", "alias", "empty", "new_empty", "empty_like", "lift_fresh",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One measurement: ours over the other's, with the target where there is one."""

    what: str
    ours: float
    other: float | None
    unit: str
    target: float | None = None  # of the ratio, or of our own figure where there is no other

    @property
    def ratio(self) -> float | None:
        return None if self.other is None else self.ours / self.other

    @property
    def holds(self) -> bool:
        return self.target is None or (self.ours if self.ratio is None else self.ratio) <= self.target

    def __str__(self) -> str:
        ratio = "" if self.ratio is None else f"{self.ratio:8.3f}"
        other = "" if self.other is None else f"{self.other:12.4g}"
        wanted = "" if self.target is None else f"at most {self.target:g}{'' if self.holds else '  MISSED'}"
        return f"{self.what:58} {self.ours:12.4g} {other:>12} {self.unit:6} {ratio:>8}  {wanted}"


class Counted(TorchDispatchMode):
    """Counts operators that move data, and the bytes of their inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.operators, self.bytes = 0, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if operator._schema.name.partition("::")[2] not in BARE:
            self.operators += 1
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor))
        return out


def added_work(measure: Callable) -> tuple[Counter, Counter]:
    """What ours and the published formulation add to a step at 1024 px, full width, float16, over all 70 sites.

    On the meta device, where every operator is decomposed alike and nothing is computed. `measure` returns a context
    manager and a function that reads it.
    """
    method = METHODS["fidelity"][VERSION]
    sums = Counter(), Counter()
    half = {"dtype": torch.float16, "device": "meta"}
    for site in SITES:
        positions = 64 * 64 if site.channels == 640 else 32 * 32
        q, base = torch.empty(2, 2, positions, site.channels, **half)
        tokens = torch.empty(2, TOKENS, 2048, **half)
        to_k, to_v = torch.empty(2, site.channels, 2048, **half)
        keys, values = torch.empty(2, 2, TOKENS, site.channels, **half)
        heads = site.channels // 64
        kv = SiteKV(keys, values).prepare(heads, method.zero_tokens, WEIGHT)
        calls = (
            lambda: fuse(q, base, kv, ROWS, method.fusion),  # noqa: B023
            lambda: published(q, base, tokens, to_k, to_v, heads, method.fusion, method.zero_tokens, WEIGHT),  # noqa: B023
        )
        for total, call in zip(sums, calls, strict=True):
            total.update(measure(call))
    return sums


def count_operators(call: Callable) -> dict[str, int]:
    with torch.no_grad(), Counted() as counted:  # no_grad: inference mode would hide what composite operators do
        call()
    return {"operators": counted.operators, "bytes": counted.bytes}


def count_flops(call: Callable) -> dict[str, int]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return {"flops": counter.get_total_flops()}


def step_flops() -> int:
    """FLOPs of SDXL's UNet on a batch of two at 1024 px, by torch's own counter, on the meta device."""
    from diffusers import UNet2DConditionModel

    from .diffusers_unet import sdxl_config

    with torch.device("meta"):
        unet = UNet2DConditionModel(**sdxl_config())
        more = {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}
        inputs = torch.empty(2, 4, 128, 128), torch.empty(2), torch.empty(2, 77, 2048)
        return count_flops(lambda: unet(*inputs, added_cond_kwargs=more))["flops"]


def counts() -> Iterator[Row]:
    ours, other = added_work(count_operators)
    yield Row("operators added per site", ours["operators"] / 70, other["operators"] / 70, "", 0.5)
    yield Row("bytes moved by them, a step at 1024 px, float16", ours["bytes"] / 1e9, other["bytes"] / 1e9, "GB", 1 / 3)
    ours, other = added_work(count_flops)
    yield Row("FLOPs added to a step at 1024 px", ours["flops"] / 1e9, other["flops"] / 1e9, "GFLOP")
    step = step_flops()
    yield Row("FLOPs of a step at 1024 px: patched over unpatched", (step + ours["flops"]) / 1e12, step / 1e12, "TFLOP")
    projections = IdProjections([site.channels for site in SITES], device="meta", dtype=torch.float16)
    kvs = projections.project(torch.empty(2, TOKENS, 2048, device="meta", dtype=torch.float16))
    held = sum(kv.prepare(1, METHODS["fidelity"][VERSION].zero_tokens).nbytes for kv in kvs)
    resting = sum(parameter.nbytes for parameter in projections.parameters())
    yield Row("bytes held while sampling, over the projections'", held / 1e6, resting / 1e6, "MB", 16e6 / resting)


class Timed:
    """A replacement of one site that keeps the time it adds to the site's own attention."""

    def __init__(self, add: Callable, clock: list[float]):
        self.add, self.clock = add, clock

    def __call__(self, q, k, v, extra_options):
        from comfy.ldm.modules.attention import optimized_attention

        base = optimized_attention(q, k, v, extra_options["n_heads"], transformer_options=extra_options)
        start = time.perf_counter()
        out = self.add(q, base)
        self.clock[0] += time.perf_counter() - start
        return out


def cheap_weights(network: torch.nn.Module) -> None:
    """Random weights of a sane size, drawn once and repeated: for timing, not for pictures."""
    noise = torch.randn(1 << 20)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                values = noise.repeat(-(-parameter.numel() // noise.numel()))[: parameter.numel()]
                parameter.copy_(values.view(parameter.shape) * parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(float(name.endswith("weight")))


def steps(model_channels: int, pixels: int, repeats: int) -> Iterator[Row]:
    """Time of a step on the host's UNet, CPU, float32: unpatched, ours and published in turn."""
    from . import comfy_host

    model = model_of(model_channels)
    network = model.model.diffusion_model
    method = METHODS["fidelity"][VERSION]
    projections, tokens = projections_of(model_channels), torch.randn(2, TOKENS, 2048)
    side = pixels // 8
    inputs = {
        "x": torch.randn(2, 4, side, side), "timesteps": torch.tensor([500.0, 500.0]),
        "context": torch.randn(2, 77, 2048), "y": torch.randn(2, comfy_host.SDXL_CONFIG["adm_in_channels"]),
    }  # fmt: skip
    clocks = {"ours": [0.0], "published": [0.0]}
    patches = {"unpatched": {}, "ours": {}, "published": {}}
    for index, (site, kv) in enumerate(zip(SITES, projections.project(tokens), strict=True)):
        heads = site.channels * model_channels // 320 // 64
        prepared = kv.prepare(heads, method.zero_tokens, WEIGHT)
        weights = projections.to_k[index].weight, projections.to_v[index].weight

        def ours_on(q, base, kv=prepared):
            return fuse(q, base, kv, ROWS, method.fusion)

        def published_on(q, base, more=(*weights, heads, method.fusion, method.zero_tokens, WEIGHT)):
            return published(q, base, tokens, *more)

        for name, add in (("ours", ours_on), ("published", published_on)):
            patches[name][site.key] = Timed(add, clocks[name])
    times, added = {name: [] for name in patches}, {name: [] for name in clocks}
    for repeat in range(repeats + 1):
        for name, replacements in patches.items():
            options = {"cond_or_uncond": [1, 0], "sigmas": torch.ones(1), "patches_replace": {"attn2": replacements}}
            clocks["ours"][0] = clocks["published"][0] = 0.0
            start = time.perf_counter()
            network(inputs["x"], inputs["timesteps"], inputs["context"], inputs["y"], transformer_options=options)
            if repeat:  # the first round warms up
                times[name].append(time.perf_counter() - start)
                if name in added:
                    added[name].append(clocks[name][0])
    median = {name: statistics.median(values) for name, values in times.items()}
    where = f"{'full' if model_channels == FULL else '1/5'} width, {pixels} px"
    for name, title in (("ours", "patched"), ("published", "published")):
        yield Row(f"step, {where}: {title} over unpatched", median[name], median["unpatched"], "s")
    ours, other = (statistics.median(added[name]) for name in ("ours", "published"))
    target = 0.25 if (model_channels, pixels) == (FULL, 256) else None
    yield Row(f"time added to a step, {where}: over published", ours, other, "s", target)


@lru_cache(1)  # one at a time: the real width takes 10 GB
def model_of(model_channels: int):
    from . import comfy_host

    model = comfy_host.sdxl(model_channels, seed=None)
    cheap_weights(model.model.diffusion_model)
    return model


@lru_cache(1)
def projections_of(model_channels: int) -> IdProjections:
    projections = IdProjections(widths_of(model_channels), device="meta").to_empty(device="cpu")
    cheap_weights(projections)
    return projections.requires_grad_(False)


def widths_of(model_channels: int) -> tuple[int, ...]:
    return tuple(site.channels * model_channels // 320 for site in SITES)


def slider(model_channels: int) -> Iterator[Row]:
    """What a change of weight, range, method or mask costs: Apply with an identity it has seen, and with a new one."""
    from ..nodes import host
    from ..nodes.apply import PulidApply
    from ..pulid.identity import IdEmbedding
    from .fakes import networks as fakes

    projections = projections_of(model_channels)
    pulid = fakes.loaded(PulidWeights(VERSION, "bench", on_cpu(torch.nn.Identity()), host.managed(projections)))
    model = model_of(model_channels)
    identity = IdEmbedding(torch.randn(1, TOKENS, 2048), torch.randn(1, TOKENS, 2048), VERSION, "bench")

    def apply(weight: float) -> float:
        start = time.perf_counter()
        PulidApply.execute(model, pulid, identity, "fidelity", weight, 0.0, 1.0)
        return time.perf_counter() - start

    first = apply(0.8)
    again = statistics.median(apply(weight) for weight in (0.5, 0.6, 0.7))
    yield Row(f"change of a slider, {'full' if model_channels == FULL else '1/5'} width", again, None, "s", 0.05)
    yield Row("  the same over a first Apply", again, first, "s")


LOADING = """
import gc, json, statistics, sys, time
from pathlib import Path
from pulid_sdxl.models import checkpoints, face_networks
from pulid_sdxl.pulid.packages import import_package

def memory(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024

def tensors(*networks):
    return sum(tensor.nbytes for network in networks for tensor in network.state_dict().values())

def pulid(path):
    loaded = checkpoints.load_pulid(path)
    return loaded, tensors(loaded.encoder, loaded.projections)

def tower(path):
    loaded = checkpoints.load_vision_tower(path)
    return loaded, tensors(loaded)

def faces(folder):
    tasks = (("detection", "scrfd_10g_bnkps.onnx"), ("recognition", "glintr100.onnx"))
    loaded = [face_networks.load_onnx(folder / name, task, ["CPUExecutionProvider"]) for task, name in tasks]
    return loaded, sum((folder / name).stat().st_size for _, name in tasks)

def plain(path):
    return [file.read_bytes() for file in (path.glob("*") if path.is_dir() else [path])], 0

def measure(load, path):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = memory("VmRSS"), time.perf_counter()
    loaded, kept = load(path)
    return time.perf_counter() - start, memory("VmHWM") - before, kept

import_package("insightface.model_zoo")
for name, load in json.loads(sys.argv[3]).items():
    path = Path(sys.argv[1], name)
    both = {"plain": [], "ours": []}
    for _ in range(int(sys.argv[2])):  # in turn, so that what else the machine does falls on both
        both["plain"].append(measure(plain, path))
        both["ours"].append(measure(globals()[load], path))
    print(json.dumps({how: [statistics.median(times), max(peaks), max(kept)] for how, runs in both.items()
                      for times, peaks, kept in [zip(*runs)]}))
"""
ROOM = 300e6  # bytes that loading may take beyond what is kept

# Every form that weights come in, under names that say nothing: what it is, how it is made, which loader of LOADING.
FORMS = {
    "v1": ("PuLID v1, converted", lambda made, path: made.make_pulid(path, "v1-converted"), "pulid"),
    "eva": ("EVA02-CLIP, published pickle", lambda made, path: made.make_eva(path, "published"), "tower"),
    "v1.bin": ("PuLID v1, published pickle", lambda made, path: made.make_pulid(path, "v1-published"), "pulid"),
    "v1_1": ("PuLID v1.1", lambda made, path: made.make_pulid(path, "v1.1"), "pulid"),
    "eva_timm": ("EVA02-CLIP, timm's safetensors", lambda made, path: made.make_eva(path, "timm"), "tower"),
    "antelopev2": ("antelopev2, both networks", lambda made, path: make_antelopev2(path), "faces"),
}
QUICK_FORMS = ("v1", "eva")


def make_antelopev2(folder: Path) -> None:
    """The detector's stand-in, and the recogniser's real architecture at its real size."""
    import onnx

    from .fakes import standin_faces

    folder.mkdir()
    onnx.save(standin_faces.make_scrfd(), folder / "scrfd_10g_bnkps.onnx")
    onnx.save(standin_faces.make_iresnet100(), folder / "glintr100.onnx")


def loading(repeats: int, forms: Iterable[str] = tuple(FORMS)) -> Iterator[Row]:
    """Time and peak memory of loading real-size stand-ins, over reading the same bytes; files in the page cache."""
    from .fakes import standins

    for form in forms:  # one at a time: they take a gigabyte each
        title, make, load = FORMS[form]
        with tempfile.TemporaryDirectory() as folder:
            make(standins, Path(folder, form))
            command = [sys.executable, str(TOOLS), "-c", LOADING, folder, str(repeats), json.dumps({form: load})]
            measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        (seconds, peak, kept), (plain_seconds, _, _) = measured["ours"], measured["plain"]
        ours = form != "antelopev2"  # InsightFace's loader opens that, once: a second or two
        yield Row(f"load {title}: over reading its bytes", seconds, plain_seconds, "s", 1.5 if ours else None)
        peak_row = "  peak memory, over what is kept and 300 MB"
        yield Row(peak_row, peak / 1e6, (kept + ROOM) / 1e6, "MB", 1.0 if ours else None)


def encoding(comfyui: str, photographs: int, many: int) -> Iterator[Row]:
    """From photograph to identity with stand-in weights, over the published way; then `many` photographs at once.

    Each in a process of its own.
    """

    def run(*words) -> str:
        command = [sys.executable, str(TOOLS), "bench_encoding", *map(str, words)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with tempfile.TemporaryDirectory() as folder:
        run("make", folder, "v1-converted")
        ours, other = (json.loads(run(how, folder, comfyui, photographs)) for how in ("ours", "published"))
        yield Row("first photograph encoded, over the published way", ours[0], other[0], "s", 0.6)
        further = (statistics.median(times[1:photographs]) for times in (ours, other))
        yield Row("  a further photograph", *further, "s", 0.8)
        yield Row("  the same photograph again", ours[-1], None, "s", 0.005)
    for version, layout in (("v1", "v1-converted"), ("v1.1", "v1.1")) if many else ():
        with tempfile.TemporaryDirectory() as folder:
            run("make", folder, layout)
            few, lot = (int(run("peak", folder, comfyui, count)) / 1e6 for count in (4, many))
            yield Row(f"  peak memory for each of {many} photographs, {version}", (lot - few) / (many - 4), None, "MB")


COUNTED = "Counted, so the same on every machine: what a step gets to do, ours against the published formulation"
LOADED = "Reading stand-ins of the real sizes: seconds and peak memory, ours against reading the bytes alone"
ENCODED = "From photograph to identity: seconds, ours against the published way"
STEPPED = (
    "A sampling step on the CPU: all of it against one without PuLID; and what is added to it, ours against published"
)
SLID = "A new weight, range or method: seconds of Apply with an identity that it has seen"
IDLE = 0.25  # load for each processor that may be others'


def show(meaning: str, rows: Iterator[Row]) -> list[Row]:
    """Print each row as it is measured, below what they mean."""
    print(f"\n{meaning}")
    kept = []
    for row in rows:
        print(row, flush=True)
        kept.append(row)
    return kept


def load() -> float:
    """How many processes ran or wanted to, on average over the last minute; 0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def verdict(rows: Sequence[Row], before: float, during: float, threads: int, processors: int) -> str:
    """What the limits say, and whether the machine had time enough for that.

    before, during  loads; of the second, `threads` are ours
    """
    missed = sum(not row.holds for row in rows)
    limits = sum(row.target is not None for row in rows)
    lines = [f"{missed} of {limits} limits MISSED." if missed else f"All {limits} limits hold."]
    if max(before, during - threads) > IDLE * processors:
        lines.append(
            f"THE MACHINE WAS BUSY: load {before:.1f} before, {during:.1f} during the bench, which takes {threads}, on "
            f"{processors} processors. Figures in seconds cannot be judged; measure again when nothing else runs."
        )
    return "\n".join(lines)


def main() -> int:
    if any(word.split("=")[0] == "--device" for word in sys.argv):
        from . import bench_card

        return bench_card.main()
    arguments = command_line.bench()
    before = load()
    sizes = [(FIFTH, 256, 3), (FULL, 256, 1)]
    if not arguments.quick:
        sizes = [(FIFTH, 256, 9), (FIFTH, 512, 5), (FIFTH, 1024, 3), (FULL, 256, 7), (FULL, 512, 3)]
    print(f"{'':58} {'ours':>12} {'other':>12} {'':6} {'ratio':>8}")
    start = time.perf_counter()
    with torch.inference_mode(False):  # where composite operators show what they are made of
        rows = show(COUNTED, counts())
    parts: list[tuple[str, Callable[[], Iterator[Row]]]] = []
    if Path("/proc/self/status").exists():  # where peak memory can be read
        parts.append((LOADED, lambda: loading(7, QUICK_FORMS if arguments.quick else FORMS)))
    if arguments.comfyui:
        from . import comfy_host

        comfy_host.enter(arguments.comfyui)  # after counting: it changes what torch makes of attention
        parts += [
            (ENCODED, lambda: encoding(arguments.comfyui, *((3, 0) if arguments.quick else (6, 50)))),
            (STEPPED, lambda: itertools.chain.from_iterable(steps(*size) for size in sizes)),
            (SLID, lambda: slider(FULL)),
        ]
    else:
        print("No ComfyUI: operators, bytes and loading only.")
    during = []
    with torch.inference_mode():
        for meaning, part in parts:
            rows += show(meaning, part())
            during.append(load())
    seconds, threads = time.perf_counter() - start, torch.get_num_threads()
    print(f"\n{seconds:.0f} s, torch {torch.__version__}, {threads} threads")
    print(verdict(rows, before, max(during, default=0.0), threads, os.cpu_count() or 1))
    if arguments.json:
        figures = [{**row.__dict__, "ratio": row.ratio, "holds": row.holds} for row in rows]
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
