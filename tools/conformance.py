"""Compares this pack with a folder of reference vectors, made with the authors' own code.

    python3 run.py conformance FOLDER

One line per vector: the largest error, relative to the standard deviation of the reference. Exit code 1 where one is
above its tolerance. Nothing about a particular folder is built in: the seed of weights that are drawn and not stored
is read from seed.json, every dimension from the files.
"""

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ..pulid import encode, encoders, eva, faces
from ..pulid.attention import Fusion, IdProjections, SiteKV, fuse, mask_to_tokens
from . import TOOLS
from . import arguments as command_line

# Where the tests look; beside the repository unless said otherwise.
FOLDER = Path(os.environ.get("PULID_REFERENCE") or Path(__file__).parents[2] / "shared" / "reference")

TOLERANCE = 1e-5
HIDDEN_TOLERANCE = 1e-4  # of the vision tower
UNET_TOLERANCE = 2e-5
GREY_LEVEL = 1.0
FLOAT16_STEP = 2.0**-10  # relative spacing of what is stored in float16

MODES = {  # name in the files: fusion, zero tokens
    "fidelity": (Fusion.ORTHOGONAL_V2, 8),
    "extreme_style": (Fusion.ORTHOGONAL, 16),
    "none": (Fusion.PLAIN, 0),
}
SHARED_MODES = {"fidelity": (Fusion.SHARED_V2, 8), "style": (Fusion.ORTHOGONAL, 16), "neutral": (Fusion.PLAIN, 0)}
Attend = Callable[..., Tensor]  # attention.fuse, or what stands in for it


@dataclass(frozen=True)
class Line:
    vector: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # False for NaN

    def __str__(self) -> str:
        return f"{'ok  ' if self.holds else 'FAIL'} {self.error:9.2e} (at most {self.tolerance:.0e})  {self.vector}"


def relative(ours: Tensor, reference: Tensor) -> float:
    """Largest error over the reference's standard deviation; infinite where the shapes differ."""
    if ours.shape != reference.shape:
        return float("inf")
    ours, reference = ours.cpu().double(), reference.cpu().double()
    return ((ours - reference).abs().max() / reference.std()).item()


class Reference:
    """A folder of reference vectors."""

    def __init__(self, folder: Path, device: str = "cpu"):
        self.folder, self.device = folder, device

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors", self.device)

    def json(self, name: str) -> dict:
        return json.loads((self.folder / f"{name}.json").read_text())

    @cached_property
    def seed(self) -> int:
        return self.json("seed")["seed"]


def draw(shapes: Mapping[str, tuple[int, ...]], seed: int | str) -> dict[str, Tensor]:
    """The weights that a folder names by seed, as its README lays down: the same names and shapes, the same tensors."""
    state = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        tensor = torch.randn(tuple(shape), generator=generator)
        if name.rpartition(".")[2] in ("latents", "proj_out"):
            tensor *= shape[-1] ** -0.5
        elif tensor.ndim > 1:
            tensor *= tensor[0].numel() ** -0.5
        else:
            tensor = 0.1 * tensor + name.endswith("weight")
        state[name] = tensor
    return state


def vision_tower(reference: Reference) -> Iterator[Line]:
    config, state = eva.read_eva_state(reference.tensors("eva_small_weights"))
    tower = eva.EvaVisionTower(config, device="meta")
    tower.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    vectors = reference.tensors("eva_small_vectors")
    pooled, hidden = tower(vectors["pixels"])
    yield Line("vision tower, pooled", relative(pooled, vectors["pooled"]), TOLERANCE)
    for index, stream in enumerate(hidden):
        yield Line(f"vision tower, hidden {index}", relative(stream, vectors[f"hidden.{index}"]), HIDDEN_TOLERANCE)


def id_encoders(reference: Reference) -> Iterator[Line]:
    shapes, vectors = reference.json("id_encoder_shapes"), reference.tensors("id_encoders")
    for version, prefix in (("v1", "v1"), ("v1.1", "v1_1")):
        encoder = encoders.ENCODERS[version](device="meta")
        encoder.load_state_dict(draw(shapes[prefix], reference.seed), assign=True)
        for name, expected in vectors.items():
            if not name.startswith((f"{prefix}.cond.", f"{prefix}.uncond")):
                continue
            x, hidden = _encoder_input(name.removeprefix(f"{prefix}."), vectors)
            yield Line(f"ID encoder {version}, {name}", relative(encoder(x, hidden), expected), TOLERANCE)


