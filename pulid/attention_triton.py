"""`pulid.attention.fuse` as two Triton kernels a site: the first sums over positions, the second writes the output.

q and base are read twice and the output is written once; nothing as large as an image's activations lies in between.
Both kernels compute the attention, since reading q again costs less than keeping what came of it. Sums go from each
block of positions into a small table and from there in a fixed order: the same input gives the same picture to the bit.

`fuse` in attention.py is the definition; `fuse_for` there says where this one stands in for it.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import FACE_TOKENS, TINY, Fusion, HeadKV

BLOCK, WARPS = 128, 4  # positions that one program works on, and by how many warps
TABLE = 32  # blocks whose sums are added up at a time
WIDTHS = (16, 32, 64, 128)  # of a head
MOST_TOKENS = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def fits(kv: HeadKV) -> bool:
    """Whether the kernels take these keys and values, and queries of their dtype."""
    *_, tokens, width = kv.keys.shape
    return kv.keys.dtype in DTYPES and width in WIDTHS and FACE_TOKENS <= tokens <= MOST_TOKENS


@triton.jit
def _positions(image, head, block, N, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Which positions a program has, which of them there are, where the image lies, and their head in it (BLOCK, D)."""
    n = block * BLOCK + tl.arange(0, BLOCK)
    return n, n < N, image.to(tl.int64) * N * (H * D), n[:, None] * (H * D) + head * D + tl.arange(0, D)[None, :]


@triton.jit
def _tokens(x, row, head, tokens, row_step, head_step, token_step, T: tl.constexpr, D: tl.constexpr):
    """One head of keys or values, (T, D), zeros beyond `tokens`."""
    t = tl.arange(0, T)
    at = row * row_step + head * head_step + t[:, None] * token_step + tl.arange(0, D)[None, :]
    return tl.load(x + at, mask=t[:, None] < tokens, other=0.0)


@triton.jit
def _log_counts(counts, tokens, T: tl.constexpr):
    """(1, T) float32, minus infinity beyond `tokens`."""
    t = tl.arange(0, T)
    return tl.load(counts + t, mask=t < tokens, other=float("-inf")).to(tl.float32)[None, :]


@triton.jit
def _softmax(logits):
    raised = tl.exp(logits - tl.max(logits, 1)[:, None])
    return raised / tl.sum(raised, 1)[:, None]


@triton.jit
def _beyond_face(logits, FACE: tl.constexpr, T: tl.constexpr):
    """The attention that does not go to the face tokens: logits (POSITIONS, T) -> (POSITIONS,)."""
    return tl.sum(tl.where(tl.arange(0, T)[None, :] < FACE, 0.0, _softmax(logits)), 1)


@triton.jit
def _sums(
    q, base, keys, values, counts, rows, table, elsewhere, N, tokens, row_step, head_step, token_step, scale,
    H: tl.constexpr, D: tl.constexpr, T: tl.constexpr, FACE: tl.constexpr, BY_HEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """table (2, B, blocks, C): sums over a block's positions of base * A and of base squared.

    With BY_HEAD, elsewhere (B, H, N): the attention beyond the face tokens by unscaled logits.
    """
    image, head, block = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1)
    n, inside, start, at = _positions(image, head, block, N, H, D, BLOCK)
    row = tl.load(rows + image)
    k = _tokens(keys, row, head, tokens, row_step, head_step, token_step, T, D)
    v = _tokens(values, row, head, tokens, row_step, head_step, token_step, T, D)
    lc = _log_counts(counts, tokens, T)
    raw = tl.dot(tl.load(q + start + at, mask=inside[:, None], other=0.0), tl.trans(k), input_precision="ieee")
    attended = tl.dot(_softmax(raw * scale + lc).to(v.dtype), v, input_precision="ieee")
    b = tl.load(base + start + at, mask=inside[:, None], other=0.0).to(tl.float32)
    into = table + ((image * tl.num_programs(1) + block) * H + head) * D + tl.arange(0, D)
    tl.store(into, tl.sum(b * attended, 0))
    tl.store(into + tl.num_programs(0) * tl.num_programs(1) * D, tl.sum(b * b, 0))
    if BY_HEAD:
        tl.store(elsewhere + (image * H + head) * N + n, _beyond_face(raw + lc, FACE, T), mask=inside)


@triton.jit
def _headless(
    q, keys, counts, rows, elsewhere, N, tokens, row_step, head_step, token_step,
    H: tl.constexpr, D: tl.constexpr, T: tl.constexpr, FACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """elsewhere (B, blocks) for SHARED_V2: summed over a block's positions, by logits summed over heads."""
    image, block = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + image)
    _, inside, start, at = _positions(image, 0, block, N, H, D, BLOCK)
    raw = tl.zeros((BLOCK, T), tl.float32)
    for head in range(H):
        k = _tokens(keys, row, head, tokens, row_step, head_step, token_step, T, D)
        x = tl.load(q + start + head * D + at, mask=inside[:, None], other=0.0)
        raw += tl.dot(x, tl.trans(k), input_precision="ieee")
    beyond = _beyond_face(raw + _log_counts(counts, tokens, T), FACE, T)
    tl.store(elsewhere + image * tl.num_programs(1) + block, tl.sum(tl.where(inside, beyond, 0.0), 0))


