"""`pulid.attention.fuse` as two Triton kernels a site: the first sums over positions, the second writes the output.

q and base are read twice and the output is written once; nothing as large as an image's activations lies in between.
Both kernels compute the attention, since reading q again costs less than keeping what came of it. Sums go through a
small table and from there in a fixed order: the same input gives the same picture to the bit.

`fuse` in attention.py is the definition; fused.py launches these.
"""

import triton
import triton.language as tl


@triton.jit
def _row(rows, image, BITS: tl.constexpr):
    """The row of keys and values that an image of the batch uses: BITS of `rows` for each, the first one lowest."""
    return ((rows.to(tl.int64) >> (image * BITS)) & ((1 << BITS) - 1)).to(tl.int32)


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


@triton.jit(do_not_specialize=["rows"])
def sums(
    q, base, table, keys, values, rows, N, tokens, kept, zeros,
    BITS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
    FACE: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """table (2, B, programs, C): sums over a program's STEPS blocks of base * A and of base squared.

    With FACE tokens, there follows (B, H, N): the attention to them by unscaled logits.
    """
    image, head, program = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1)
    images, programs = tl.num_programs(0) // H, tl.num_programs(1)
    row = _row(rows, image, BITS)
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


@triton.jit(do_not_specialize=["rows"])
def headless(
    q, table, keys, rows, N, summed, tokens, kept, zeros,
    BITS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, T: tl.constexpr, FACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For SHARED_V2, behind the sums in the table: (B, programs), attention to the face tokens by logits summed over
    heads, over positions."""
    image, program = tl.program_id(0), tl.program_id(1)
    n = program * BLOCK + tl.arange(0, BLOCK)
    row = _row(rows, image, BITS)
    raw = tl.zeros((BLOCK, T), tl.float32)
    for head in range(H):
        k = tl.trans(_head(keys, row, head, kept, tokens, H, D, T))
        raw = tl.dot(tl.load(_tile(q, image, head, n, N, H, D), n[:, None] < N, 0.0), k, raw, input_precision="ieee")
    shares = tl.where(n < N, _to_face(raw, tokens, zeros, FACE, T), 0.0)
    face = table + 2 * tl.num_programs(0) * summed * H * D
    tl.store(face + image * tl.num_programs(1) + program, tl.sum(shares, 0))


@triton.jit(do_not_specialize=["rows"])
def output(
    q, base, table, strength, mask, out, keys, values, rows, N, summed, tokens, kept, zeros,
    BITS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
    FUSION: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """out = base + strength * mask * (A - (1 - m) * share * base), from a table of `summed` rows; FUSION by value."""
    image, head, program = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1)
    images = tl.num_programs(0) // H
    n = program * BLOCK + tl.arange(0, BLOCK)
    inside = n[:, None] < N
    row = _row(rows, image, BITS)
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
