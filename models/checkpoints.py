"""Loads the two kinds of weights the pack needs: PuLID for SDXL (v1 or v1.1) and the EVA02-CLIP vision tower.

A file is told by the names of its tensors, never by its own name. Names and shapes are checked before any weight is
read; the networks are built without memory, and take the tensors as they were read.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..pulid.attention import IdProjections
from ..pulid.encoders import ENCODERS, IdEncoder, IdFormer
from ..pulid.errors import DamagedWeights, ForeignWeights
from ..pulid.eva import EvaVisionTower, read_eva_state
from ..pulid.identity import Operations, Version
from ..pulid.sites import SITES, file_index
from .catalogue import EVA_CLIP, EVA_CLIP_TIMM, V1, V1_1, V1_PICKLE, WeightFile
from .tensors import damaged, label, map_tensors, read_tensors, reading

NAMED = 3  # how many faults, or names of unknown tensors, a message gives
FINGERPRINTED = 64  # values of each tensor

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class PulidCheckpoint:
    """What a PuLID file holds.

    encoder      IdEncoder (v1) or IdFormer (v1.1)
    projections  keys and values of the 70 sites, as wide as the file has them
    fingerprint  16 hex digits of the encoder's weights, the same whatever the container and the precision
    """

    version: Version
    encoder: IdEncoder | IdFormer
    projections: IdProjections
    fingerprint: str


@dataclass(frozen=True)
class Kind:
    """A family of weight files: each of `patterns` fits the beginning of some line "tensor name (shape)" of a file."""

    title: str
    remedy: str
    patterns: tuple[str, ...]


def _kind(title: str, remedy: str, *patterns: str) -> Kind:
    return Kind(title, remedy, patterns)


PULID_V1 = _kind("PuLID v1 for SDXL", "Choose it as pulid_file.", r"(id_adapter|image_proj)\.mapping_patch_\d\.")
PULID_V1_1 = _kind(
    "PuLID v1.1 for SDXL", "Choose it as pulid_file.", r"(id_adapter|image_proj)\.id_embedding_mapping\."
)
EVA = _kind("EVA02-CLIP", "Choose it as eva_clip.", r"(visual\.)?(trunk\.)?blocks\.\d+\.attn\.(inner_attn_ln|norm)\.")

PULID_VERSIONS: dict[Kind, Version] = {PULID_V1: "v1", PULID_V1_1: "v1.1"}

EXPECTED = {V1: PULID_V1, V1_PICKLE: PULID_V1, V1_1: PULID_V1_1, EVA_CLIP: EVA, EVA_CLIP_TIMM: EVA}

# The first that fits names the file.
KINDS = (
    PULID_V1,
    PULID_V1_1,
    EVA,
    _kind("PuLID for FLUX", "It needs a PuLID pack for Flux.", r"pulid_(ca|encoder)\."),
    _kind("InstantID", "It needs an InstantID pack.", r"image_proj\.proj_in\.weight \(\d+, 512\)", r"ip_adapter\."),
    _kind("IP-Adapter", "It needs an IP-Adapter pack.", r"(image_proj|ip_adapter)\."),
    _kind("ControlNet", "Load it with Load ControlNet Model.", r"(control_model|controlnet_\w+)\."),
    _kind("LoRA", "Load it with Load LoRA.", r".*\blora_(up|down|A|B)\."),
    _kind(
        "SDXL checkpoint", "Load it with Load Checkpoint.", r"model\.diffusion_model\.", r"conditioner\.embedders\.1\."
    ),
    _kind("checkpoint of an image model", "Load it with Load Checkpoint.", r"model\.diffusion_model\."),
    _kind("diffusion model", "Load it with Load Diffusion Model.", r"(down|double|input)_blocks\.\d+\."),
    _kind("CLIP vision model of another make", "Load it with Load CLIP Vision.", r"(vision_model|visual)\."),
    _kind("text encoder", "Load it with Load CLIP.", r"text_model\.|encoder\.block\.\d+\.layer\."),
)

# The same tensors go by two spellings: the authors' own, and the one made for IP-Adapter loaders.
ENCODER_NAME = re.compile(r"(?:id_adapter|image_proj)\.(?P<parameter>.+)")
PROJECTION_NAME = re.compile(
    r"(?:id_adapter_attn_layers|ip_adapter)\.(?P<index>\d{1,4})\.(?:id_)?(?P<half>to_[kv])(?:_ip)?\.weight"
)


def load_pulid(path: Path | str, operations: Operations = nn, dtype: torch.dtype | None = None) -> PulidCheckpoint:
    """Load PuLID v1 or v1.1, as the authors published it or converted, from safetensors or a pickle.

    operations  provides Linear, LayerNorm and Conv2d: `torch.nn` or the host's casting layers
    dtype       of the weights in memory; None keeps the file's

    Raises MissingWeights, ForeignWeights (with the name of what the file is instead) or DamagedWeights.
    """
    path = Path(path)
    state = map_tensors(path)
    kind = recognise(state)
    if kind is None or kind not in PULID_VERSIONS:
        raise _foreign(path, "PuLID for SDXL", kind, state)
    version = PULID_VERSIONS[kind]

    encoder_names, projection_names = _split(path, kind, state)
    # A scalar has the product of no sizes, 1, for a width: `_check` refuses it as misshapen.
    widths = [state[projection_names[f"to_k.{site}.weight"]].shape[:1].numel() for site in range(len(SITES))]
    encoder = ENCODERS[version](operations=operations, device="meta")
    projections = IdProjections(widths, operations=operations, device="meta")
    _check(encoder, _renamed(state, encoder_names), path, kind)
    _check(projections, _renamed(state, projection_names), path, kind)

    weights = read_tensors(path, [*encoder_names.values(), *projection_names.values()])
    return PulidCheckpoint(
        version=version,
        fingerprint=fingerprint(_renamed(weights, encoder_names)),
        encoder=_fill(encoder, _renamed(weights, encoder_names), dtype, path),
        projections=_fill(projections, _renamed(weights, projection_names), dtype, path),
    )


def load_vision_tower(
    path: Path | str, operations: Operations = nn, dtype: torch.dtype | None = None
) -> EvaVisionTower:
    """Load the vision tower of an EVA02-CLIP file, published or timm's; its text tower is never built.

    Arguments and errors as for `load_pulid`. The tower is as large as the file has it: see its `config`.
    """
    path = Path(path)
    state = map_tensors(path)
    kind = recognise(state)
    if kind is not EVA:
        raise _foreign(path, EVA.title, kind, state)
    try:
        config, tower_state = read_eva_state(state)
        tower = EvaVisionTower(config, operations=operations, device="meta")
    except (ForeignWeights, ValueError, IndexError, ZeroDivisionError) as error:  # tensors of EVA, sizes of no tower
        raise _altered(path, EVA, [str(error)]) from error
    _check(tower, tower_state, path, EVA)

    used = {id(tensor) for tensor in tower_state.values()}
    weights = read_tensors(path, [name for name, tensor in state.items() if id(tensor) in used])
    return _fill(tower, read_eva_state(weights)[1], dtype, path)


def check_file(file: WeightFile, path: Path) -> None:
    """Raises WeightsError unless `path` holds what this file of the catalogue should; for files without a hash."""
    expected = EXPECTED[file]
    state = map_tensors(path)
    kind = recognise(state)
    if kind is not expected:
        raise _foreign(path, expected.title, kind, state)


def recognise(state: Mapping[str, Tensor]) -> Kind | None:
    """The family that the names and shapes of `state` tell, or None."""
    lines = [f"{name} {tuple(tensor.shape)}" for name, tensor in state.items()]
    for kind in KINDS:
        if all(any(re.match(pattern, line) for line in lines) for pattern in kind.patterns):
            return kind
    return None


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """16 hex digits over every name and the first 64 values of every tensor, rounded to float16."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].flatten()[:FINGERPRINTED].half().numpy().tobytes())
    return digest.hexdigest()[:16]


