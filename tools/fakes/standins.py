"""Makes stand-in weight files on the spot, for tests and the demo: real names, formats and sizes, random weights.

    make_pulid(path, layout="v1.1")
    make_eva(path, layout="published")

The same seed gives the same weights in every layout and container. Outputs stay finite: matrices are scaled by
fan_in ** -0.5, norms lie near 1.
"""

import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...pulid.encoders import ENCODERS
from ...pulid.eva import EvaConfig, EvaVisionTower, rotary_table
from ...pulid.sites import SITES, file_index

PulidLayout = Literal["v1-converted", "v1-published", "v1.1"]
EvaLayout = Literal["published", "open_clip", "timm"]
Shapes = Mapping[str, tuple[int, ...]]

SDXL_WIDTHS = tuple(site.channels for site in SITES)
TOKEN_WIDTH = 2048

# layout -> version, prefix of the encoder, name of a site's projection (index, k or v)
PULID_LAYOUTS = {
    "v1-converted": ("v1", "image_proj", "ip_adapter.{}.to_{}_ip.weight"),
    "v1-published": ("v1", "id_adapter", "id_adapter_attn_layers.{}.id_to_{}.weight"),
    "v1.1": ("v1.1", "id_adapter", "id_adapter_attn_layers.{}.id_to_{}.weight"),
}

FULL_EVA = EvaConfig()
SMALL_EVA = EvaConfig(image_size=56, width=64, heads=1, mlp_width=170, embed_dim=48)

# timm's names, which are the tower's own -> names in the published file
PUBLISHED_EVA_NAMES = (
    (r"\.attn\.([qv])_proj\.bias$", r".attn.\1_bias"),
    (r"\.attn\.norm\.", ".attn.inner_attn_ln."),
    (r"\.mlp\.norm\.", ".mlp.ffn_ln."),
    (r"\.mlp\.fc1_g\.", ".mlp.w1."),
    (r"\.mlp\.fc1_x\.", ".mlp.w2."),
    (r"\.mlp\.fc2\.", ".mlp.w3."),
)

# Text tower of EVA02-CLIP-L: width, layers, vocabulary, context
FULL_TEXT = (768, 12, 49408, 77)
SMALL_TEXT = (32, 2, 100, 8)

RING = 1_000_003  # values of noise; prime, so that no row of a matrix repeats another


def make_pulid(
    path: Path,
    layout: PulidLayout = "v1-converted",
    width_scale: float = 1.0,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Path:
    """Write a PuLID file: safetensors or, when `path` ends otherwise, a pickle (nested, in the converted layout).

    width_scale  width of the sites, relative to SDXL
    """
    state = pulid_state(layout, width_scale, dtype, seed)
    if Path(path).suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(_nested(state) if layout == "v1-converted" else state, path)
    return Path(path)


def make_eva(
    path: Path, layout: EvaLayout = "published", small: bool = False, dtype: torch.dtype = torch.float16, seed: int = 0
) -> Path:
    """Write an EVA02-CLIP file: a pickle with a text tower as published; timm's safetensors, with one from open_clip.

    small  a tower of width 64 for images of 56 pixels instead of EVA02-CLIP-L/14-336
    """
    state = eva_state(layout, small, dtype, seed)
    if layout == "published":
        torch.save(state, path)
    else:
        save_file(state, path)
    return Path(path)


def pulid_state(
    layout: PulidLayout, width_scale: float = 1.0, dtype: torch.dtype = torch.float16, seed: int = 0
) -> dict[str, Tensor]:
    """Tensors of a PuLID file, by their names in it."""
    version, prefix, projection = PULID_LAYOUTS[layout]
    shapes = _shapes(ENCODERS[version](device="meta"))
    names = {name: f"{prefix}.{name}" for name in shapes}
    for site, channels in enumerate(SDXL_WIDTHS):
        for half in "kv":
            shapes[f"{site}.{half}"] = (round(channels * width_scale), TOKEN_WIDTH)
            names[f"{site}.{half}"] = projection.format(file_index(site), half)
    return {names[name]: tensor for name, tensor in random_state(shapes, dtype, seed).items()}


def eva_state(
    layout: EvaLayout, small: bool = False, dtype: torch.dtype = torch.float16, seed: int = 0
) -> dict[str, Tensor]:
    """Tensors of an EVA02-CLIP file, by their names in it."""
    config = SMALL_EVA if small else FULL_EVA
    shapes = _shapes(EvaVisionTower(config, device="meta"))
    tower = random_state({name: shape for name, shape in shapes.items() if "rope" not in name}, dtype, seed)
    if layout == "timm":
        return tower
    text = random_state(_text_shapes(*(SMALL_TEXT if small else FULL_TEXT), config.embed_dim), dtype, seed)
    if layout == "open_clip":
        return {f"visual.trunk.{name}": tensor for name, tensor in tower.items()} | text
    tables = rotary_table(config.grid, config.width // config.heads, config.rope_grid)
    rope = {"freqs_cos": tables[0].to(dtype), "freqs_sin": tables[1].to(dtype)}  # shared by all places, as published
    places = ["rope", *(f"blocks.{block}.attn.rope" for block in range(config.depth))]
    state = {f"visual.{_published(name)}": tensor for name, tensor in tower.items()}
    state |= {f"visual.{place}.{part}": table for place in places for part, table in rope.items()}
    return state | text


def random_state(shapes: Shapes, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Random tensors of these shapes. Each is cut, at a place that its name decides, from one ring of noise."""
    noise = torch.randn(RING, generator=torch.Generator().manual_seed(seed)).repeat(2)
    return {name: _random_tensor(name, shape, noise, dtype) for name, shape in shapes.items()}


def _random_tensor(name: str, shape: tuple[int, ...], noise: Tensor, dtype: torch.dtype) -> Tensor:
    length = math.prod(shape)
    start = zlib.crc32(name.encode()) % RING
    values = noise[start : start + min(length, RING)]
    if len(shape) > 1:
        fan_in = math.prod(shape[1:]) if shape[0] > 1 else shape[-1]  # latents and embeddings lead with a 1
        values = values * fan_in**-0.5
    else:
        values = 0.1 * values + (1 if name.endswith("weight") else 0)
    values = values.to(dtype)
    if length > RING:
        values = values.repeat(-(-length // RING))[:length].clone()  # a view would keep, and save, the rest as well
    return values.view(shape)


def _shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _nested(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    tree: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        branch, leaf = name.split(".", 1)
        tree.setdefault(branch, {})[leaf] = tensor
    return tree


def _published(name: str) -> str:
    for pattern, replacement in PUBLISHED_EVA_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _text_shapes(width: int, layers: int, vocabulary: int, context: int, embed_dim: int) -> dict[str, tuple[int, ...]]:
    shapes = {
        "logit_scale": (),
        "text.positional_embedding": (context, width),
        "text.text_projection": (width, embed_dim),
        "text.token_embedding.weight": (vocabulary, width),
        "text.ln_final.weight": (width,),
        "text.ln_final.bias": (width,),
    }
    layer = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
    }
    for index in range(layers):
        shapes |= {f"text.transformer.resblocks.{index}.{name}": shape for name, shape in layer.items()}
    return shapes
