"""Writes a small SDXL checkpoint with random weights, which ComfyUI loads as any other beside tools/standin_host.

    python tools fakes.standin_checkpoint COMFYUI OUT.safetensors

Names and shapes come from the host's own classes, built without memory. To be run in a process of its own, which
becomes ComfyUI's.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from .. import comfy_host
from .standins import random_state

# SDXL's autoencoder, as ComfyUI configures it.
VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def shapes(comfyui: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, by the name that published SDXL checkpoints give it."""
    comfy_host.enter(comfyui)
    from comfy.ldm.models.autoencoder import AutoencoderKL

    pack = Path(__file__).parent / "standin_host" / "__init__.py"
    spec = importlib.util.spec_from_file_location("standin_host", pack)
    assert spec and spec.loader
    standin_host = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(standin_host)

    config = standin_host.StandinSDXL({**comfy_host.SDXL_CONFIG, **standin_host.StandinSDXL.unet_config})
    with torch.device("meta"):
        unet = config.get_model({}, device="meta").diffusion_model
        text = standin_host.StandinTextEncoder(device="meta", dtype=torch.float16)
        vae = AutoencoderKL(ddconfig=VAE, embed_dim=4)
    state = {
        **config.process_unet_state_dict_for_saving(unet.state_dict()),
        **config.process_clip_state_dict_for_saving(text.state_dict()),
        **config.process_vae_state_dict_for_saving(vae.state_dict()),
    }
    return {name: tuple(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()}


if __name__ == "__main__":
    comfyui, out = map(Path, sys.argv[1:])
    save_file(random_state(shapes(comfyui), torch.float16, seed=0), out)
