"""Launching Triton kernels with little work for the host."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: what Triton specialises a kernel for where a tensor begins at a multiple of it


class Launch:
    """Launches a kernel that Triton is asked for once per set of sizes: its own lookup takes longer than the launch."""

    def __init__(self, kernel: Any):
        self._kernel = kernel
        self._compiled: dict[tuple, Any] = {}

    def __call__(
        self, grid: tuple[int, int, int], tensors: Sequence[Tensor | None], numbers: tuple, warps: int
    ) -> None:
        """tensors and numbers are the kernel's arguments, in order; it is specialised for all of the numbers.

        Raises ValueError for tensors on several devices.
        """
        if torch.compiler.is_compiling():
            self._kernel[grid](*tensors, *numbers, num_warps=warps)
            return
        [device] = {tensor.get_device() for tensor in tensors if tensor is not None}
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        if any(pointer and pointer % ALIGNMENT for pointer in pointers):
            self._kernel[grid](*tensors, *numbers, num_warps=warps)
            return
        key = device, warps, numbers, *(tensor is not None and tensor.dtype for tensor in tensors)
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*pointers, *numbers)  # of a tensor, Triton would ask the driver where it lies
        elif (compiled := self._kernel[grid](*tensors, *numbers, num_warps=warps)) is not None:
            self._compiled[key] = compiled  # Triton's interpreter has none
