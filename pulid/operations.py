"""Where a network takes its layers from: torch.nn, or ComfyUI, whose layers store narrower than they compute."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

Device = torch.device | str | None


class Operations(Protocol):
    """What `torch.nn` and `comfy.ops.manual_cast` have in common."""

    @property
    def Linear(self) -> Callable[..., nn.Module]: ...
    @property
    def LayerNorm(self) -> Callable[..., nn.Module]: ...
    @property
    def Conv2d(self) -> Callable[..., nn.Module]: ...
