"""What this pack asks of ComfyUI: folders, devices and dtypes, managed memory, and the layout of a model."""

import os
import sys
from collections.abc import Hashable, Mapping
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import folder_paths
import torch
from comfy.ldm.modules.attention import CrossAttention
from comfy.model_patcher import ModelPatcher
from torch import nn

from ..models.catalogue import CATALOGUE, FACEXLIB, PULID, VISION
from ..models.identities import CARD_SUFFIX, SUFFIX
from ..models.locate import ModelFolders, other_programs
from ..pulid.encoders import TOKEN_WIDTH
from ..pulid.errors import MismatchError
from ..pulid.networks import Bring, Managed, Network
from ..pulid.sites import SITES, Site

OPERATIONS = comfy.ops.manual_cast  # layers that cast their weights to the input, so that storage may be float16
COMPUTE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

INSIGHTFACE = "insightface"
IDENTITIES = "pulid_identities"
# Folder name under models/ -> extensions that ComfyUI lists there. All can be set in extra_model_paths.yaml.
OWN_FOLDERS = {
    PULID[0]: folder_paths.supported_pt_extensions,
    FACEXLIB[0]: {".pth"},
    INSIGHTFACE: {".onnx"},
    "eva_clip": folder_paths.supported_pt_extensions,
    IDENTITIES: {SUFFIX, CARD_SUFFIX},
}
VISION_FOLDERS = VISION[:3]  # the fourth is ComfyUI's old name for the third


def register_folders() -> None:
    """Make our folders known to ComfyUI, keeping paths and extensions that a yaml or another pack already gave."""
    for name, extensions in OWN_FOLDERS.items():
        folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir, name)))
        paths, known = folder_paths.folder_names_and_paths[name]
        if not known:  # an empty set would list every file there
            folder_paths.folder_names_and_paths[name] = (paths, set(extensions))
    folder_paths.add_model_folder_path(IDENTITIES, str(saved_identities()))


def saved_identities() -> Path:
    """Where identities are saved: below the output folder and listed with the rest, as ComfyUI does with LoRAs."""
    return Path(folder_paths.get_output_directory(), IDENTITIES)


def folders(*names: str) -> list[Path]:
    """All paths configured for these folder names, in order, each once."""
    return list(dict.fromkeys(Path(path) for name in names for path in folder_paths.get_folder_paths(name)))


def uploaded_pictures() -> list[str]:
    """The PNG files that ComfyUI's upload has put into its input folder."""
    found = Path(folder_paths.get_input_directory()).glob("*.png")
    return sorted(file.name for file in found)


def model_folders() -> ModelFolders:
    """Where ComfyUI and other programs keep weight files."""
    names = dict.fromkeys(folder.partition("/")[0] for file in CATALOGUE for folder in file.folders)
    return ModelFolders({name: folders(name) for name in names}, other_programs(os.environ, Path.home()))


def say(text: str, node_id: str | None = None) -> None:
    """Show a text at once, on the node with that id or else on the one that runs, to whoever queued it."""
    server_type = getattr(sys.modules.get("server"), "PromptServer", None)  # there while the server runs, else not
    server = getattr(server_type, "instance", None)
    if server is not None and (node_id := node_id or server.last_node_id) is not None:
        server.send_progress_text(text, node_id, server.client_id)


def file_names(*names: str) -> list[str]:
    """The files ComfyUI lists in these folders."""
    return list(dict.fromkeys(file for name in names for file in folder_paths.get_filename_list(name)))


def registered_nodes() -> Mapping[str, type]:
    """The nodes that ComfyUI has so far, by id: its own, and those of the packs that it loaded before this one."""
    return getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})


def private_folder() -> Path:
    """A folder for what must not be served: `__` in front is in no user's name, so no route of the host leads there."""
    find = getattr(folder_paths, "get_system_user_directory", None)  # from 0.4
    return Path(find("pulid") if find else Path(folder_paths.get_user_directory(), "__pulid"))


def managed(module: Network, source: Hashable = None) -> Managed[Network]:
    """The module under ComfyUI's memory management: at rest on the offload device until it is loaded.

    source  equal for equal weights; None where nobody asks
    """
    # Named CoreModelPatcher from 0.12, where dynamic VRAM swaps the class at start: looked up when called.
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    held = patcher(
        module.eval().requires_grad_(False),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.text_encoder_offload_device(),
    )

    def load() -> torch.device:
        comfy.model_management.load_models_gpu([held])  # at the cost of others if need be
        return held.load_device

    return Managed(module, load, source)


def manage(module: nn.Module) -> Bring:
    """Puts the module under ComfyUI's memory management; what comes back brings it to its device when called."""
    return managed(module).load


def sampling_dtype(model: ModelPatcher) -> torch.dtype:
    """The dtype in which this MODEL computes: its storage may be narrower (fp8, quantised)."""
    dtype = model.get_model_object("manual_cast_dtype") or model.model_dtype()
    return dtype if dtype in COMPUTE_DTYPES else torch.float16


def check_layout(model: ModelPatcher, widths: tuple[int, ...]) -> None:
    """Raises MismatchError unless the MODEL has SDXL's 70 sites with the channels the projections were made for."""
    name = type(getattr(model.model, "model_config", model.model)).__name__
    for index, (site, width) in enumerate(zip(SITES, widths, strict=True)):
        attention = cross_attention(model, site)
        if attention is None or attention.to_k.in_features != TOKEN_WIDTH:
            found = (
                "has no cross-attention there"
                if attention is None
                else f"reads {attention.to_k.in_features} channels there"
            )
            raise MismatchError(
                f"PuLID for SDXL needs an SDXL model, found {name}: its {site} (site {index} of 70) {found}. "
                "Connect an SDXL base checkpoint; refiners, SSD-1B, SD 1.5, SD3 and Flux do not fit."
            )
        if attention.to_k.out_features != width:
            raise MismatchError(
                f"The PuLID file was made for {width} channels in {site} (site {index} of 70), "
                f"the model {name} has {attention.to_k.out_features}. Use a PuLID file made for this model."
            )


def cross_attention(model: ModelPatcher, site: Site) -> CrossAttention | None:
    """The cross-attention of a site, or None where this MODEL has no such thing."""
    try:
        network = model.model.diffusion_model
        if site.part == "middle":
            block = network.middle_block[1]
        else:
            block = getattr(network, f"{site.part}_blocks")[site.number][1]
        return block.transformer_blocks[site.block].attn2
    except (AttributeError, IndexError, TypeError):
        return None
