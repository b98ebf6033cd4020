"""The two networks that turn a face into ID tokens: IdEncoder (PuLID v1, an MLP) and IdFormer (v1.1, a resampler).

Source: PuLID (arXiv 2404.16022) and its published weights, whose parameter names are kept.
Both take x = ArcFace (512) joined with the unit-length pooled vision vector (768), and five hidden states.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .identity import Device, Operations

ARCFACE_WIDTH = 512
POOLED_WIDTH = 768
FACE_WIDTH = ARCFACE_WIDTH + POOLED_WIDTH
HIDDEN_WIDTH = 1024
TOKEN_WIDTH = 2048
STAGES = 5  # hidden states of the vision tower
POSITIONS = 577  # of each: the class token and 24 x 24 patches
FACE_TOKENS = 5  # tokens made from x; the part of a v1 embedding that further photographs of one person give


def _mapping(wide_in: int, wide_out: int, operations: Operations, **factory: Any) -> nn.Sequential:
    """Three linears with LayerNorm and LeakyReLU between them: the only kind of MLP in both encoders."""
    return nn.Sequential(
        operations.Linear(wide_in, HIDDEN_WIDTH, **factory),
        operations.LayerNorm(HIDDEN_WIDTH, **factory),
        nn.LeakyReLU(),
        operations.Linear(HIDDEN_WIDTH, HIDDEN_WIDTH, **factory),
        operations.LayerNorm(HIDDEN_WIDTH, **factory),
        nn.LeakyReLU(),
        operations.Linear(HIDDEN_WIDTH, wide_out, **factory),
    )


class IdEncoder(nn.Module):
    """PuLID v1: five tokens from x, and one from each hidden state."""

    def __init__(self, operations: Operations = nn, device: Device = None, dtype: torch.dtype | None = None):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.body = _mapping(FACE_WIDTH, FACE_TOKENS * TOKEN_WIDTH, operations, **factory)
        for stage in range(STAGES):
            self.add_module(f"mapping_{stage}", _mapping(HIDDEN_WIDTH, TOKEN_WIDTH, operations, **factory))
            self.add_module(f"mapping_patch_{stage}", _mapping(HIDDEN_WIDTH, TOKEN_WIDTH, operations, **factory))

    def forward(self, x: Tensor, hidden: Sequence[Tensor]) -> Tensor:
        """x (B, 1280), hidden 5 x (B, 1 + patches, 1024), class token first -> (B, 10, 2048)."""
        tokens = [self.body(x).unflatten(-1, (FACE_TOKENS, TOKEN_WIDTH))]
        for stage, stream in enumerate(hidden):
            of_class = self.get_submodule(f"mapping_{stage}")(stream[:, :1])
            *inner, last = self.get_submodule(f"mapping_patch_{stage}").children()
            patches = nn.Sequential(*inner)(stream[:, 1:])
            of_patches = last(patches.mean(dim=1, keepdim=True))  # the mean of a linear map, at a fraction of its work
            tokens.append(of_class + of_patches)
        return torch.cat(tokens, dim=1)


class PerceiverAttention(nn.Module):
    """Latents ask; context and latents together answer."""

    def __init__(self, width: int, heads: int, operations: Operations, **factory: Any):
        super().__init__()
        self.heads = heads
        self.norm1 = operations.LayerNorm(width, **factory)
        self.norm2 = operations.LayerNorm(width, **factory)
        self.to_q = operations.Linear(width, width, bias=False, **factory)
        self.to_kv = operations.Linear(width, 2 * width, bias=False, **factory)
        self.to_out = operations.Linear(width, width, bias=False, **factory)

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        """context (B, M, width), latents (B, L, width) -> (B, L, width)."""
        latents = self.norm2(latents)
        k, v = self.to_kv(torch.cat((self.norm1(context), latents), dim=1)).chunk(2, dim=-1)
        q, k, v = (self._heads(x) for x in (self.to_q(latents), k, v))
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, L, head_width)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, M, width) -> (B, heads, M, head_width)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _feed_forward(width: int, operations: Operations, **factory: Any) -> nn.Sequential:
    return nn.Sequential(
        operations.LayerNorm(width, **factory),
        operations.Linear(width, 4 * width, bias=False, **factory),
        nn.GELU(),
        operations.Linear(4 * width, width, bias=False, **factory),
    )


class IdFormer(nn.Module):
    """PuLID v1.1: 32 learned queries look at the face's own tokens and at the five hidden states in turn."""

    QUERIES = 32
    LAYERS_PER_STAGE = 2
    HEADS = 16

    def __init__(self, operations: Operations = nn, device: Device = None, dtype: torch.dtype | None = None):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = HIDDEN_WIDTH
        self.latents = nn.Parameter(torch.zeros(1, self.QUERIES, width, **factory))
        self.proj_out = nn.Parameter(torch.zeros(width, TOKEN_WIDTH, **factory))
        self.id_embedding_mapping = _mapping(FACE_WIDTH, FACE_TOKENS * width, operations, **factory)
        for stage in range(STAGES):
            self.add_module(f"mapping_{stage}", _mapping(HIDDEN_WIDTH, width, operations, **factory))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                (
                    PerceiverAttention(width, self.HEADS, operations, **factory),
                    _feed_forward(width, operations, **factory),
                )
            )
            for _ in range(STAGES * self.LAYERS_PER_STAGE)
        )

    def forward(self, x: Tensor, hidden: Iterable[Tensor]) -> Tensor:
        """x (B, 1280) or, for P photographs of one person, (B, P, 1280); hidden 5 x (B, P * positions, 1024).

        Returns (B, 32, 2048), however many photographs there are. `hidden` may be made stage by stage.
        """
        photographs = x.unsqueeze(1) if x.ndim == 2 else x
        # (B, P, 1280) -> (B, P * 5, 1024)
        face = self.id_embedding_mapping(photographs).unflatten(-1, (FACE_TOKENS, HIDDEN_WIDTH)).flatten(1, 2)
        latents = torch.cat((self.latents.to(face).expand(face.shape[0], -1, -1), face), dim=1)
        for stage, stream in enumerate(hidden):
            context = torch.cat((face, self.get_submodule(f"mapping_{stage}")(stream)), dim=1)
            first = stage * self.LAYERS_PER_STAGE
            for layer in self.layers[first : first + self.LAYERS_PER_STAGE]:
                attention, feed_forward = layer.children()
                latents = latents + attention(context, latents)
                latents = latents + feed_forward(latents)
        return latents[:, : self.QUERIES] @ self.proj_out.to(latents)


ENCODERS: dict[str, type[IdEncoder] | type[IdFormer]] = {"v1": IdEncoder, "v1.1": IdFormer}
