"""What a node gets that takes lists: pictures of any size, as batches or lists, and everything else as a list too."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from ..pulid.errors import InputError

Value = TypeVar("Value")


def rows(batches: Iterable[Tensor] | Tensor | None) -> list[Tensor]:
    """The pictures (H, W, C) of a list of batches, or its masks (H, W); of one batch, as a program may give it."""
    if isinstance(batches, Tensor):
        batches = [batches]
    return [row for batch in batches or () for row in batch]


def only(values: Sequence[Value], name: str) -> Value:
    """The value of an input that takes one. Raises InputError for a list of several."""
    if len(values) != 1:
        raise InputError(f"{name} takes one value, found a list of {len(values)}. Connect one of them.")
    return values[0]


def only_ones(**inputs: Sequence[Any]) -> list[Any]:
    """`only` of each, in their order."""
    return [only(values, name) for name, values in inputs.items()]


def by_size(pictures: Iterable[Tensor]) -> list[list[Tensor]]:
    """Pictures that fit into one batch together, the sizes in the order in which they come up."""
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for picture in pictures:
        groups.setdefault(tuple(picture.shape), []).append(picture)
    return list(groups.values())
