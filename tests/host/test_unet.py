"""The authors' whole-UNet vectors on this ComfyUI's own UNet, through the real Apply node."""

import os

import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)

from pulid_sdxl.tools import comfy_host

comfy_host.enter(os.environ["COMFYUI"])

import torch
from pulid_sdxl.tools import host_unet
from pulid_sdxl.tools.conformance import FOLDER, Reference


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no reference vectors at {FOLDER} (set PULID_REFERENCE)")
@torch.inference_mode()
def test_all_modes_hold():
    lines = list(host_unet.lines(Reference(FOLDER)))
    assert len(lines) == 5
    assert [str(line) for line in lines if not line.holds] == []
