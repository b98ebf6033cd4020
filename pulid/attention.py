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
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoders import FACE_TOKENS, TOKEN_WIDTH
from .identity import Device, Operations, Version

TINY = 1e-30  # keeps 0 / 0 out of the projection of a channel that is zero everywhere


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
    """Keys and values of one site, each (rows, T, C)."""

    keys: Tensor
    values: Tensor

    def prepare(
        self, heads: int, zero_tokens: int = 0, weight: float = 1.0, dtype: torch.dtype | None = None
    ) -> "HeadKV":
        """Split into heads, with `zero_tokens` tokens of key and value zero, and what is added times `weight`.

        dtype  that of sampling; weighted values are rounded to it once
        """
        keys, values = self.keys.to(dtype), (self.values * weight).to(dtype)
        counts = keys.new_zeros(keys.shape[1])
        if zero_tokens:
            keys, values = F.pad(keys, (0, 0, 0, 1)), F.pad(values, (0, 0, 0, 1))
            counts = F.pad(counts, (0, 1), value=math.log(zero_tokens))
        keys, values = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (keys, values))  # (rows, heads, T, dim)
        counts = counts.unsqueeze(-1)
        return HeadKV(keys, values, counts, counts * (1 - keys.shape[-1] ** 0.5), zero_tokens)


@dataclass(frozen=True, eq=False)
class HeadKV:
    """What a patch holds of one site: SiteKV.prepare.

    keys        (rows, heads, T, dim)
    values      (rows, heads, T, dim), weighted
    log_counts  (T, 1) logarithm of how many times each token counts in the softmax; added to scaled logits
    unscaling   (T, 1) added to scaled logits times 1 / scale, it gives unscaled logits plus log_counts
    zero_tokens how many tokens the last one stands for; with 0 it is one of the identity's own
    """

    keys: Tensor
    values: Tensor
    log_counts: Tensor
    unscaling: Tensor
    zero_tokens: int

    @property
    def rows(self) -> int:
        return self.keys.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._tensors)

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.keys, self.values, self.log_counts, self.unscaling

    def to(self, *args: Any, **kwargs: Any) -> "HeadKV":
        keys, values, log_counts, unscaling = (t.to(*args, **kwargs) for t in self._tensors)
        return HeadKV(keys, values, log_counts, unscaling, self.zero_tokens)


