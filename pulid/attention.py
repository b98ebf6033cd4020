"""What PuLID adds to one cross-attention site, and the keys and values it needs, computed once.

Source: PuLID (arXiv 2404.16022), the authors' attention processors. Written so that an image token costs little more
than reading q and writing the output:
  - ID tokens do not depend on the image, so their keys and values are made before sampling;
  - Z appended zero tokens all have logit 0 and value 0, so one token that counts Z times stands for them;
  - the weight is folded into the values, since all that is added is linear in them;
  - the projection's sums over positions go through the T attention rows, never through an (N, C) product.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoders import FACE_TOKENS, TOKEN_WIDTH
from .identity import Version

TINY = 1e-30  # keeps 0 / 0 out of the projection on a channel that is zero everywhere


class Fusion(Enum):
    """How the ID attention A joins what a site gives without it; P is A's projection onto that, per channel."""

    PLAIN = "none"  # base + A
    ORTHOGONAL = "ortho"  # base + (A - P)
    ORTHOGONAL_V2 = "ortho_v2"  # base + (A + (m - 1) P), m the attention to the face tokens, mean over heads
    SHARED_V2 = "ortho_v2 of older shared workflows"  # m is one number per image: headless, mean over positions


@dataclass(frozen=True)
class Method:
    """A named way to fuse: `zero_tokens` makes the picture more editable and less alike as it grows."""

    fusion: Fusion
    zero_tokens: int


METHODS: dict[str, dict[Version, Method]] = {
    "fidelity": {"v1": Method(Fusion.ORTHOGONAL_V2, 8), "v1.1": Method(Fusion.ORTHOGONAL_V2, 20)},
    "extreme style": {"v1": Method(Fusion.ORTHOGONAL, 16), "v1.1": Method(Fusion.ORTHOGONAL, 16)},
    "neutral": {"v1": Method(Fusion.PLAIN, 0), "v1.1": Method(Fusion.PLAIN, 0)},
}


@dataclass(frozen=True, eq=False)
class SiteKV:
    """Keys and values of one site.

    keys, values  (rows, T, C)
    log_counts    (T,) logarithm of how many times each token counts in the softmax
    """

    keys: Tensor
    values: Tensor
    log_counts: Tensor

    @property
    def channels(self) -> int:
        return self.keys.shape[-1]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.keys, self.values, self.log_counts))

    def with_zero_tokens(self, count: int) -> "SiteKV":
        """As if `count` tokens with key and value zero were appended."""
        if count == 0:
            return self
        return SiteKV(
            F.pad(self.keys, (0, 0, 0, 1)),
            F.pad(self.values, (0, 0, 0, 1)),
            F.pad(self.log_counts, (0, 1), value=math.log(count)),
        )

    def scaled(self, weight: float) -> "SiteKV":
        """Values times `weight`: the whole addition of the site grows with it."""
        return replace(self, values=self.values * weight)

    def to(self, *args, **kwargs) -> "SiteKV":
        return SiteKV(*(t.to(*args, **kwargs) for t in (self.keys, self.values, self.log_counts)))


class IdProjections(nn.Module):
    """The ID adapter's projections: for each site one matrix to keys and one to values, without bias."""

    def __init__(self, widths: Sequence[int], token_width=TOKEN_WIDTH, operations=nn, device=None, dtype=None):
        super().__init__()
        factory = {"bias": False, "device": device, "dtype": dtype}
        self.widths = tuple(widths)
        self.to_k = nn.ModuleList(operations.Linear(token_width, width, **factory) for width in widths)
        self.to_v = nn.ModuleList(operations.Linear(token_width, width, **factory) for width in widths)

    def project(self, tokens: Tensor, dtype: torch.dtype | None = None) -> tuple[SiteKV, ...]:
        """tokens (rows, T, D) -> keys and values of every site, kept in `dtype` (that of sampling)."""
        log_counts = torch.zeros(tokens.shape[1], device=tokens.device, dtype=dtype or tokens.dtype)
        return tuple(
            SiteKV(to_k(tokens).to(log_counts), to_v(tokens).to(log_counts), log_counts)
            for to_k, to_v in zip(self.to_k, self.to_v, strict=True)
        )


