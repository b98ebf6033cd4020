"""The vision tower of EVA02-CLIP-L/14-336: a face in, a pooled vector and five hidden states out.

Sources: EVA-CLIP (arXiv 2303.15389) and EVA-02 (arXiv 2303.11331). Parameters carry timm's names
(`eva02_large_patch14_clip_336`); `read_eva_state` also understands the names of the published `.pt` file.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ForeignWeights
from .identity import Device, Operations, VisionFeatures

HIDDEN_BLOCKS = (3, 7, 11, 15, 19)  # the blocks whose outgoing streams the ID encoders read
HEAD_WIDTH = 64  # of every published EVA02 tower; a file that carries rotary tables tells its own
ROPE_BASE = 10000.0
NORM_EPS = 1e-6


@dataclass(frozen=True)
class EvaConfig:
    """Sizes of a tower. `rope_grid` is the grid (in patches a side) that the rotary positions were trained on."""

    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_width: int = 2730
    embed_dim: int = 768
    rope_grid: int = 16

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size


def rotary_table(grid: int, head_width: int, rope_grid: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (grid * grid, head_width) float32, of the rotary angles of every patch.

    The first half of a head turns with the row, the second with the column. Positions are stretched so that
    the grid spans `rope_grid` steps, whatever its own size.
    """
    axis = head_width // 2
    frequencies = ROPE_BASE ** -(torch.arange(0, axis, 2, dtype=torch.float32) / axis)
    positions = torch.arange(grid, dtype=torch.float32) / grid * rope_grid
    angles = torch.outer(positions, frequencies).repeat_interleave(2, dim=-1)  # (grid, axis)
    rows = angles[:, None].expand(grid, grid, axis)
    columns = angles[None].expand(grid, grid, axis)
    angles = torch.cat((rows, columns), dim=-1).flatten(0, 1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs of x (..., N, head_width) by their angles, cos and sin (N, head_width)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return x * cos + turned * sin


class Attention(nn.Module):
    def __init__(self, config: EvaConfig, operations: Operations, **factory: Any):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.q_proj = operations.Linear(width, width, **factory)
        self.k_proj = operations.Linear(width, width, bias=False, **factory)
        self.v_proj = operations.Linear(width, width, **factory)
        self.norm = operations.LayerNorm(width, eps=NORM_EPS, **factory)
        self.proj = operations.Linear(width, width, **factory)

    def forward(self, asking: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """asking (B, n, width), the first n of the positions x (B, N, width), ask them all -> (B, n, width)."""
        q, k, v = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, width) -> (B, heads, N, head_width)
            for projected in (self.q_proj(asking), self.k_proj(x), self.v_proj(x))
        )
        n = q.shape[2]
        x = F.scaled_dot_product_attention(rotate(q, cos[:n], sin[:n]), rotate(k, cos, sin), v)
        x = x.transpose(1, 2).flatten(2)  # (B, heads, n, head_width) -> (B, n, width)
        return self.proj(self.norm(x))


class SwiGlu(nn.Module):
    def __init__(self, config: EvaConfig, operations: Operations, **factory: Any):
        super().__init__()
        width, inner = config.width, config.mlp_width
        self.fc1_g = operations.Linear(width, inner, **factory)
        self.fc1_x = operations.Linear(width, inner, **factory)
        self.norm = operations.LayerNorm(inner, eps=NORM_EPS, **factory)
        self.fc2 = operations.Linear(inner, width, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(F.silu(self.fc1_g(x)) * self.fc1_x(x)))


class Block(nn.Module):
    def __init__(self, config: EvaConfig, operations: Operations, **factory: Any):
        super().__init__()
        self.norm1 = operations.LayerNorm(config.width, eps=NORM_EPS, **factory)
        self.attn = Attention(config, operations, **factory)
        self.norm2 = operations.LayerNorm(config.width, eps=NORM_EPS, **factory)
        self.mlp = SwiGlu(config, operations, **factory)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, only: int | None = None) -> Tensor:
        """x (B, N, width) -> the same, or what becomes of its first `only` positions, (B, only, width)."""
        normed = self.norm1(x)
        x = x[:, :only] + self.attn(normed[:, :only], normed, cos, sin)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, config: EvaConfig, operations: Operations, **factory: Any):
        super().__init__()
        patch = config.patch_size
        self.proj = operations.Conv2d(3, config.width, kernel_size=patch, stride=patch, **factory)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)  # (B, 3, H, W) -> (B, patches, width)