class IdProjections(nn.Module):
    """The ID adapter's projections: for each site one matrix to keys and one to values, without bias."""

    def __init__(
        self,
        widths: Sequence[int],
        token_width: int = TOKEN_WIDTH,
        operations: Operations = nn,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.widths = tuple(widths)
        self.to_k = nn.ModuleList(operations.Linear(token_width, width, **factory) for width in widths)
        self.to_v = nn.ModuleList(operations.Linear(token_width, width, **factory) for width in widths)

    def project(self, tokens: Tensor) -> tuple[SiteKV, ...]:
        """tokens (rows, T, D) -> keys and values of every site, in the dtype of the tokens."""
        return tuple(SiteKV(to_k(tokens), to_v(tokens)) for to_k, to_v in zip(self.to_k, self.to_v, strict=True))


def _heads(x: Tensor, heads: int) -> Tensor:
    """(N, C) -> (heads, N, C / heads), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)


def _elsewhere(scaled: Tensor, kv: HeadKV, scale: float, fusion: Fusion) -> Tensor:
    """(1 - m) * heads of ortho_v2: the attention that does not go to the face tokens, summed over heads.

    From the softmax of *unscaled* logits over all tokens; scaled (B, heads, T, N) are the scaled ones and log_counts.
    -> (B, N, 1), or (B, 1, 1) for SHARED_V2.
    """
    if fusion is Fusion.ORTHOGONAL_V2:
        logits = torch.add(kv.unscaling, scaled, alpha=1 / scale)
        return logits.softmax(dim=2)[:, :, FACE_TOKENS:].sum(dim=(1, 2)).unsqueeze(-1)
    headless = (scaled - kv.log_counts).sum(dim=1).div_(scale).add_(kv.log_counts)  # (B, T, N)
    elsewhere = headless.softmax(dim=1)[:, FACE_TOKENS:].sum(dim=1)
    return elsewhere.mean(dim=1).mul_(scaled.shape[1]).view(-1, 1, 1)


def fuse(
    q: Tensor,
    base: Tensor,
    kv: HeadKV,
    rows: Sequence[int],
    fusion: Fusion,
    strength: Tensor | None = None,
    mask: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """The output of a site with PuLID, (B, N, C), before `to_out`.

    q         (B, N, C) queries
    base      (B, N, C) what the site gives without PuLID
    kv        the identity's keys and weighted values
    rows      for each of the B batch rows, the row of kv it uses
    strength  0-dimensional tensor that multiplies the whole addition, for a schedule that lives on the device
    mask      (1 or B, N) where the addition applies, 0..1; the projection is made before it
    overwrite whether base may be changed, since nobody needs it afterwards; else it is left as it is

    Sums over positions are made in float32, or in float32 accumulators where a matrix product makes them.
    """
    batch, positions, _ = q.shape
    _, heads, tokens, dim = kv.keys.shape
    scale = dim**-0.5
    values = torch.stack([kv.values[row] for row in rows])  # (B, heads, T, dim)
    if strength is not None:
        values = values * strength

    # Tokens before positions: a softmax over a short last dimension is slow, on CPUs above all.
    scaled = q.new_empty(batch, heads, tokens, positions)
    for b, row in enumerate(rows):
        torch.baddbmm(kv.log_counts, kv.keys[row], _heads(q[b], heads).transpose(1, 2), alpha=scale, out=scaled[b])
    attention = scaled.softmax(dim=2)  # (B, heads, T, N)

    where = None if mask is None else mask.unsqueeze(-1)  # (1 or B, N, 1)
    share = None if fusion is Fusion.PLAIN else _projected_share(base, attention, values)
    if mask is not None:
        attention = attention * mask[:, None, None]
    attended = torch.bmm(attention.flatten(0, 1).transpose(1, 2), values.flatten(0, 1))  # (B * heads, N, dim)
    attended = attended.unflatten(0, (batch, heads)).transpose(1, 2)  # (B, N, heads, dim)
    split = base.unflatten(-1, (heads, dim))
    if share is None:
        return (split + attended).flatten(2)
    taken, times = share if where is None else share * where, 1.0  # (B, 1 or N, C)
    if fusion is not Fusion.ORTHOGONAL:
        taken, times = taken * _elsewhere(scaled, kv, scale, fusion), 1 / heads
    # All that is added, and then base once: in half precision, it is a rounding at the size of base that shows.
    added = torch.empty_like(split)
    torch.addcmul(attended, split, taken.unflatten(-1, (heads, dim)), value=-times, out=added)
    return added.add_(split).flatten(2)


def _projected_share(base: Tensor, attention: Tensor, values: Tensor) -> Tensor:
    """sum_n base * A / sum_n base^2 per image and channel, (B, 1, C), where A = attention @ values.

    base (B, N, C), attention (B, heads, T, N), values (B, heads, T, dim). The sum goes through attention @ base, which
    is as small as the tokens are few; means instead of sums keep it inside float16's range.
    """
    batch, positions, channels = base.shape
    heads = values.shape[1]
    through = torch.empty_like(values)
    for b in range(batch):
        through[b].baddbmm_(attention[b], _heads(base[b], heads), beta=0, alpha=1 / positions)
    dot = (through * values).sum(dim=2, dtype=torch.float32).view(batch, 1, channels)
    mean_square = torch.rsub(_sum_of_squares(base), TINY, alpha=-1 / positions)  # TINY + sum / N, in one pass
    return torch.div(dot, mean_square, out=base.new_empty(batch, 1, channels))


def _sum_of_squares(x: Tensor) -> Tensor:
    """(B, N, C) -> (B, 1, C), summed over N in float32, or float64 for such an x, without a float32 copy of it."""
    if x.dtype in (torch.float32, torch.float64):
        return x.square().sum(dim=1, keepdim=True)  # many times faster than vector_norm on a CPU
    return torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).square()


Sampling = Literal["area", "bilinear"]


def mask_to_tokens(mask: Tensor, grid: tuple[int, int], sampling: Sampling = "area") -> Tensor:
    """mask (M, H, W) 0..1 -> (M, h * w), one value for each image token.

    sampling  "area": the covered share of the picture area that the token stands for.
              "bilinear": read at the middle of that area, as the pack of older shared workflows does.
    """
    return F.interpolate(mask.unsqueeze(1), size=grid, mode=sampling).flatten(1)