def _encoder_input(name: str, vectors: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    def identity(index: int) -> tuple[Tensor, list[Tensor]]:
        stages = [vectors[f"identity.{index}.hidden.{stage}"] for stage in range(encoders.STAGES)]
        return vectors[f"identity.{index}.x"], stages

    if name == "uncond":
        x, hidden = identity(0)
        return torch.zeros_like(x), [torch.zeros_like(stream) for stream in hidden]
    which = name.removeprefix("cond.")
    if not which.endswith("_together"):
        return identity(int(which))
    xs, hiddens = zip(*map(identity, range(int(which.split("_")[1]))), strict=True)
    return torch.stack(xs, dim=1), [torch.cat(streams, dim=1) for streams in zip(*hiddens, strict=True)]


def _host_attention(site: Mapping[str, Tensor], heads: int) -> Tensor:
    split = (site[name].unflatten(-1, (heads, -1)).transpose(1, 2) for name in "qkv")
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


def _site_kv(site: Mapping[str, Tensor], tokens: Tensor) -> SiteKV:
    projections = IdProjections([site["to_k"].shape[0]], site["to_k"].shape[1], device="meta")
    projections.load_state_dict({"to_k.0.weight": site["to_k"], "to_v.0.weight": site["to_v"]}, assign=True)
    return projections.project(tokens)[0]


def attention_official(reference: Reference, attend: Attend = fuse) -> Iterator[Line]:
    site = reference.tensors("attention_official")
    heads = int(site["heads"])
    base = _host_attention(site, heads)
    yield Line("attention, unpatched", relative(base, site["out.unpatched"]), TOLERANCE)
    for name, expected in site.items():
        if not name.startswith("out.") or name == "out.unpatched":
            continue
        _, mode, tokens, scale = name.split(".", 3)
        fusion, zero_tokens = MODES[mode]
        kv = _site_kv(site, site[f"tokens.{tokens}"]).prepare(heads, zero_tokens, float(scale.removeprefix("scale_")))
        out = attend(site["q"], base, kv, range(len(base)), fusion)
        yield Line(f"attention, {name.removeprefix('out.')}", relative(out, expected), TOLERANCE)


def attention_shared_workflows(reference: Reference, attend: Attend = fuse) -> Iterator[Line]:
    site = reference.tensors("attention_shared_workflows")
    heads = int(site["heads"])
    base = _host_attention(site, heads)
    yield Line("shared workflows, unpatched", relative(base, site["out.unpatched"]), TOLERANCE)
    height, width = site["mask"].shape[-2:]
    rows = round((base.shape[1] * height / width) ** 0.5)
    mask = mask_to_tokens(site["mask"], (rows, base.shape[1] // rows), "bilinear")
    negative_first = [1] * (len(base) // 2) + [0] * (len(base) // 2)
    for mode, (fusion, zero_tokens) in SHARED_MODES.items():
        kv = _site_kv(site, torch.cat((site["cond"], site["uncond"]))).prepare(heads, zero_tokens, 0.8)
        for name, where in ((f"out.{mode}", None), (f"out.{mode}.mask", mask)):
            out = attend(site["q"], base, kv, negative_first, fusion, mask=where)
            yield Line(f"shared workflows, {name.removeprefix('out.')}", relative(out, site[name]), TOLERANCE)


def alignment(reference: Reference) -> Iterator[Line]:
    vectors = reference.tensors("alignment")
    landmarks = vectors["landmarks"].numpy()
    affine = torch.from_numpy(faces.alignment(landmarks))
    yield Line("alignment, affine", relative(affine, vectors["affine"]), TOLERANCE)
    image = vectors["image_bgr_u8"].flip(-1).contiguous().numpy()  # the files are BGR, the pack is RGB
    crop = torch.from_numpy(faces.align(image, landmarks)).flip(-1)
    error = (crop.int() - vectors["crop_bgr_u8"].int()).abs().max().item()
    yield Line("alignment, crop (in grey levels)", error, GREY_LEVEL)


def face_features(reference: Reference) -> Iterator[Line]:
    vectors = reference.tensors("face_features")
    grey = encode.grey_on_white(vectors["crop_rgb_u8"].float() / 255, vectors["label_map"].squeeze(1))
    expected = vectors["pixels_336"]
    pixels = encode.to_vision_input(grey, expected.shape[-1])
    # The reference is stored in float16, so only rounding to it can be asked for; that is what is compared.
    rounded = (pixels - expected.float()).abs() / expected.float().abs().clamp(min=1e-3) / FLOAT16_STEP
    yield Line("face features, in float16 steps", rounded.max().item(), 1.0)


@dataclass(frozen=True)
class UnetReference:
    """The whole UNet: weights, inputs and outputs; the ID projections are drawn per site."""

    config: dict
    state: dict[str, Tensor]
    projections: IdProjections
    vectors: dict[str, Tensor]

    SCALE = 0.8

    @classmethod
    def read(cls, reference: Reference) -> "UnetReference":
        about, vectors = reference.json("unet_shapes"), reference.tensors("unet_official")
        token_width, drawn, widths = vectors["tokens"].shape[-1], {}, []
        for site, (index, processor) in enumerate(about["attn2_order"].items()):
            widths.append(about["shapes"][f"{processor.removesuffix('.processor')}.to_k.weight"][0])
            shapes = {f"id_to_{half}.weight": (widths[-1], token_width) for half in "kv"}
            weights = draw(shapes, f"{reference.seed}:id_adapter_attn_layers.{index}")
            drawn |= {f"to_{half}.{site}.weight": weights[f"id_to_{half}.weight"] for half in "kv"}
        projections = IdProjections(widths, token_width, device="meta")
        projections.load_state_dict(drawn, assign=True)
        return cls(about["config"], draw(about["shapes"], reference.seed), projections, vectors)

    def site_kvs(self) -> tuple[SiteKV, ...]:
        return self.projections.project(self.vectors["tokens"])


def unet_official(reference: Reference) -> Iterator[Line]:
    from diffusers import UNet2DConditionModel

    from . import diffusers_unet

    whole = UnetReference.read(reference)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**whole.config)
    unet.load_state_dict(whole.state, assign=True)
    vectors = whole.vectors
    pooled_width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    # The reference gives the embedded vector y; diffusers wants its parts, so its own embedding is bypassed.
    unet.get_aug_embed = lambda emb, encoder_hidden_states, added_cond_kwargs: unet.add_embedding(vectors["y"])

    def run() -> Tensor:
        return unet(
            vectors["x"], vectors["timesteps"], vectors["context"],
            added_cond_kwargs={"text_embeds": vectors["y"][:, :pooled_width], "time_ids": vectors["y"][:, :6]},
        ).sample  # fmt: skip

    yield Line("whole UNet in diffusers, unpatched", relative(run(), vectors["out.unpatched"]), UNET_TOLERANCE)
    site_kvs = whole.site_kvs()
    for mode, (fusion, zero_tokens) in MODES.items():
        diffusers_unet.patch(unet, site_kvs, range(len(vectors["x"])), fusion, zero_tokens, whole.SCALE)
        yield Line(f"whole UNet in diffusers, {mode}", relative(run(), vectors[f"out.{mode}"]), UNET_TOLERANCE)


_ALIKE = (id_encoders, attention_official, attention_shared_workflows, alignment, face_features, unet_official)
PARTS: dict[str, Callable[[Reference], Iterator[Line]]] = {  # by their files
    "eva_small_vectors": vision_tower,
    **{part.__name__: part for part in _ALIKE},
}


def lines(folder: Path, parts: Mapping[str, Callable] = PARTS) -> Iterator[Line]:
    """One line per vector of each file. Raises FileNotFoundError when a file is not there."""
    reference = Reference(folder)
    with torch.inference_mode():
        for part in parts.values():
            yield from part(reference)


def main() -> int:
    arguments = command_line.conformance()
    folder = arguments.folder
    if missing := [name for name in PARTS if not (folder / f"{name}.safetensors").is_file()]:
        print(f"{folder} lacks {', '.join(missing)}: no folder of reference vectors.", file=sys.stderr)
        return 2
    results = []
    for line in lines(folder):
        print(line, flush=True)
        results.append(line.holds)
    for comfyui in arguments.comfyui:
        command = [sys.executable, TOOLS, "host_unet", comfyui, folder]
        results.append(subprocess.run(command, check=False).returncode == 0)
    if not arguments.comfyui:
        print("No ComfyUI: the whole UNet was compared in diffusers only.")
    print(f"{results.count(True)} hold, {results.count(False)} fail")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
