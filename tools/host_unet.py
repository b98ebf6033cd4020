"""The whole-UNet reference through a real ComfyUI's UNet and this pack's own patch: `host_unet.py COMFYUI FOLDER`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import comfy_host
from .conformance import UNET_TOLERANCE, Line, Reference, UnetReference, relative
from .fakes import networks as fakes

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def model_of(whole: UnetReference) -> "ModelPatcher":
    """A MODEL with the reference's weights."""
    device = whole.vectors["x"].device.type
    model = comfy_host.sdxl(whole.config["block_out_channels"][0], seed=None, device=device)
    comfy_host.load_diffusers_state(model, whole.state)
    return model


def run(model: "ModelPatcher", vectors: dict[str, Tensor]) -> Tensor:
    """One pass of the UNet as the host's sampling makes it: options of the model, negative row first."""
    options = {
        **model.model_options["transformer_options"],
        "cond_or_uncond": [1, 0],
        "sigmas": torch.ones(1).to(vectors["x"]),
    }
    return model.model.diffusion_model(
        vectors["x"], vectors["timesteps"], context=vectors["context"], y=vectors["y"], transformer_options=options
    )


METHODS = {"fidelity": "fidelity", "extreme_style": "extreme style", "none": "neutral"}  # in the files, in the node


def lines(reference: Reference) -> Iterator[Line]:
    """Through the real Apply node, whose identity holds the reference's tokens."""
    from ..nodes.apply import PulidApply
    from ..pulid.identity import IdEmbedding

    whole = UnetReference.read(reference)
    model = model_of(whole)
    vectors = whole.vectors
    pulid = fakes.loaded(fakes.weights(whole.projections))
    uncond, cond = vectors["tokens"].split(1)
    identity = IdEmbedding(cond, uncond, "v1", "print")
    yield Line("whole UNet, unpatched", relative(run(model, vectors), vectors["out.unpatched"]), UNET_TOLERANCE)
    for mode, method in METHODS.items():
        patched = PulidApply.execute(model, pulid, identity, method, whole.SCALE, 0.0, 1.0)[0]
        yield Line(f"whole UNet, {mode}", relative(run(patched, vectors), vectors[f"out.{mode}"]), UNET_TOLERANCE)
    yield Line(
        "whole UNet, unpatched afterwards", relative(run(model, vectors), vectors["out.unpatched"]), UNET_TOLERANCE
    )


def main() -> int:
    host, folder = sys.argv[1:]
    comfy_host.enter(host)
    from comfyui_version import __version__

    with torch.inference_mode():
        results = []
        for line in lines(Reference(Path(folder))):
            print(f"{line} in ComfyUI {__version__}", flush=True)
            results.append(line.holds)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