def _split(path: Path, kind: Kind, state: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, str]]:
    """The encoder's and the projections' tensors: their names in our networks -> in the file.

    Raises DamagedWeights unless all 70 sites are there, and nothing beside them and the encoder.
    """
    sites = {
        (file_index(site), half): f"{half}.{site}.weight" for site in range(len(SITES)) for half in ("to_k", "to_v")
    }
    encoder, projections, faults = {}, {}, []
    for name in state:
        if match := PROJECTION_NAME.fullmatch(name):
            key = int(match["index"]), match["half"]
            if key in sites:
                projections[sites[key]] = name
            else:
                faults.append(f"{name} belongs to no site (sites have odd indices)")
        elif match := ENCODER_NAME.fullmatch(name):
            encoder[match["parameter"]] = name
        else:
            faults.append(f"{name} does not belong to it")
    faults += [f"{half} of site index {i} is missing" for (i, half), name in sites.items() if name not in projections]
    if faults:
        raise _altered(path, kind, faults)
    return encoder, projections


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    return {own: state[name] for own, name in names.items()}


def _check(network: nn.Module, state: Mapping[str, Tensor], path: Path, kind: Kind) -> None:
    """Raises DamagedWeights, before anything is read, unless names, shapes and kinds of number all fit."""
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    faults = [f"{name} is missing" for name in shapes if name not in state]
    faults += [f"{name} does not belong to it" for name in state if name not in shapes]
    for name, tensor in state.items():
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            faults.append(f"{name} is {tuple(tensor.shape)} instead of {shapes[name]}")
        elif not tensor.is_floating_point():
            faults.append(f"{name} holds {tensor.dtype}, not floating-point numbers")
    if faults:
        raise _altered(path, kind, faults)


def _fill(network: Network, weights: Mapping[str, Tensor], dtype: torch.dtype | None, path: Path) -> Network:
    """Give a network on the meta device its weights, for inference."""
    with reading(path):  # they have other shapes if the file was replaced since `_check`
        network.load_state_dict(
            {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in weights.items()}, assign=True
        )
    return network.requires_grad_(False).eval()


def _altered(path: Path, kind: Kind, faults: list[str]) -> DamagedWeights:
    more = f"; and {len(faults) - NAMED} more faults" if len(faults) > NAMED else ""
    return damaged(path, f"is not {kind.title} as published: {'; '.join(faults[:NAMED])}{more}")


def _foreign(path: Path, expected: str, kind: Kind | None, state: Mapping[str, Tensor]) -> ForeignWeights:
    if kind is not None:
        return ForeignWeights(f"Expected {expected}, found {kind.title}: {label(path)}. {kind.remedy}")
    names = ", ".join(list(state)[:NAMED])
    return ForeignWeights(
        f"Expected {expected}, found {len(state)} tensors of an unknown kind in {label(path)} ({names}). "
        "Choose another file."
    )
