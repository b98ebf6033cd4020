"""Tests in this folder run beside real packs, on the ComfyUI that COMFYUI names."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def comfyui():
    if not os.environ.get("COMFYUI"):
        pytest.skip("COMFYUI names no ComfyUI folder")
    return Path(os.environ["COMFYUI"])


@pytest.fixture
def inference():
    """As ComfyUI runs nodes."""
    import torch  # not where the whole folder is skipped

    with torch.inference_mode():
        yield
