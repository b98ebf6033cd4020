"""The two socket types of this pack, and what travels through the first."""

from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import torch
from comfy_api.latest import io
from torch import Tensor

from ..pulid.attention import SiteKV
from ..pulid.embed import Photos, embed, face_vectors, uncond_tokens
from ..pulid.faces import FaceAnalyzer, to_vision_input
from ..pulid.identity import IdEmbedding, Version
from . import host

PulidSocket = io.Custom("PULID_SDXL")
IdentitySocket = io.Custom("PULID_IDENTITY")  # an IdEmbedding


@dataclass(eq=False)
class Pulid:
    """Everything the loader gives. The three networks rest under the host's memory management between uses.

    version, fingerprint  of the ID encoder
    widths                channels of the 70 sites that the projections were made for
    tower, encoder, projections  managed networks; they compute in float32 from whatever dtype they are stored in
    analyzer              the face networks, built at first use
    """

    version: Version
    fingerprint: str
    widths: tuple[int, ...]
    tower: object
    encoder: object
    projections: object
    analyzer: FaceAnalyzer
    _zeros: Tensor | None = None  # uncond tokens; they depend on the weights alone
    _noisy: WeakKeyDictionary = field(default_factory=WeakKeyDictionary)
    _projected: WeakKeyDictionary = field(default_factory=WeakKeyDictionary)

    def identify(self, faces: Tensor, arcface: Tensor, photos: Photos, id_mix: bool) -> IdEmbedding:
        """Grey faces on white (P, 3, 512, 512) and their embeddings (P, 512) -> ID tokens on the CPU."""
        device = host.load(self.tower, self.encoder)
        features = self.tower.model.features(to_vision_input(faces).to(device))
        if self._zeros is None:
            self._zeros = self._uncond_tokens()
        uncond = self._zeros.to(device)
        x = face_vectors(arcface.to(device), features)
        made = embed(self.encoder.model, self.version, self.fingerprint, x, features.hidden, uncond, photos, id_mix)
        return replace(made, cond=made.cond.cpu(), uncond=made.uncond.cpu())

    def with_noise(self, identity: IdEmbedding, noise: float, seed: int) -> IdEmbedding:
        """The identity with the encoder's answer to noise, instead of zeros, in its negative branch."""
        kept = self._noisy.setdefault(identity, {})
        if (noise, seed) not in kept:
            uncond = self._uncond_tokens(noise, seed)
            parts = -(-identity.tokens // uncond.shape[1])  # v1 joins the tokens of several photographs
            kept.clear()  # a seed that changes at every run must not pile up keys and values
            kept[noise, seed] = replace(identity, uncond=uncond.repeat(1, parts, 1)[:, : identity.tokens])
        return kept[noise, seed]

    def _uncond_tokens(self, noise: float = 0.0, seed: int = 0) -> Tensor:
        positions = self.tower.model.config.grid**2 + 1
        device = host.load(self.encoder)
        return uncond_tokens(self.encoder.model, positions, device, noise, seed).cpu()

    def project(self, identity: IdEmbedding, device: torch.device, dtype: torch.dtype) -> tuple[SiteKV, ...]:
        """Keys and values of every site: one row per identity, then the negative branch's. Made once per identity."""
        kept = self._projected.setdefault(identity, {})
        if (device, dtype) not in kept:
            tokens = torch.cat((identity.cond, identity.uncond)).to(host.load(self.projections))
            projected = self.projections.model.project(tokens, dtype)
            kept[device, dtype] = tuple(SiteKV(kv.keys.to(device), kv.values.to(device)) for kv in projected)
        return kept[device, dtype]
