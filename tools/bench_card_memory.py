"""Memory of load, encode, apply and sample, for bench_card.py, in a ComfyUI process of its own for each mode.

`python3 tools bench_card_memory DEVICE COMFYUI MODE` is that process. It prints as JSON: [what, MB, limit] of every
stage, measured by torch's allocator.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import TOOLS, comfy_host
from .card import Bench, Card, Figure

MODES = {"as it is": [], "--lowvram": ["--lowvram"], "--novram": ["--novram"], "dynamic VRAM": None}
STEPS = 2
KEYS_AND_VALUES = 16.0  # MB that may stay when the host wants its memory


def memory(bench: Bench) -> Iterator[Figure]:
    """Peak and settled memory, in a process of its own for each way that ComfyUI can be started."""
    if bench.card.kind not in ("cuda", "xpu"):
        yield Figure("memory", "peak and settled", None, note=f"{bench.card.kind} does not tell")
        return
    for name in MODES:
        command = [sys.executable, str(TOOLS), "bench_card_memory", bench.card.kind, bench.comfyui, name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
            yield Figure("memory", name, None, note=f"failed: {last[:160]}")
            continue
        for what, value, most in json.loads(done.stdout.splitlines()[-1]):
            yield Figure("memory", f"{name}: {what}", value, "MB", most)


def enter_with_dynamic_vram(comfyui: str, kind: str) -> None:
    """As ComfyUI's main.py switches it on: its library first, then ComfyUI, then the class of its patchers."""
    import comfy_aimdo.control

    comfy_aimdo.control.init()
    comfy_host.enter(comfyui, device=kind)
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    devices = comfy.model_management.get_all_torch_devices()
    if not comfy_aimdo.control.init_devices((device.index, 0) for device in devices):
        raise RuntimeError("comfy-aimdo does not work here")
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


class Meter:
    """Says how much a stage took at its peak and how much stayed."""

    def __init__(self, card: Card):
        self.memory = getattr(torch, card.kind)
        self.rows: list[tuple[str, float, float | None]] = []

    def __call__(self, what: str, call: Callable, most: float | None = None):
        self.memory.synchronize()
        self.memory.reset_peak_memory_stats()
        result = call()
        self.memory.synchronize()
        self.rows.append((f"{what}, peak", self.memory.max_memory_allocated() / 1e6, None))
        self.rows.append((f"{what}, stays", self.memory.memory_allocated() / 1e6, most))
        return result


def measure(bench: Bench) -> list[tuple[str, float, float | None]]:
    import comfy.model_management
    import comfy.sample

    from ..pulid.cache import ResultCache
    from ..pulid.encode import EncodeSettings, Photograph, encode
    from .bench_card_encode import CACHED, make_networks, rolled

    meter, card = Meter(bench.card), bench.card
    square = card.randn(64, 64)
    workspace = meter("cuBLAS's own workspace", lambda: (square @ square, meter.memory.memory_allocated())[1]) / 1e6
    photo = Photograph(torch.from_numpy(rolled(1)[0]).float() / 255)
    with tempfile.TemporaryDirectory() as folder:
        weights, networks = meter("load", lambda: make_networks(card, Path(folder)))
        meter("encode", lambda: encode([photo], weights, networks, EncodeSettings(), ResultCache(CACHED)))
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    meter("unloaded after encoding", lambda: None, workspace + 1)

    model = bench.model  # made on the card; from now on the host decides where it lies
    model.model.to("cpu")
    bench.projections.to("cpu")
    comfy.model_management.soft_empty_cache()
    patched = meter("apply", lambda: bench.apply(model, "fidelity"))
    latent = torch.zeros(1, 4, bench.pixels // 8, bench.pixels // 8)
    prompt = [[torch.zeros(1, 77, 2048), {"pooled_output": torch.zeros(1, 1280)}]]

    def sample(of) -> torch.Tensor:
        return comfy.sample.sample(
            of, torch.randn(latent.shape, generator=torch.Generator().manual_seed(0)), STEPS, 5.0, "euler", "normal",
            prompt, prompt, latent, disable_pbar=True, seed=0,
        )  # fmt: skip

    plain = meter("sample without PuLID", lambda: sample(model))
    first = meter("sample", lambda: sample(patched))
    if torch.equal(plain, first):
        raise AssertionError("the identity changed nothing")
    for turn in (1, 2):
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        meter(f"unload_all_models, {turn}", lambda: None, workspace + KEYS_AND_VALUES)
        again = meter(f"sample again, {turn}", lambda: sample(patched))
        if not torch.equal(again, first):
            raise AssertionError(f"another picture after {turn} times unloading")
    return meter.rows


def main() -> int:
    kind, comfyui, mode = sys.argv[1:]
    arguments = MODES[mode]
    if arguments is None:
        enter_with_dynamic_vram(comfyui, kind)
    else:
        comfy_host.enter(comfyui, *arguments, device=kind)
    with torch.inference_mode():
        print(json.dumps(measure(Bench(Card(kind), comfyui, 1))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
