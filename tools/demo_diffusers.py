"""The demo where no ComfyUI is to be had: the pack's own pulid/ and models/ on diffusers' SDXL UNet, weights random.

There is no text encoder and no checkpoint here, so the prompt is random numbers too. What is shown is that a
photograph becomes an identity, and that the identity reaches all 70 sites of the UNet while it samples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from ..models.checkpoints import load_pulid, load_vision_tower
from ..models.face_networks import InsightFaceAnalyzer
from ..pulid.attention import METHODS, SiteKV
from ..pulid.cache import ResultCache
from ..pulid.encode import EncodeSettings, photographs
from ..pulid.encode import encode as encode_photographs
from ..pulid.identity import Version
from ..pulid.networks import PhotoNetworks, PulidWeights, on_cpu
from . import diffusers_unet
from .fakes.standins import random_state
from .model_files import ModelFile

# SDXL's autoencoder at a quarter of its width.
VAE = {
    "block_out_channels": (32, 64, 128, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
CFG, WEIGHT, METHOD = 7.0, 0.8, "fidelity"  # those of the shipped workflow
TOKENS, TEXT_WIDTH, POOLED_WIDTH = 77, 2048, 1280

Report = Callable[[str], None]


@dataclass(frozen=True)
class Made:
    """The picture with PuLID, the same without, and the face as the vision tower sees it."""

    picture: Image.Image
    without: Image.Image
    face: Image.Image


@torch.inference_mode()
def make(photo: Path, files: list[ModelFile], seed: int, steps: int, size: tuple[int, int], report: Report) -> Made:
    """size  width and height in pixels, multiples of 32"""
    report("Encoding the identity")
    face, version, site_kvs = encode(photo, {file.name: file.source for file in files})

    report("Building diffusers' UNet")
    unet = randomised(UNet2DConditionModel(**diffusers_unet.sdxl_config(64)))
    vae = randomised(AutoencoderKL(**VAE))
    plain = sample(unet, seed, steps, size, lambda step: report(f"Without PuLID: {step} of {steps}"))
    method = METHODS[METHOD][version]
    rows = (1, 0)  # of the keys, for the batch rows negative, positive
    diffusers_unet.patch(unet, site_kvs, rows, method.fusion, method.zero_tokens, WEIGHT)
    latent = sample(unet, seed, steps, size, lambda step: report(f"With PuLID: {step} of {steps}"))
    return Made(decode(vae, latent), decode(vae, plain), image_of(face))


def encode(photo: Path, files: dict[str, Path]) -> tuple[Tensor, Version, tuple[SiteKV, ...]]:
    """The face (3, 336, 336), and keys and values for each site: row 0 the person's, row 1 the negative branch's."""
    analyzer = InsightFaceAnalyzer(
        files["scrfd_10g_bnkps.onnx"].parent, files["detection_Resnet50_Final.pth"], files["parsing_bisenet.pth"]
    )
    pixels = torch.from_numpy(np.asarray(Image.open(photo).convert("RGB")) / np.float32(255))
    tower = load_vision_tower(files["EVA02_CLIP_L_336_psz14_s6B.pt"], dtype=torch.float32)
    checkpoint = load_pulid(files["pulid_v1.1.safetensors"], dtype=torch.float32)
    weights = PulidWeights(
        checkpoint.version, checkpoint.fingerprint, on_cpu(checkpoint.encoder), on_cpu(checkpoint.projections)
    )
    networks = PhotoNetworks(on_cpu(tower), analyzer)
    encoded = encode_photographs(photographs([pixels]), weights, networks, EncodeSettings(), ResultCache(0))
    site_kvs = weights.project(encoded.identity, torch.device("cpu"))
    return encoded.faces[0].grey.movedim(-1, 0), weights.version, site_kvs


def randomised(network: nn.Module) -> nn.Module:
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    network.load_state_dict(random_state(shapes, torch.float32, seed=0))
    return network.eval()


def sample(
    unet: UNet2DConditionModel, seed: int, steps: int, size: tuple[int, int], done: Callable[[int], None]
) -> Tensor:
    """A latent (1, 4, H / 8, W / 8), by the shipped workflow's sampler: DPM++ 2M with Karras' noise levels."""
    width, height = size
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_karras_sigmas=True
    )
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(1, 4, height // 8, width // 8, generator=generator) * scheduler.init_noise_sigma
    text = torch.randn(2, TOKENS, TEXT_WIDTH, generator=generator)  # negative, positive
    conditions = {
        "text_embeds": torch.randn(2, POOLED_WIDTH, generator=generator),
        "time_ids": torch.tensor([[height, width, 0, 0, height, width]] * 2),
    }
    for number, timestep in enumerate(scheduler.timesteps, start=1):
        both = scheduler.scale_model_input(latent, timestep).repeat(2, 1, 1, 1)
        negative, positive = unet(both, timestep, text, added_cond_kwargs=conditions).sample
        latent = scheduler.step((negative + CFG * (positive - negative))[None], timestep, latent).prev_sample
        done(number)
    return latent


def decode(vae: AutoencoderKL, latent: Tensor) -> Image.Image:
    return image_of(vae.decode(latent).sample[0] / 2 + 0.5)


def image_of(pixels: Tensor) -> Image.Image:
    """(3, H, W) 0..1 -> a picture"""
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy())
