"""The values that flow from a photograph to the attention sites.

Letters used for sizes everywhere in this pack:
    B images or batch rows    N positions (image tokens)    C channels of a site    H, W pixels
    T ID tokens               R identities                  D width of an ID token (2048)
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

Version = Literal["v1", "v1.1"]
Operations = Any  # what a network takes Linear, LayerNorm and Conv2d from: torch.nn, or ComfyUI's casting layers
Device = torch.device | str | None

PREVIEWS = 8  # faces that an identity shows at most
PREVIEW_SIZE = 128  # px


@dataclass(frozen=True, eq=False)
class FaceCrop:
    """One chosen face, aligned, with the recogniser's view of the same face.

    pixels     (3, 512, 512) float32 RGB, 0..1, on the CPU
    arcface    (512,) float32, the recogniser's embedding as it comes (not normalised)
    box        x0, y0, x1, y1 in pixels of the photograph that was looked at
    landmarks  (5, 2) float64 x, y: left eye, right eye, nose, left and right corner of the mouth
    score      the detector's confidence, 0..1
    """

    pixels: Tensor
    arcface: Tensor
    box: tuple[float, float, float, float]
    landmarks: Tensor
    score: float


@dataclass(frozen=True, eq=False)
class VisionFeatures:
    """What the vision tower sees in B faces.

    pooled  (B, 768), unit length
    hidden  5 x (B, 577, 1024), class token first: the streams leaving blocks 3, 7, 11, 15 and 19
    """

    pooled: Tensor
    hidden: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class IdEmbedding:
    """The ID tokens of R identities, ready for the projections.

    cond     (R, T, D) float32: tokens for the positive branch, one row per identity
    uncond   (1, T, D) float32: the encoder's answer to zeros, for the negative branch
    version  which encoder made them
    encoder  fingerprint of that encoder's weights
    preview  (1 .. PREVIEWS, PREVIEW_SIZE, PREVIEW_SIZE, 3) uint8 RGB on the CPU, from preview.thumbnails: the
             faces it was made of, for people to look at; None where nobody kept them
    arcface  (R, 512) float32 of unit length on the CPU: each person as the recogniser sees them, from
             people.mean_direction; None for an identity that was calculated, or kept before there was this
    """

    cond: Tensor
    uncond: Tensor
    version: Version
    encoder: str
    preview: Tensor | None = None
    arcface: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.cond.shape[1]

    @cached_property
    def people(self) -> tuple["IdEmbedding", ...]:
        """An identity of one row for each of the R, always the same ones, so that what is made of them is kept."""
        directions = [None] * len(self.cond) if self.arcface is None else self.arcface.split(1)
        rows = zip(self.cond.split(1), directions, strict=True)
        return tuple(replace(self, cond=cond, preview=None, arcface=arcface) for cond, arcface in rows)
