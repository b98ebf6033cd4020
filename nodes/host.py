"""What this pack asks of ComfyUI: folders, devices and dtypes, managed memory, and the layout of a model."""

import os
import sys
import uuid
from collections.abc import Hashable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import folder_paths
import torch
from aiohttp import web
from comfy.cli_args import args
from comfy.ldm.modules.attention import CrossAttention
from comfy.model_patcher import ModelPatcher
from comfy_execution.utils import get_executing_context
from torch import nn

from ..models.catalogue import CATALOGUE, FACEXLIB, PULID, VISION
from ..models.identities import CARD_SUFFIX, SUFFIX
from ..models.locate import ModelFolders, other_programs, shown
from ..pulid.encoders import TOKEN_WIDTH
from ..pulid.errors import InputError, MismatchError
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


def below_models(path: Path) -> str:
    """The path as a user knows it: `models/...` where it lies in ComfyUI's folder, never with the name of a person."""
    models = Path(folder_paths.models_dir)
    return Path("models", path.relative_to(models)).as_posix() if path.is_relative_to(models) else shown(path)


def say(text: str, node_id: str | None = None) -> None:
    """Show a text at once, on the node with that id or else on the one that runs, to whoever queued it."""
    server_type = getattr(sys.modules.get("server"), "PromptServer", None)  # there while the server runs, else not
    server = getattr(server_type, "instance", None)
    if server is not None and (node_id := node_id or server.last_node_id) is not None:
        server.send_progress_text(text, node_id, server.client_id)


def executing_node() -> str | None:
    """The id of the node that runs; None outside of a workflow."""
    context = get_executing_context()
    return None if context is None else context.node_id


def origin_of(function: object) -> str:
    """The folder of the pack that a function or an object's class comes from, else its module, for messages."""
    kind = function if hasattr(function, "__qualname__") else type(function)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    parts = Path(file).parts if file else ()
    if "custom_nodes" in parts[:-1]:
        return parts[parts.index("custom_nodes") + 1]
    return kind.__module__


def file_names(*names: str) -> list[str]:
    """The files ComfyUI lists in these folders."""
    return list(dict.fromkeys(file for name in names for file in folder_paths.get_filename_list(name)))


def registered_nodes() -> Mapping[str, type]:
    """The nodes that ComfyUI has so far, by id: its own, and those of the packs that it loaded before this one."""
    return getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})


def private_folder() -> Path:
    """A folder for what must not be served: `__` in front is in no user's name, so no route of the host leads there.

    With --multi-user each user has one of their own. Raises InputError where nobody knows whose prompt runs.
    """
    find = getattr(folder_paths, "get_system_user_directory", None)  # from 0.4
    folder = Path(find("pulid") if find else Path(folder_paths.get_user_directory(), "__pulid"))
    if not args.multi_user:
        return folder
    context = get_executing_context()
    user = _users.get(context.prompt_id) if context else None
    if user is None:
        raise InputError(
            "ComfyUI runs with --multi-user, and this prompt came without a user, so it is not known whose key and "
            "requests it may use. Queue it from the editor, or send the header comfy-user with a known user's id."
        )
    return folder / "users" / Path(user).name


_users: dict[str, str] = {}  # id of a prompt -> who queued it, in this process
MOST_PROMPTS = 10_000  # that are remembered


def learn_users() -> None:
    """With --multi-user, remember who queues a prompt: the host knows it of the HTTP call alone, not of the run."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if not args.multi_user or server is None:
        return
    caller: ContextVar[str | None] = ContextVar("caller", default=None)

    @web.middleware
    async def note_caller(request: web.Request, handler: Any) -> web.StreamResponse:
        caller.set(None)  # a connection may bring many calls
        with suppress(KeyError):
            caller.set(server.user_manager.get_request_user_id(request))
        return await handler(request)

    def note_prompt(data: dict[str, Any]) -> dict[str, Any]:
        if user := caller.get():
            data["prompt_id"] = data.get("prompt_id") or str(uuid.uuid4())
            _users[str(data["prompt_id"])] = user
            for oldest in list(_users)[:-MOST_PROMPTS]:
                del _users[oldest]
        return data

    server.app.middlewares.append(note_caller)
    server.add_on_prompt_handler(note_prompt)


def input_folder() -> Path:
    """Where the host keeps what users have uploaded to it."""
    return Path(folder_paths.get_input_directory())


def input_files() -> list[str]:
    folder = input_folder()
    return sorted(file.name for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []


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
    """Puts a network of torch's own layers under ComfyUI's memory management; what comes back brings it to its device.

    The host leaves layers at rest for which it has no room (--novram), since its own compute from there; these cannot.
    """
    held = managed(module)

    def bring() -> torch.device:
        device = held.load()
        module.to(device)
        return device

    return bring


def sampling_dtype(model: ModelPatcher) -> torch.dtype:
    """The dtype in which this MODEL computes: its storage may be narrower (fp8, quantised)."""
    dtype = model.get_model_object("manual_cast_dtype") or model.model_dtype()
    return dtype if dtype in COMPUTE_DTYPES else torch.float16


def check_layout(model: ModelPatcher, widths: tuple[int, ...], partial: bool = False) -> None:
    """Raises MismatchError unless the MODEL has SDXL's 70 sites with the channels the projections were made for.

    partial  some of them are enough
    """
    name = type(getattr(model.model, "model_config", model.model)).__name__
    attentions = [cross_attention(model, site) for site in SITES]
    for index, (site, width, attention) in enumerate(zip(SITES, widths, attentions, strict=True)):
        if attention is None and partial and any(attentions):
            continue
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