@triton.jit
def _output(
    q, base, keys, values, counts, rows, table, elsewhere, strength, mask, out, N, mask_step, tokens,
    row_step, head_step, token_step, scale, tiny,
    H: tl.constexpr, D: tl.constexpr, T: tl.constexpr, FUSION: tl.constexpr, BLOCK: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """out = base + strength * mask * (A - elsewhere * share * base), share from `table`; FUSION is a Fusion's value."""
    image, head, block = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1)
    blocks = tl.num_programs(1)
    n, inside, start, at = _positions(image, head, block, N, H, D, BLOCK)
    row = tl.load(rows + image)
    k = _tokens(keys, row, head, tokens, row_step, head_step, token_step, T, D)
    v = _tokens(values, row, head, tokens, row_step, head_step, token_step, T, D)
    raw = tl.dot(tl.load(q + start + at, mask=inside[:, None], other=0.0), tl.trans(k), input_precision="ieee")
    attention = _softmax(raw * scale + _log_counts(counts, tokens, T))
    added = tl.dot(attention.to(v.dtype), v, input_precision="ieee")
    b = tl.load(base + start + at, mask=inside[:, None], other=0.0).to(tl.float32)
    if FUSION != "none":
        dot, square = tl.zeros((D,), tl.float32), tl.zeros((D,), tl.float32)
        for first in range(0, blocks, TABLE):
            i = first + tl.arange(0, TABLE)
            sums = table + ((image * blocks + i)[:, None] * H + head) * D + tl.arange(0, D)[None, :]
            known = (i < blocks)[:, None]
            dot += tl.sum(tl.load(sums, mask=known, other=0.0), 0)
            square += tl.sum(tl.load(sums + tl.num_programs(0) * blocks * D, mask=known, other=0.0), 0)
        projected = b * (dot / (square + N * tiny))[None, :]
        if FUSION == "ortho_v2":
            beyond = tl.zeros((BLOCK,), tl.float32)
            for each in tl.static_range(H):
                beyond += tl.load(elsewhere + (image * H + each) * N + n, mask=inside, other=0.0)
            projected *= (beyond / H)[:, None]
        elif FUSION != "ortho":
            beyond_all = 0.0
            for each in range(blocks):
                beyond_all += tl.load(elsewhere + image * blocks + each)
            projected *= beyond_all / N
        added -= projected
    if strength is not None:
        added *= tl.load(strength).to(tl.float32)
    if mask is not None:
        added *= tl.load(mask + image * mask_step + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    tl.store(out + start + at, (b + added).to(out.dtype.element_ty), mask=inside[:, None])


@lru_cache(256)
def _on(device: torch.device, rows: tuple[int, ...]) -> Tensor:
    """Kept, since a copy to a GPU makes the host wait: int32, as long as the batch."""
    return torch.tensor(rows, dtype=torch.int32, device=device)


def fuse(
    q: Tensor,
    base: Tensor,
    kv: HeadKV,
    rows: Sequence[int],
    fusion: Fusion,
    strength: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """attention.fuse, where kv `fits`: on its device and in its dtype."""
    q, base = q.contiguous(), base.contiguous()
    batch, positions, channels = q.shape
    _, heads, tokens, width = kv.keys.shape
    blocks = triton.cdiv(positions, BLOCK)
    steps = kv.keys.stride()[:3]
    assert steps == kv.values.stride()[:3] and kv.keys.stride(3) == kv.values.stride(3) == 1
    which = _on(q.device, tuple(rows))
    sizes = {"H": heads, "D": width, "T": max(16, triton.next_power_of_2(tokens)), "BLOCK": BLOCK, "num_warps": WARPS}
    out, table, elsewhere = torch.empty_like(base), None, None
    if fusion is not Fusion.PLAIN:
        table = q.new_empty((2, batch, blocks, channels), dtype=torch.float32)
        if fusion is Fusion.ORTHOGONAL_V2:
            elsewhere = q.new_empty((batch, heads, positions), dtype=torch.float32)
        _sums[batch * heads, blocks](
            q, base, kv.keys, kv.values, kv.log_counts, which, table, elsewhere, positions, tokens, *steps, width**-0.5,
            FACE=FACE_TOKENS, BY_HEAD=elsewhere is not None, **sizes,
        )  # fmt: skip
    if fusion is Fusion.SHARED_V2:
        elsewhere = q.new_empty((batch, blocks), dtype=torch.float32)
        _headless[batch, blocks](
            q, kv.keys, kv.log_counts, which, elsewhere, positions, tokens, *steps, FACE=FACE_TOKENS, **sizes
        )
    mask_step = 0 if mask is None or len(mask) == 1 else positions
    _output[batch * heads, blocks](
        q, base, kv.keys, kv.values, kv.log_counts, which, table, elsewhere, strength, mask, out, positions, mask_step,
        tokens, *steps, width**-0.5, TINY, FUSION=fusion.value, TABLE=TABLE, **sizes,
    )  # fmt: skip
    return out