class EvaVisionTower(nn.Module):
    """The tower; the tables of its rotary positions, (patches, head_width) each, come with its weights."""

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(
        self,
        config: EvaConfig = EvaConfig(),
        operations: Operations = nn,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.patch_embed = PatchEmbed(config, operations, **factory)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width, **factory))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.positions, config.width, **factory))
        table = torch.zeros(config.grid**2, config.width // config.heads, **factory)
        self.register_buffer("rope_cos", table)
        self.register_buffer("rope_sin", table.clone())
        self.blocks = nn.ModuleList(Block(config, operations, **factory) for _ in range(config.depth))
        self.norm = operations.LayerNorm(config.width, eps=NORM_EPS, **factory)
        self.head = operations.Linear(config.width, config.embed_dim, **factory)

    def compute_rotary(self) -> None:
        """Replace the tables that came with the weights, which the published file has rounded to float16."""
        config = self.config
        self.rope_cos, self.rope_sin = rotary_table(config.grid, config.width // config.heads, config.rope_grid)

    @property
    def positions(self) -> int:
        """Of a hidden state: the class token and every patch."""
        return 1 + self.config.grid**2

    def forward(self, pixels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """pixels (B, 3, H, W), normalised -> pooled (B, embed_dim) and five hidden states (B, 1 + patches, width)."""
        x = self.patch_embed(pixels)
        x = torch.cat((self.cls_token.to(x).expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed.to(x)
        # The class token stands nowhere: it is turned by no angle.
        cos = F.pad(self.rope_cos.to(x), (0, 0, 1, 0), value=1.0)  # (patches, head_width) -> (1 + patches, head_width)
        sin = F.pad(self.rope_sin.to(x), (0, 0, 1, 0), value=0.0)
        hidden = []
        for index, block in enumerate(self.blocks):
            last = index == self.config.depth - 1  # of the last block, nothing but the class token is asked for
            x = block(x, cos, sin, only=1 if last else None)
            if index in HIDDEN_BLOCKS:
                hidden.append(x)
        return self.head(self.norm(x[:, 0])), tuple(hidden)

    def features(self, pixels: Tensor) -> VisionFeatures:
        """As `forward`, with the pooled vector divided by its length: what the ID encoders take."""
        pooled, hidden = self(pixels)
        return VisionFeatures(pooled / pooled.norm(dim=-1, keepdim=True), hidden)


# Names in the published file -> names here, applied in order within one key.
PUBLISHED_NAMES = (
    (r"^rope\.freqs_(cos|sin)$", r"rope_\1"),
    (r"\.q_bias$", ".q_proj.bias"),
    (r"\.v_bias$", ".v_proj.bias"),
    (r"\.inner_attn_ln\.", ".norm."),
    (r"\.ffn_ln\.", ".norm."),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)

PREFIXES = ("visual.trunk.", "visual.", "")  # a whole CLIP as open_clip saves timm's, as published, the tower alone


def _own_name(key: str) -> str:
    for pattern, name in PUBLISHED_NAMES:
        key = re.sub(pattern, name, key)
    return key


def read_eva_state(state: Mapping[str, Tensor]) -> tuple[EvaConfig, dict[str, Tensor]]:
    """Sizes and renamed parameters of a tower, from the published names or timm's; no parameter is copied.

    The published file carries its rotary tables, rounded to its own dtype; the reference vectors were made with those,
    so they are kept (EVA-CLIP's own loader computes them anew: EvaVisionTower.compute_rotary). timm's file carries
    none; they are computed. Keys of the text tower are left out.
    Raises ForeignWeights when the state is not an EVA02 vision tower.
    """
    prefix = next(prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in state) or not prefix)
    vision = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    own = {_own_name(key): value for key, value in vision.items() if ".rope." not in key}
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1_g.weight", "head.weight")
    if missing := [name for name in needed if name not in own]:
        raise ForeignWeights(
            f"These weights are not an EVA02-CLIP vision tower: {', '.join(missing)} not among {len(state)} tensors."
        )
    width, _, patch, _ = own["patch_embed.proj.weight"].shape
    grid = round((own["pos_embed"].shape[1] - 1) ** 0.5)
    head_width = own["rope_cos"].shape[-1] if "rope_cos" in own else HEAD_WIDTH
    config = EvaConfig(
        image_size=grid * patch,
        patch_size=patch,
        width=width,
        depth=1 + max(int(key.split(".")[1]) for key in own if key.startswith("blocks.")),
        heads=width // head_width,
        mlp_width=own["blocks.0.mlp.fc1_g.weight"].shape[0],
        embed_dim=own["head.weight"].shape[0],
    )
    # The pooled vector comes from further down than the hidden states; each block has tensors of its own.
    if not HIDDEN_BLOCKS[-1] + 1 < config.depth <= len(own):
        raise ForeignWeights(
            f"This vision tower has {config.depth} blocks; PuLID needs one of 24, EVA02-CLIP-L/14-336."
        )
    if "rope_cos" not in own:
        own["rope_cos"], own["rope_sin"] = rotary_table(grid, head_width, config.rope_grid)
    return config, own
