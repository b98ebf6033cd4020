"""Results kept in memory under a key made of their inputs, the ones used longest ago given up first."""

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Any

from torch import Tensor

ENTRY = 4096  # bytes that an entry takes beside its tensors, about


class ResultCache:
    """The results used last, as long as their tensors are within `limit` bytes altogether."""

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self._results: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def get(self, key: Hashable) -> Any | None:
        """The result under this key, or None."""
        if key not in self._results:
            return None
        self._results.move_to_end(key)
        return self._results[key][0]

    def put(self, key: Hashable, result: Any, tensors: Iterable[Tensor] = ()) -> None:
        """Keep a result that holds these tensors; not if it alone is larger than the limit."""
        size = ENTRY + sum(tensor.nbytes for tensor in tensors)
        if size > self.limit:
            return
        self._drop(key)
        self._results[key] = result, size
        self.bytes += size
        while self.bytes > self.limit:
            self._drop(next(iter(self._results)))

    def _drop(self, key: Hashable) -> None:
        self.bytes -= self._results.pop(key, (None, 0))[1]
