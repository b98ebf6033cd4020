"""The networks of the method, each with the way to the device it runs on, and what is made with them once."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .attention import IdProjections, SiteKV
from .encoders import IdEncoder, IdFormer
from .eva import EvaVisionTower
from .faces import FaceAnalyzer
from .identity import IdEmbedding, Version
from .onednn import quick_linear
from .tokens import uncond_tokens, with_noise

Bring = Callable[[], torch.device]  # brings a network to the device it is to run on, and returns that
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Managed(Generic[Network]):
    """A network that rests somewhere between uses, and what brings it to its device: in a node, ComfyUI."""

    module: Network
    load: Bring
    source: Hashable = field(default_factory=object)  # equal for equal weights; by default, to no other


def on_cpu(module: Network) -> Managed[Network]:
    """A network that stays where it is, on the CPU."""
    return Managed(module, lambda: torch.device("cpu"))


@dataclass(frozen=True, eq=False)
class PhotoNetworks:
    """What sees a photograph: the vision tower and the face networks."""

    tower: Managed[EvaVisionTower]
    analyzer: FaceAnalyzer

    @property
    def source(self) -> Hashable:
        """Equal for networks that give equal results."""
        return self.tower.source, self.analyzer.source


@dataclass(eq=False)
class PulidWeights:
    """What a PuLID file holds. The networks compute in float32, from whatever dtype they are stored in."""

    version: Version
    fingerprint: str  # of the ID encoder's weights
    encoder: Managed[IdEncoder | IdFormer]
    projections: Managed[IdProjections]
    _noisy: WeakKeyDictionary[IdEmbedding, dict] = field(default_factory=WeakKeyDictionary)
    _projected: WeakKeyDictionary[IdEmbedding, dict] = field(default_factory=WeakKeyDictionary)

    @cached_property
    def zeros(self) -> Tensor:
        """The encoder's answer to all zeros, (1, T, D) on the CPU: the tokens of nobody."""
        return self._uncond_tokens()

    def with_noise(self, identity: IdEmbedding, noise: float, seed: int) -> IdEmbedding:
        """The identity with the encoder's answer to noise of this strength, 0..1, in its negative branch."""
        kept = self._noisy.setdefault(identity, {})
        if (noise, seed) not in kept:
            kept.clear()  # a seed that changes at every run must not pile up keys and values
            kept[noise, seed] = with_noise(identity, self.zeros, self._uncond_tokens(noise, seed))
        return kept[noise, seed]

    def project(self, identity: IdEmbedding, device: torch.device) -> tuple[SiteKV, ...]:
        """Keys and values of every site: one row per identity, then the negative branch's. Made once per identity."""
        kept = self._projected.setdefault(identity, {})
        if device not in kept:
            tokens = torch.cat((identity.cond, identity.uncond)).to(self.projections.load())
            projected = self.projections.module.project(tokens)
            kept[device] = tuple(SiteKV(kv.keys.to(device), kv.values.to(device)) for kv in projected)
        return kept[device]

    def _uncond_tokens(self, noise: float = 0.0, seed: int = 0) -> Tensor:
        device = self.encoder.load()
        with quick_linear(device):
            return uncond_tokens(self.encoder.module, device=device, noise=noise, seed=seed).cpu()
