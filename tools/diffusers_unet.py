"""PuLID on diffusers' SDXL UNet: the second oracle of the whole network, and what the demo runs where no ComfyUI is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from ..pulid.attention import Fusion, HeadKV, SiteKV, fuse

if TYPE_CHECKING:  # it takes seconds to import
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention


def sdxl_config(model_channels: int = 320) -> dict[str, Any]:
    """SDXL's UNet in diffusers' terms, at this width; heads of 64."""
    return {
        "sample_size": 128,
        "block_out_channels": tuple(model_channels * level for level in (1, 2, 4)),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        # diffusers' name for the number of heads
        "attention_head_dim": tuple(model_channels * level // 64 for level in (1, 2, 4)),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }


class SiteProcessor:
    """diffusers' contract for one attention, with PuLID fused in before `to_out`."""

    def __init__(self, kv: HeadKV, rows: Sequence[int], fusion: Fusion) -> None:
        self.kv, self.rows, self.fusion = kv, rows, fusion

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        q = attn.to_q(hidden_states)
        k, v = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        split = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
        base = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        out = fuse(q, base, self.kv, self.rows, self.fusion)
        return attn.to_out[1](attn.to_out[0](out))


def sites(unet: UNet2DConditionModel) -> list[str]:
    """Names of the cross-attentions in checkpoint order, which is the order of diffusers' processors."""
    return [name for name in unet.attn_processors if name.endswith("attn2.processor")]


def widths(unet: UNet2DConditionModel) -> list[int]:
    """Channels of each cross-attention, in checkpoint order."""
    return [unet.get_submodule(name.removesuffix(".processor")).to_k.out_features for name in sites(unet)]


def patch(
    unet: UNet2DConditionModel, site_kvs: Sequence[SiteKV], rows: Sequence[int],
    fusion: Fusion, zero_tokens: int, weight: float,
) -> None:  # fmt: skip
    """Put PuLID on all cross-attentions of the UNet; `rows` says which row of the keys each batch row uses."""
    processors = dict(unet.attn_processors)
    for name, kv in zip(sites(unet), site_kvs, strict=True):
        heads = unet.get_submodule(name.removesuffix(".processor")).heads
        processors[name] = SiteProcessor(kv.prepare(heads, zero_tokens, weight), rows, fusion)
    unet.set_attn_processor(processors)
