"""Quick matrix products on a CPU: in float32, torch leaves them to MKL, which on AMD reaches half of what oneDNN does.

A 1 x 1 convolution is the same product, and torch leaves convolutions to oneDNN.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

FEW_ROWS = 64  # below this, bringing the weights into oneDNN's order costs more than its product saves


def quick_linear(device: torch.device) -> AbstractContextManager:
    """Within it, on a CPU, `linear` takes the place of torch.nn.functional.linear, also in layers that call that."""
    return _LinearByOneDnn() if device.type == "cpu" else nullcontext()


class _LinearByOneDnn(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (linear if function is F.linear else function)(*args, **(kwargs or {}))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input (..., I), weight (O, I), bias (O,) -> (..., O), as torch.nn.functional.linear but for rounding."""
    rows = input.numel() // input.shape[-1]
    plain = {input.dtype, weight.dtype} == {torch.float32} and input.device.type == "cpu"
    if not plain or rows < FEW_ROWS or not torch.backends.mkldnn.is_available():
        return F.linear(input, weight, bias)
    columns = input.reshape(1, 1, rows, -1).permute(0, 3, 1, 2)  # (1, I, 1, rows), channels last: nothing is moved
    made = F.conv2d(columns, weight[:, :, None, None], bias)
    return made.permute(0, 2, 3, 1).reshape(*input.shape[:-1], -1)
