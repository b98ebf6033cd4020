"""One site the way PuLID was published: projections at every step, attention twice, the rest in float32.

Only for comparison in the bench and as an oracle: what other packs compute, written here from the paper's formulas.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pulid.attention import Fusion


def published(
    q: Tensor, base: Tensor, tokens: Tensor, to_k: Tensor, to_v: Tensor,
    heads: int, fusion: Fusion, zero_tokens: int, weight: float,
) -> Tensor:  # fmt: skip
    """q, base (B, N, C); tokens (B, T, D), one row per batch row; to_k, to_v (C, D) -> (B, N, C)."""
    if zero_tokens:
        tokens = torch.cat((tokens, tokens.new_zeros(len(tokens), zero_tokens, tokens.shape[-1])), dim=1)
    keys, values = F.linear(tokens, to_k).to(q.dtype), F.linear(tokens, to_v).to(q.dtype)
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, keys, values))
    attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    if fusion is Fusion.PLAIN:
        return base + weight * attended
    base32, attended32 = base.float(), attended.float()
    projection = (base32 * attended32).sum(-2, keepdim=True) / (base32 * base32).sum(-2, keepdim=True) * base32
    if fusion is Fusion.ORTHOGONAL:
        return (base32 + weight * (attended32 - projection)).to(q.dtype)
    share = (query @ key.transpose(-2, -1)).softmax(dim=-1).mean(dim=1)[:, :, :5].sum(dim=-1, keepdim=True)
    return (base32 + weight * (attended32 + (share - 1) * projection)).to(q.dtype)


def most_used(
    q: Tensor, base: Tensor, tokens: Tensor, to_k: Tensor, to_v: Tensor, heads: int, zero_tokens: int, weight: float
) -> Tensor:
    """`published` in ortho_v2 as the pack of older shared workflows computes it: m is one number per image."""
    tokens = torch.cat((tokens, tokens.new_zeros(len(tokens), zero_tokens, tokens.shape[-1])), dim=1)
    keys, values = F.linear(tokens, to_k).to(q.dtype), F.linear(tokens, to_v).to(q.dtype)
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, keys, values))
    attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2).float()
    base32 = base.float()
    share = (q @ keys.transpose(-2, -1)).softmax(dim=-1).mean(dim=1, keepdim=True)[:, :, :5].sum(dim=-1, keepdim=True)
    projection = (base32 * attended).sum(-2, keepdim=True) / (base32 * base32).sum(-2, keepdim=True) * base32
    return (base32 + weight * (attended + (share - 1) * projection)).to(q.dtype)
