"""Tests in this folder run on the ComfyUI that COMFYUI names; `run.py test` sets it, once for each.

Only fixtures import what they need: where no ComfyUI is named, the whole folder is skipped.
"""

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
    import torch

    with torch.inference_mode():
        yield


@pytest.fixture
def own_folders(tmp_path, monkeypatch):
    """Input, output, temporary and model folders of a test's own, of which ComfyUI knows nothing else yet."""
    import folder_paths

    for kind in ("input", "output", "temp"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture(scope="module")
def model():
    """A MODEL with the whole of SDXL's UNet at a tenth of its width."""
    from pulid_sdxl.tools import comfy_host

    from .sampling import MODEL_CHANNELS

    return comfy_host.sdxl(MODEL_CHANNELS)


@pytest.fixture(scope="module")
def pulid():
    """A loaded PuLID as wide as `model`."""
    from pulid_sdxl.tools.fakes import networks as fakes

    from .sampling import projections

    return fakes.loaded(fakes.weights(projections()))


@pytest.fixture(scope="module")
def identity():
    from .sampling import make_identity

    return make_identity()
