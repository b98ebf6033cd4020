"""A real ComfyUI in this process, on the CPU unless asked otherwise: for tests, the conformance run and the bench."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def enter(path: Path | str, *arguments: str, device: str = "cpu") -> None:
    """Make the ComfyUI in this folder importable, as its own main.py would start it. Once per process."""
    path = str(Path(path).expanduser().resolve())
    if "comfy" in sys.modules:
        if not sys.modules["comfy"].__path__[0].startswith(path):
            raise RuntimeError(f"This process already holds the ComfyUI of {sys.modules['comfy'].__path__[0]}.")
        return
    sys.path.insert(0, path)
    rest, sys.argv[1:] = sys.argv[1:], [*(["--cpu"] if device == "cpu" else []), *arguments]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args

    sys.argv[1:] = rest
    logging.getLogger("comfy").setLevel(logging.WARNING)
    import comfy.model_management


SDXL_CONFIG = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "context_dim": 2048,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "use_spatial_transformer": True,
    "legacy": False,
    "use_linear_in_transformer": True,
    "use_temporal_attention": False,
    "num_head_channels": 64,
}


def sdxl(
    model_channels: int = 64, dtype: torch.dtype = torch.float32, seed: int | None = 0, device: str = "cpu"
) -> "ModelPatcher":
    """A MODEL with SDXL's UNet at this width (320 is the real one), weights drawn from `seed`, left alone if None.

    device  where it computes; its weights are made there, and rest on the CPU when the host wants that
    """
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SDXL({**SDXL_CONFIG, "model_channels": model_channels, "dtype": dtype})
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        config.set_inference_dtype(dtype, torch.float32)
    network = config.get_model({}, "", device=torch.device(device)).eval()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in network.diffusion_model.named_parameters():
                values = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim > 1:
                    values *= parameter[0].numel() ** -0.5
                else:
                    values = 0.1 * values + name.endswith("weight")
                parameter.copy_(values)
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    cpu = torch.device("cpu")
    there = cpu if device == "cpu" else comfy.model_management.get_torch_device()
    return patcher(network.requires_grad_(False), load_device=there, offload_device=cpu)


def load_diffusers_state(model: "ModelPatcher", state: Mapping[str, torch.Tensor]) -> None:
    """Fill the UNet from diffusers' parameter names, every one of them."""
    import comfy.utils

    network = model.model.diffusion_model
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    own = {names[name]: tensor for name, tensor in state.items()}
    network.load_state_dict(own, strict=True)
