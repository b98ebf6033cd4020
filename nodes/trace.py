"""A batch of latents that remembers where each of its pixels comes from, whatever other packs do with it.

Tilers cut a batch into pieces and put these together in an order of their own. Every operation that moves pixels is
made a second time, on a small map on the CPU; no value is read from the device, so nothing waits for it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

# What moves pixels; the map of origins follows it.
MOVES = {
    "__getitem__", "cat", "chunk", "clone", "concat", "concatenate", "contiguous", "expand", "expand_as",
    "flatten", "flip", "fliplr", "flipud", "gather", "index_select", "moveaxis", "movedim", "narrow", "permute",
    "repeat", "repeat_interleave", "reshape", "roll", "rot90", "select", "split", "split_with_sizes", "squeeze",
    "stack", "swapaxes", "swapdims", "take_along_dim", "tensor_split", "tile", "transpose", "unbind", "unflatten",
    "unfold", "unsqueeze", "view", "view_as", "vsplit", "hsplit",
}  # fmt: skip
NEW = ("_like", "new_")  # in the names of what only takes over shape and type
UNKNOWN = -1
ROW, Y, BITS = 40, 20, (1 << 20) - 1  # an origin is row << ROW | y << Y | x


@dataclass(frozen=True, eq=False)
class Origin:
    """Where one row of a traced batch comes from: a row of the earlier batch, and there its pixels' places.

    ys (h,), xs (w,)  places in the earlier row, one for each line and column of this one
    """

    row: int
    ys: np.ndarray
    xs: np.ndarray

    @property
    def key(self) -> tuple[int, bytes, bytes]:
        """Equal for equal origins."""
        return self.row, self.ys.tobytes(), self.xs.tobytes()


class Traced(Tensor):
    """A batch, and the map of where in an earlier one its values come from.

    origins  of the same shape; or (B, 1, 1) row numbers where rows alone are traced
    """

    origins: Tensor

    @classmethod
    def of(cls, batch: Tensor) -> "Traced":
        """Of latents (B, C, H, W)."""
        rows, _, height, width = batch.shape
        row, y, x = torch.arange(rows) << ROW, torch.arange(height) << Y, torch.arange(width)
        return cls._with(batch, (row[:, None, None] | y[:, None] | x).unsqueeze(1).expand(batch.shape))

    @classmethod
    def rows_of(cls, batch: Tensor) -> "Traced":
        """Of (B, N, C), of which rows alone are followed."""
        return cls._with(batch, torch.arange(len(batch)).view(-1, 1, 1))

    @classmethod
    def _with(cls, batch: Tensor, origins: Tensor) -> "Traced":
        traced = batch.as_subclass(cls)
        traced.origins = origins
        return traced

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Sequence, args: Sequence = (), kwargs: Mapping | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*tree_map(plain, args), **tree_map(plain, kwargs))
            first = next(one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Traced))
            name = function.__name__
            if name in ("__setitem__", "copy_") and first is args[0]:
                first.origins = first.origins.clone()  # it may be a view
                function(first.origins, *_maps(args[1:], first))
            if name in MOVES or (name == "__get__" and isinstance(result, Tensor)):  # .mT and its like
                try:
                    moved = function(*_maps(args, first), **_maps(kwargs, first))
                except (RuntimeError, IndexError):  # this cannot be done to rows alone
                    return result
                return tree_map(partial(_joined, first), result, moved)
            same = isinstance(result, Tensor) and result.shape == first.shape
            return cls._with(result, first.origins) if same and not any(part in name for part in NEW) else result


def _joined(first: Traced, result: Any, origins: Any) -> Any:
    """The result of an operation with its map, where the operation has done the same to both."""
    if not isinstance(result, Tensor):
        return result
    if first.origins.shape == first.shape:
        return Traced._with(result, origins) if origins.shape == result.shape else result
    rows = origins.ndim == 3 and result.ndim == 3 and len(origins) == len(result)
    return Traced._with(result, origins[:, :1, :1]) if rows else result


def plain(value: Any) -> Any:
    """The tensor itself, without its map; anything else as it is."""
    return value.as_subclass(Tensor) if isinstance(value, Traced) else value


def _maps(values: Any, first: Traced) -> Any:
    """The arguments of an operation, with the maps in place of traced batches; of other batches nothing is known."""

    def map_of(value: Any) -> Any:
        if isinstance(value, Traced):
            return value.origins
        if isinstance(value, Tensor) and value.is_floating_point():
            shape = value.shape if first.origins.shape == first.shape else (*value.shape[:1], 1, 1)
            return torch.full((), UNKNOWN).expand(shape)
        return value.cpu() if isinstance(value, Tensor) else value

    return tree_map(map_of, values)


def origins_of(batch: Traced) -> list[Origin] | None:
    """The origin of every row; None where a row is no rectangle of one earlier row, in whatever order of its lines."""
    if batch.ndim != 4 or not batch.shape[1]:
        return None
    places = batch.origins[:, 0].numpy()  # (B, H, W)
    row, ys, xs = places >> ROW, places >> Y & BITS, places & BITS
    rectangular = (row == row[:, :1, :1]).all() and (ys == ys[:, :, :1]).all() and (xs == xs[:, :1]).all()
    if not rectangular or (places == UNKNOWN).any():
        return None
    return [Origin(int(r[0, 0]), y[:, 0], x[0]) for r, y, x in zip(row, ys, xs, strict=True)]
