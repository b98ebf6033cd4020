"""The two socket types of this pack, and what travels through the first."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from comfy_api.latest import io
from torch import Tensor

from ..pulid.attention import SiteKV
from ..pulid.embed import Photos, face_vectors, identity_of, reads_together, uncond_tokens
from ..pulid.encoders import STAGES
from ..pulid.faces import FaceAnalyzer, to_vision_input
from ..pulid.identity import IdEmbedding, Version
from ..pulid.onednn import ProductsByOneDnn
from . import host

PulidSocket = io.Custom("PULID_SDXL")
IdentitySocket = io.Custom("PULID_IDENTITY")  # an IdEmbedding


@dataclass(frozen=True, eq=False)
class Reading:
    """What was read in one face: its own tokens, or what the encoder needs to look at it together with others.

    tokens  (T, D)
    x       (1280,)
    hidden  5 x (577, 1024)
    face    (1, 336, 336), in the place of the hidden states, to compute them again
    """

    tokens: Tensor | None = None
    x: Tensor | None = None
    hidden: tuple[Tensor, ...] = ()
    face: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.tokens, self.x, *self.hidden, self.face) if tensor is not None]


class Keep(Enum):
    """What a Reading keeps of a photograph."""

    TOKENS = auto()  # what the encoder made of it alone
    HIDDEN = auto()  # for the encoder to look at it together with others: 12 MB
    FACE = auto()  # for the same, from the vision tower once more: 0.5 MB


def quickly(device: torch.device) -> AbstractContextManager:
    """What networks that only make products run in, on this device."""
    return ProductsByOneDnn() if device.type == "cpu" else nullcontext()


@dataclass(frozen=True, eq=False)
class VisionTower:
    """The vision tower by itself: the managed network, and what tells its weights from others."""

    network: object
    source: Hashable


@dataclass(eq=False)
class Pulid:
    """Everything the loader gives. The three networks rest under the host's memory management between uses.

    version, fingerprint  of the ID encoder
    widths                channels of the 70 sites that the projections were made for
    tower, encoder, projections  managed networks; they compute in float32 from whatever dtype they are stored in
    analyzer              the face networks, built at first use
    source                tells these weights from others: two that are equal give equal results

    What one PuLID file holds has neither tower nor analyzer, until `with_sight`.
    """

    version: Version
    fingerprint: str
    widths: tuple[int, ...]
    tower: object | None
    encoder: object
    projections: object
    analyzer: FaceAnalyzer | None
    source: Hashable = field(default_factory=object)  # equal to no other
    _noisy: WeakKeyDictionary = field(default_factory=WeakKeyDictionary)
    _projected: WeakKeyDictionary = field(default_factory=WeakKeyDictionary)

    @cached_property
    def zeros(self) -> Tensor:
        """The tokens of nobody (1, T, D); they depend on the weights alone."""
        return self._uncond_tokens()

    def with_sight(self, tower: VisionTower, analyzer: FaceAnalyzer) -> "Pulid":
        """The same weights, able to look at photographs; what was projected before need not be projected again."""
        source = self.source, tower.source, analyzer.source
        return replace(self, tower=tower.network, analyzer=analyzer, source=source)

    def read(self, faces: Tensor, arcface: Tensor, keep: Keep) -> list[Reading]:
        """Grey faces on white (P, 3, 336, 336) and their embeddings (P, 512) -> a Reading each, on the CPU."""
        device = host.load(self.tower, self.encoder)
        with quickly(device):
            features = self.tower.model.features(to_vision_input(faces).to(device))
            x = face_vectors(arcface.to(device), features)
            tokens = self.encoder.model(x, features.hidden).cpu() if keep is Keep.TOKENS else ()
        # Copies of rows, so that one photograph that is kept does not keep those it was read with.
        match keep:
            case Keep.TOKENS:
                return [Reading(own.clone()) for own in tokens]
            case Keep.HIDDEN:
                rows = zip(x.cpu(), *(stream.cpu() for stream in features.hidden), strict=True)
                return [Reading(x=own.clone(), hidden=tuple(stream.clone() for stream in rest)) for own, *rest in rows]
            case Keep.FACE:  # grey: its three channels are one
                return [Reading(x=own.clone(), face=face[:1].clone()) for own, face in zip(x.cpu(), faces, strict=True)]

    def identify(
        self, readings: Sequence[Reading], photos: Photos, id_mix: bool, step: Callable[[], None] = lambda: None
    ) -> IdEmbedding:
        """What was read in each photograph -> ID tokens on the CPU. `step` is called between photographs."""
        if reads_together(self.version, photos):
            networks = (self.encoder,) if all(reading.hidden for reading in readings) else (self.tower, self.encoder)
            device = host.load(*networks)
            x = torch.stack([reading.x for reading in readings]).unsqueeze(0).to(device)
            with quickly(device):
                tokens = self.encoder.model(x, self._stages(readings, device, step)).cpu()
        else:
            tokens = torch.stack([reading.tokens for reading in readings])
        return identity_of(tokens, self.zeros, self.version, self.fingerprint, photos, id_mix)

    def _stages(self, readings: Sequence[Reading], device: torch.device, step: Callable[[], None]) -> Iterator[Tensor]:
        """The hidden states of all photographs, (1, P * 577, 1024) on the CPU, one stage at a time.

        Those that were not kept are computed again, all photographs going through the tower side by side.
        """
        tower = self.tower.model
        streams = torch.empty(len(readings), tower.positions, tower.config.width)
        for stage in range(STAGES):
            for stream, reading in zip(streams, readings, strict=True):
                step()
                if reading.hidden:
                    stream.copy_(reading.hidden[stage])
                    continue
                if stage == 0:
                    x = tower.begin(to_vision_input(reading.face.expand(1, 3, -1, -1)).to(device))
                else:
                    x = stream.unsqueeze(0).to(device)
                stream.copy_(tower.advance(x, stage)[0])
            yield streams.flatten(0, 1).unsqueeze(0)

    def with_noise(self, identity: IdEmbedding, noise: float, seed: int) -> IdEmbedding:
        """The identity with the encoder's answer to noise, instead of zeros, in its negative branch."""
        kept = self._noisy.setdefault(identity, {})
        if (noise, seed) not in kept:
            # v1 joins the tokens of several photographs: each is told by the token of nobody that stands in its place.
            which = torch.cdist(identity.uncond[0], self.zeros[0]).argmin(dim=1)  # (T,)
            kept.clear()  # a seed that changes at every run must not pile up keys and values
            kept[noise, seed] = replace(identity, uncond=self._uncond_tokens(noise, seed)[:, which])
        return kept[noise, seed]

    def _uncond_tokens(self, noise: float = 0.0, seed: int = 0) -> Tensor:
        device = host.load(self.encoder)
        with quickly(device):
            return uncond_tokens(self.encoder.model, self.tower.model.positions, device, noise, seed).cpu()

    def project(self, identity: IdEmbedding, device: torch.device, dtype: torch.dtype) -> tuple[SiteKV, ...]:
        """Keys and values of every site: one row per identity, then the negative branch's. Made once per identity."""
        kept = self._projected.setdefault(identity, {})
        if (device, dtype) not in kept:
            tokens = torch.cat((identity.cond, identity.uncond)).to(host.load(self.projections))
            projected = self.projections.model.project(tokens, dtype)
            kept[device, dtype] = tuple(SiteKV(kv.keys.to(device), kv.values.to(device)) for kv in projected)
        return kept[device, dtype]
