"""Tests in this folder run beside real packs, on the ComfyUI that COMFYUI names."""

from ..host.conftest import comfyui, inference, model, pulid

__all__ = ["comfyui", "inference", "model", "pulid"]
