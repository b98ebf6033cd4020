"""`pulid.attention.fuse` by the kernels of attention_triton.py, for one site.

What depends on the shape of a batch alone is worked out once: the host has less time for a site than a card.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from . import attention_triton as kernels
from .attention import FACE_TOKENS, Fusion, HeadKV, fuse
from .triton_launch import Launch

log = logging.getLogger(__name__)

# Positions that a program works on at a time, and its warps; the quickest of those tried on an H100.
SUMS_BLOCK, SUMS_WARPS = 64, 4
PLAIN, PROJECTED = (64, 4), (32, 1)  # of the kernel that writes, without and with a projection
TABLE = 16  # rows of the table of sums: a program of the first kernel fills one
ROWS_BITS = 62  # of one number, in which the rows of keys and values travel that the images of a batch use
WIDTHS, MOST_TOKENS = (16, 32, 64, 128), 128  # of a head; of an identity
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def fits(kv: HeadKV) -> bool:
    """Whether the kernels take these keys and values, and queries of their dtype."""
    _, heads, tokens, width = kv.keys.shape
    steps = tokens * heads * width, width, heads * width, 1  # as SiteKV.prepare lays them out
    laid_out = kv.keys.stride() == kv.values.stride() == steps
    return kv.keys.dtype in DTYPES and width in WIDTHS and FACE_TOKENS <= tokens <= MOST_TOKENS and laid_out


@cache
def _tell(why: str) -> None:
    """Once in a process, and not for each of seventy sites."""
    log.warning("PuLID does without its fused kernels here: %s. Pictures are the same, steps slower.", why)


@dataclass(frozen=True)
class Plan:
    """What is launched for batches of one shape.

    table  numbers (float32) between the kernels: the sums, and behind them attention to the face tokens
    """

    table: int
    sums: Launch | None
    headless: Launch | None
    output: Launch


class Fused:
    """attention.fuse with keys and values that `fits`, on their device and in their dtype."""

    def __init__(self, kv: HeadKV, fusion: Fusion):
        self._kv, self._fusion = kv, fusion
        self._bits = max(1, (kv.rows - 1).bit_length())  # of ROWS_BITS, for each image
        self._plans: dict[tuple, Plan] = {}
        self._is_refused = False

    def __call__(
        self, q: Tensor, base: Tensor, rows: Sequence[int],
        strength: Tensor | None = None, mask: Tensor | None = None, overwrite: bool = False,
    ) -> Tensor:  # fmt: skip
        most, device = ROWS_BITS // self._bits, q.get_device()
        if len(rows) > most:
            parts = [slice(start, start + most) for start in range(0, len(rows), most)]
            masks = [mask if mask is None or len(mask) == 1 else mask[part] for part in parts]
            each = [(q[part], base[part], rows[part], strength, own) for part, own in zip(parts, masks, strict=True)]
            return torch.cat([self(*one, overwrite) for one in each])
        q, base, rows = q.contiguous(), base.contiguous(), tuple(rows)
        if torch.compiler.is_compiling():
            return self._launch(self._plan(q, rows, mask), q, base, strength, mask, overwrite)
        if device >= 0 and device != torch.cuda.current_device():  # which is the one that Triton launches on
            with torch.cuda.device(device):
                return self(q, base, rows, strength, mask, overwrite)
        masked, varied = mask is not None and (len(mask), mask.dtype), strength is not None and strength.dtype
        key = q.shape, rows, base.dtype, masked, varied
        if (plan := self._plans.get(key)) is not None:
            return self._launch(plan, q, base, strength, mask, overwrite)
        if not self._is_refused:
            plan = self._plan(q, rows, mask)
            try:
                out = self._launch(plan, q, base, strength, mask, overwrite)
            except OutOfResources as error:  # before the last kernel, which alone writes what others can see
                _tell(str(error))
                self._is_refused = True
            else:
                self._plans[key] = plan
                return out
        return fuse(q, base, self._kv, rows, self._fusion, strength, mask)

    def _launch(
        self, plan: Plan, q: Tensor, base: Tensor, strength: Tensor | None, mask: Tensor | None, overwrite: bool
    ) -> Tensor:
        table = None
        if plan.sums is not None:
            table = q.new_empty(plan.table, dtype=torch.float32)
            plan.sums(q, base, table)
        if plan.headless is not None:
            plan.headless(q, table)
        out = base if overwrite else torch.empty_like(base)
        plan.output(q, base, table, strength, mask, out)
        return out

    def _plan(self, q: Tensor, rows: tuple[int, ...], mask: Tensor | None) -> Plan:
        fusion, keys, values, zeros = self._fusion, self._kv.keys, self._kv.values, self._kv.zero_tokens
        batch, positions, channels = q.shape
        _, heads, kept, width = keys.shape
        packed = sum(row << (self._bits * image) for image, row in enumerate(rows))
        tokens = kept - bool(zeros)
        padded = max(16, 1 << (tokens - 1).bit_length())  # tokens, as a matrix product takes them
        of_head: tuple = tokens, kept, float(zeros), self._bits, heads, width, padded
        block, warps = PLAIN if fusion is Fusion.PLAIN else PROJECTED
        programs = -(-positions // block)
        steps = -(-positions // (SUMS_BLOCK * TABLE))
        summed = -(-positions // (SUMS_BLOCK * steps))
        masks = 0 if mask is None else 1 if len(mask) == 1 else 2
        sums = headless = None
        if fusion is not Fusion.PLAIN:
            by_head = FACE_TOKENS if fusion is Fusion.ORTHOGONAL_V2 else 0
            own: tuple = packed, positions, *of_head, by_head, SUMS_BLOCK, steps
            sums = Launch(kernels.sums, (batch * heads, summed, 1), (keys, values), own, SUMS_WARPS)
        sizes = packed, positions, summed, *of_head
        if fusion is Fusion.SHARED_V2:
            headless = Launch(kernels.headless, (batch, programs, 1), (keys,), (*sizes, FACE_TOKENS, block), warps)
        own = *sizes, fusion.value, masks, block, TABLE
        output = Launch(kernels.output, (batch * heads, programs, 1), (keys, values), own, warps)
        face = {Fusion.ORTHOGONAL_V2: batch * heads * positions, Fusion.SHARED_V2: batch * programs}.get(fusion, 0)
        return Plan(2 * batch * summed * channels + face, sums, headless, output)
