"""A ComfyUI pack that teaches the host one more checkpoint, for the demo and the tests: SDXL at a fifth of its width.

It is SDXL in everything else: the same blocks, depths, 70 cross-attention sites and conditioning. The second text
encoder has 4 layers instead of 32. standin_checkpoint.py beside this folder writes such a file.
"""

from typing import Any

from comfy import sdxl_clip, supported_models, supported_models_base


class StandinTextEncoder(sdxl_clip.SDXLClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
        short = {"clip_g_model_config": {"num_hidden_layers": 4}}
        super().__init__(device=device, dtype=dtype, model_options={**(model_options or {}), **short})


class StandinSDXL(supported_models.SDXL):
    unet_config = {**supported_models.SDXL.unet_config, "model_channels": 64}  # noqa: RUF012 (the host's convention)

    def clip_target(self, state_dict: Any = None) -> supported_models_base.ClipTarget:
        return supported_models_base.ClipTarget(sdxl_clip.SDXLTokenizer, StandinTextEncoder)


supported_models.models.append(StandinSDXL)

NODE_CLASS_MAPPINGS: dict[str, type] = {}
