"""What the benches of a card share: a device, a figure measured on it, and SDXL with PuLID there, of random weights."""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..pulid.attention import IdProjections
from ..pulid.identity import IdEmbedding
from ..pulid.networks import Managed, PulidWeights, on_cpu
from ..pulid.sites import SITES
from . import comfy_host

WEIGHT, TOKENS = 0.8, {"v1": 10, "v1.1": 32}
FULL, FIFTH = 320, 64  # model channels


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

    def as_one(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        """All calls as one; on CUDA as a graph, so that only the device's own time counts."""
        if self.kind != "cuda":
            return lambda: [call() for call in calls]
        for call in calls:
            call()
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)


class Bench:
    """What is measured: a device, a MODEL of SDXL on it, projections and identities. On a CPU it is `small`."""

    def __init__(self, card: Card, comfyui: str, repeats: int, small: bool = False):
        self.card, self.comfyui, self.repeats = card, comfyui, repeats
        self.channels, self.pixels = (FIFTH, 256) if small or card.kind == "cpu" else (FULL, 1024)

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
