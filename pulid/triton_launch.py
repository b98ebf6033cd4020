"""Launching Triton kernels with little work for the host."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

ALIGNMENT = 16  # bytes: what Triton specialises a kernel for where a tensor begins at a multiple of it
BY_ADDRESSES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)  # which took fewer arguments before


class Launch:
    """A kernel with all that is the same at each launch: its grid, its last tensors and its numbers.

    Triton is asked for it once: its own lookup takes longer than the launch, and it asks the driver where each tensor
    lies. From then on it is handed addresses.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], kept: Sequence[Tensor], numbers: tuple, warps: int):
        """kept and numbers are the kernel's last arguments, in order, for which it may be specialised."""
        self._kernel, self._grid, self._kept, self._numbers, self._warps = kernel, grid, kept, numbers, warps
        self._run: Callable[[list[int | None]], None] | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        """tensors are the kernel's first arguments, on the current device; dtypes are the same at each launch."""
        if torch.compiler.is_compiling():
            self._by_triton(tensors)
            return
        addresses, bits = [], 0  # bits that any address has
        for tensor in tensors:
            addresses.append(None if tensor is None else tensor.data_ptr())
            bits |= addresses[-1] or 0
        if bits % ALIGNMENT:
            self._by_triton(tensors)
        elif self._run is not None:
            self._run(addresses)
        else:
            self._run = self._by_addresses(self._by_triton(tensors))

    def _by_triton(self, tensors: Sequence[Tensor | None]) -> Any:
        return self._kernel[self._grid](*tensors, *self._kept, *self._numbers, num_warps=self._warps)

    def _by_addresses(self, compiled: Any) -> Callable[[list[int | None]], None] | None:
        """A launch of what Triton has compiled; its interpreter compiles nothing."""
        kept = [tensor.data_ptr() for tensor in self._kept]
        if compiled is None or not BY_ADDRESSES or any(address % ALIGNMENT for address in kept):
            return None
        run, grid, function, facts = compiled.run, self._grid, compiled.function, compiled.packed_metadata
        stream, device, last = driver.active.get_current_stream, self._kept[0].get_device(), (*kept, *self._numbers)

        def launch(addresses: list[int | None]) -> None:
            run(*grid, stream(device), function, facts, None, None, None, *addresses, *last)

        return launch