def _heads(x: Tensor, heads: int) -> Tensor:
    """(N, C) -> (heads, N, C / heads), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)


def _leaning(kv: SiteKV, scaled: Tensor, scale: float, fusion: Fusion) -> Tensor:
    """m - 1 of ortho_v2: how much of the attention goes to the face tokens, less one.

    Taken from the softmax of *unscaled* logits over all tokens. scaled (B, heads, N, T) holds the scaled ones plus
    log_counts. -> (B, N, 1), or (B, 1, 1) for SHARED_V2.
    """
    if fusion is Fusion.ORTHOGONAL_V2:
        logits = torch.add(kv.log_counts * (1 - 1 / scale), scaled, alpha=1 / scale)
        mean = logits.softmax(dim=-1)[..., :FACE_TOKENS].mean(dim=(1, 3))  # over heads and face tokens
        return mean.mul_(FACE_TOKENS).sub_(1).unsqueeze(-1)
    headless = (scaled - kv.log_counts).sum(dim=1).div_(scale).add_(kv.log_counts)  # (B, N, T)
    mean = headless.softmax(dim=-1)[..., :FACE_TOKENS].mean(dim=(1, 2), keepdim=True)  # over positions too
    return mean.mul_(FACE_TOKENS).sub_(1)


def fuse(
    q: Tensor,
    base: Tensor,
    kv: SiteKV,
    rows: Sequence[int],
    heads: int,
    fusion: Fusion,
    strength: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The output of a site with PuLID, (B, N, C), before `to_out`; `base` is left as it is.

    q         (B, N, C) queries
    base      (B, N, C) what the site gives without PuLID
    kv        the identity's keys and (weighted) values
    rows      for each of the B batch rows, the row of kv it uses
    strength  0-dimensional tensor that multiplies the whole addition, for a schedule that lives on the device
    mask      (1 or B, N) where the addition applies, 0..1; the projection is made before it

    Sums over positions are made in float32, or in float32 accumulators where a matrix product makes them.
    """
    batch, positions, channels = q.shape
    scale = (channels // heads) ** -0.5
    keys = [_heads(kv.keys[row], heads).transpose(1, 2) for row in rows]  # each (heads, dim, T)
    values = torch.stack([_heads(kv.values[row], heads) for row in rows])  # (B, heads, T, dim)
    if strength is not None:
        values = values * strength

    scaled = q.new_empty(batch, heads, positions, kv.log_counts.shape[0])
    for row in range(batch):
        torch.baddbmm(kv.log_counts, _heads(q[row], heads), keys[row], alpha=scale, out=scaled[row])
    attention = scaled.softmax(dim=-1)  # (B, heads, N, T)

    where = None if mask is None else mask.unsqueeze(-1)  # (1 or B, N, 1)
    if fusion is Fusion.PLAIN:
        out = base.clone()
    else:
        # dot_c = mean over n of base * A; A = attention @ values, so the mean goes through attention^T @ base.
        through = base.new_empty(batch, heads, kv.log_counts.shape[0], channels // heads)
        for row in range(batch):
            transposed = attention[row].transpose(1, 2)
            through[row].baddbmm_(transposed, _heads(base[row], heads), beta=0, alpha=1 / positions)
        dot = (through * values).sum(dim=2, dtype=torch.float32).view(batch, 1, channels)
        norm = torch.linalg.vector_norm(base, dim=1, keepdim=True, dtype=torch.float32)  # (B, 1, C)
        share = (dot * positions / norm.square().add_(TINY)).to(base.dtype)
        if fusion is Fusion.ORTHOGONAL and where is None:
            out = torch.addcmul(base, base, share, value=-1)
        elif fusion is Fusion.ORTHOGONAL:
            out = torch.addcmul(base, base * share, where, value=-1)
        else:
            leaning = _leaning(kv, scaled, scale, fusion)
            out = torch.addcmul(base, base * share, leaning if where is None else leaning * where)

    if mask is not None:
        attention = attention * mask[:, None, :, None]
    for row in range(batch):
        _heads(out[row], heads).baddbmm_(attention[row], values[row])
    return out


def mask_to_tokens(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """mask (M, H, W) 0..1 -> (M, h * w): the covered share of the picture area that each image token stands for."""
    return F.interpolate(mask.unsqueeze(1), size=grid, mode="area").flatten(1)


def token_grid(positions: int, latent: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the N image tokens of a site, from the latent's height and width.

    Each level of the UNet halves the latent and rounds up, so odd sizes are exact too.
    Raises ValueError when no level of this latent has N tokens.
    """
    height, width = latent
    while height * width > positions:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != positions:
        raise ValueError(f"No level of a {latent[0]} x {latent[1]} latent has {positions} image tokens.")
    return height, width
