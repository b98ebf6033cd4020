"""Tests in this folder run beside real packs, on the ComfyUI that COMFYUI names."""

from ..host.conftest import comfyui, inference

__all__ = ["comfyui", "inference"]
