"""`pulid.attention.fuse` as two Triton kernels a site: the first sums over positions, the second writes the output.

q and base are read twice and the output is written once; nothing as large as an image's activations lies in between.
Both kernels compute the attention, since reading q again costs less than keeping what came of it. Sums go through a
small table and from there in a fixed order: the same input gives the same picture to the bit.

`fuse` in attention.py is the definition; `fuse_for` in kernels.py says where this one stands in for it.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import FACE_TOKENS, Fusion, HeadKV
from .triton_launch import Launch

# Positions that a program works on at a time, and its warps; the quickest of those tried on an H100.
SUMS_BLOCK, SUMS_WARPS = 64, 4
PLAIN, PROJECTED = (64, 4), (32, 1)  # of the kernel that writes, without and with a projection
TABLE = 16  # rows of the table of sums: a program of the first kernel fills one
WIDTHS, MOST_TOKENS = (16, 32, 64, 128), 128  # of a head; of an identity
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def fits(kv: HeadKV) -> bool:
    """Whether the kernels take these keys and values, and queries of their dtype."""
    _, heads, tokens, width = kv.keys.shape
    steps = tokens * heads * width, width, heads * width, 1  # as SiteKV.prepare lays them out
    laid_out = kv.keys.stride() == kv.values.stride() == steps
    return kv.keys.dtype in DTYPES and width in WIDTHS and FACE_TOKENS <= tokens <= MOST_TOKENS and laid_out


@triton.jit
def _head(x, row, head, kept, tokens, H: tl.constexpr, D: tl.constexpr, T: tl.constexpr):
    """One head of keys or values (rows, kept, H, D): (T, D), zeros beyond `tokens`."""
    t = tl.arange(0, T)[:, None]
    return tl.load(x + ((row * kept + t) * H + head) * D + tl.arange(0, D)[None, :], mask=t < tokens, other=0.0)


@triton.jit
def _tile(x, image, head, n, N, H: tl.constexpr, D: tl.constexpr):
    """Positions n of one head of x (B, N, H, D): pointers (BLOCK, D), of which those where n < N may be used."""
    return x + image.to(tl.int64) * N * (H * D) + n[:, None] * (H * D) + head * D + tl.arange(0, D)[None, :]


@triton.jit
def _attention(logits, tokens, zeros, T: tl.constexpr):
    """Softmax of (BLOCK, T) over the first `tokens` and `zeros` tokens of logit 0, of which nothing else is needed."""
    logits = tl.where(tl.arange(0, T)[None, :] < tokens, logits, float("-inf"))
    most = tl.maximum(tl.max(logits, 1), tl.where(zeros > 0, 0.0, float("-inf")))
    raised = tl.exp(logits - most[:, None])
    return raised / (tl.sum(raised, 1) + zeros * tl.exp(-most))[:, None]


@triton.jit
def _to_face(logits, tokens, zeros, FACE: tl.constexpr, T: tl.constexpr):
    """The attention that goes to the face tokens: logits (BLOCK, T) -> (BLOCK,)."""
    return tl.sum(tl.where(tl.arange(0, T)[None, :] < FACE, _attention(logits, tokens, zeros, T), 0.0), 1)


@triton.jit
def _sums(
    q, base, keys, values, rows, table, N, tokens, kept, zeros,
    H: tl.constexpr, D: tl.constexpr, T: tl.constexpr, FACE: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """table (2, B, programs, C): sums over a program's STEPS blocks of base * A and of base squared.

    With FACE tokens, there follows (B, H, N): the attention to them by unscaled logits.
    """
    image, head, program = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1)
    images, programs = tl.num_programs(0) // H, tl.num_programs(1)
    row = tl.load(rows + image)
    k, v = _head(keys, row, head, kept, tokens, H, D, T), _head(values, row, head, kept, tokens, H, D, T)
    through, squares = tl.zeros((T, D), tl.float32), tl.zeros((BLOCK, D), tl.float32)
    for step in range(STEPS):
        n = (program * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = n[:, None] < N
        x = tl.load(_tile(q, image, head, n, N, H, D), inside, 0.0)
        b = tl.load(_tile(base, image, head, n, N, H, D), inside, 0.0)
        raw = tl.dot(x, tl.trans(k), input_precision="ieee")
        attention = _attention(raw * (D**-0.5), tokens, zeros, T).to(v.dtype)
        through = tl.dot(tl.trans(attention), b, through, input_precision="ieee")
        squares += b.to(tl.float32) * b.to(tl.float32)
        if FACE:
            face = table + 2 * images * programs * H * D + (image * H + head) * N + n
            tl.store(face, _to_face(raw, tokens, zeros, FACE, T), n < N)
    into = table + ((image * programs + program) * H + head) * D + tl.arange(0, D)
    tl.store(into, tl.sum(through * v.to(tl.float32), 0))
    tl.store(into + images * programs * H * D, tl.sum(squares, 0))


@triton.jit
def _headless(
    q, keys, rows, face, N, tokens, kept, zeros,
    H: tl.constexpr, D: tl.constexpr, T: tl.constexpr, FACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """face (B, programs) for SHARED_V2: attention to the face tokens by logits summed over heads, over positions."""
    image, program = tl.program_id(0), tl.program_id(1)
    n = program * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + image)
    raw = tl.zeros((BLOCK, T), tl.float32)
    for head in range(H):
        k = tl.trans(_head(keys, row, head, kept, tokens, H, D, T))
        raw = tl.dot(tl.load(_tile(q, image, head, n, N, H, D), n[:, None] < N, 0.0), k, raw, input_precision="ieee")
    shares = tl.where(n < N, _to_face(raw, tokens, zeros, FACE, T), 0.0)
    tl.store(face + image * tl.num_programs(1) + program, tl.sum(shares, 0))


@triton.jit
def _output(
    q, base, keys, values, rows, table, strength, mask, out, N, summed, tokens, kept, zeros,
    H: tl.constexpr, D: tl.constexpr, T: tl.constexpr, FUSION: tl.constexpr, MASK: tl.constexpr,
    BLOCK: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """out = base + strength * mask * (A - (1 - m) * share * base), from a table of `summed` rows; FUSION by value."""
    image, head, program = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1)
    images = tl.num_programs(0) // H
    n = program * BLOCK + tl.arange(0, BLOCK)
    inside = n[:, None] < N
    row = tl.load(rows + image)
    b = tl.load(_tile(base, image, head, n, N, H, D), inside, 0.0).to(tl.float32)
    x = tl.load(_tile(q, image, head, n, N, H, D), inside, 0.0)
    k, v = _head(keys, row, head, kept, tokens, H, D, T), _head(values, row, head, kept, tokens, H, D, T)
    raw = tl.dot(x, tl.trans(k), input_precision="ieee")
    added = tl.dot(_attention(raw * (D**-0.5), tokens, zeros, T).to(v.dtype), v, input_precision="ieee")
    if FUSION != "none":
        i = tl.arange(0, TABLE)[:, None]
        sums = table + ((image * summed + i) * H + head) * D + tl.arange(0, D)[None, :]
        dot = tl.sum(tl.load(sums, i < summed, 0.0), 0)
        squares = tl.sum(tl.load(sums + images * summed * H * D, i < summed, 0.0), 0)
        share = dot / tl.maximum(squares, 1e-30)  # 0 for a channel that is zero everywhere
        face = table + 2 * images * summed * H * D
        if FUSION == "ortho":
            added -= b * share[None, :]
        elif FUSION == "ortho_v2":
            m = tl.zeros((BLOCK,), tl.float32)
            for each in tl.static_range(H):
                m += tl.load(face + (image * H + each) * N + n, n < N, 0.0)
            added -= b * share[None, :] * (1 - m / H)[:, None]
        else:
            m_all = 0.0
            for each in range(tl.num_programs(1)):
                m_all += tl.load(face + image * tl.num_programs(1) + each)
            added -= b * share[None, :] * (1 - m_all / N)
    if strength is not None:
        added *= tl.load(strength).to(tl.float32)
    if MASK:
        added *= tl.load(mask + (image * N if MASK == 2 else 0) + n, n < N, 0.0).to(tl.float32)[:, None]
    tl.store(_tile(out, image, head, n, N, H, D), (b + added).to(out.dtype.element_ty), inside)


@lru_cache(256)
def _on(device: torch.device, rows: tuple[int, ...]) -> Tensor:
    """Kept, since a copy to a GPU makes the host wait: int32, as long as the batch."""
    return torch.tensor(rows, dtype=torch.int32, device=device)


SUMS, HEADLESS, OUTPUT = Launch(_sums), Launch(_headless), Launch(_output)


def fuse(
    q: Tensor, base: Tensor, kv: HeadKV, rows: Sequence[int], fusion: Fusion,
    strength: Tensor | None = None, mask: Tensor | None = None, overwrite: bool = False,
) -> Tensor:  # fmt: skip
    """attention.fuse, where kv `fits`: on its device and in its dtype."""
    q, base = q.contiguous(), base.contiguous()
    batch, positions, channels = q.shape
    _, heads, kept, width = kv.keys.shape
    tokens, zeros = kept - bool(kv.zero_tokens), float(kv.zero_tokens)
    block, warps = PLAIN if fusion is Fusion.PLAIN else PROJECTED
    programs = -(-positions // block)
    steps = -(-positions // (SUMS_BLOCK * TABLE))
    summed = -(-positions // (SUMS_BLOCK * steps))
    which, table = _on(q.device, tuple(rows)), None
    of_head = heads, width, max(16, 1 << (tokens - 1).bit_length())
    if fusion is not Fusion.PLAIN:
        sums = 2 * batch * summed * channels
        face = {Fusion.ORTHOGONAL_V2: batch * heads * positions, Fusion.SHARED_V2: batch * programs}.get(fusion, 0)
        table = q.new_empty(sums + face, dtype=torch.float32)
        by_head = FACE_TOKENS if fusion is Fusion.ORTHOGONAL_V2 else 0
        SUMS(
            (batch * heads, summed, 1), (q, base, kv.keys, kv.values, which, table),
            (positions, tokens, kept, zeros, *of_head, by_head, SUMS_BLOCK, steps), SUMS_WARPS,
        )  # fmt: skip
        if fusion is Fusion.SHARED_V2:
            HEADLESS(
                (batch, programs, 1), (q, kv.keys, which, table[sums:]),
                (positions, tokens, kept, zeros, *of_head, FACE_TOKENS, block), warps,
            )  # fmt: skip
    out = base if overwrite else torch.empty_like(base)
    masks = 0 if mask is None else 1 if len(mask) == 1 else 2
    OUTPUT(
        (batch * heads, programs, 1), (q, base, kv.keys, kv.values, which, table, strength, mask, out),
        (positions, summed, tokens, kept, zeros, *of_head, fusion.value, masks, block, TABLE), warps,
    )  # fmt: skip
    return out
