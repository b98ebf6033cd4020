"""The EVA_CLIP socket, which other packs have too: what their nodes ask of a tower, and theirs in the place of ours."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..pulid.encode import VISION_MEAN, VISION_SIZE, VISION_STD
from ..pulid.eva import EvaVisionTower
from ..pulid.identity import VisionFeatures
from ..pulid.networks import Managed
from . import host


@dataclass(frozen=True, eq=False)
class SharedEvaClip(Managed[EvaVisionTower]):
    """Our tower, which can be called as EVA-CLIP's own `visual` is."""

    image_size = VISION_SIZE
    image_mean = VISION_MEAN
    image_std = VISION_STD

    def to(self, *_: Any, **__: Any) -> "SharedEvaClip":
        """ComfyUI moves it when it is called."""
        return self

    def __call__(self, pixels: Tensor, **_: Any) -> tuple[Tensor, list[Tensor]]:
        """pixels (B, 3, 336, 336), normalised -> pooled (B, 768) and five hidden states, in their dtype and place."""
        device = self.load()
        with torch.inference_mode():
            pooled, hidden = self.module(pixels.to(device, torch.float32))
        return pooled.to(pixels), [one.to(pixels) for one in hidden]


class ForeignTower(nn.Module):
    """Another pack's EVA-CLIP `visual`, asked as ours is."""

    def __init__(self, visual: nn.Module):
        super().__init__()
        self.visual = visual

    def features(self, pixels: Tensor) -> VisionFeatures:
        weight = next(self.visual.parameters())
        pooled, hidden = self.visual(
            pixels.to(weight), return_all_features=False, return_hidden=True, shuffle=False
        )  # fmt: skip
        pooled = pooled.to(pixels)
        return VisionFeatures(pooled / pooled.norm(dim=-1, keepdim=True), tuple(one.to(pixels) for one in hidden))


def managed_tower(visual: nn.Module) -> Managed[Any]:
    """Another pack's tower under ComfyUI's memory management."""
    return host.managed(ForeignTower(visual), object())
