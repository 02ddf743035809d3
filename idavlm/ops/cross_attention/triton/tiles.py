"""What the kernels share: where a segment lies, how its rows are read and written, and products of tiles.

Tiles are ``[rows, BLOCK_D]`` with ``BLOCK_D`` the next power of two of the head's width; columns behind it and rows
behind the segment's end are read as zeros and not written.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# The interpreter takes plain functions too, and would spend half its time in preparing calls of others.
inlined = (lambda function: function) if INTERPRETED else triton.jit


@inlined
def segment_span(cu_seqlens, segment, length, RAGGED: tl.constexpr):
    """First row (int64) and number of rows of a segment; without ``RAGGED`` all have ``length`` rows."""
    if RAGGED:
        first = tl.load(cu_seqlens + segment).to(tl.int64)
        rows = (tl.load(cu_seqlens + segment + 1).to(tl.int64) - first).to(tl.int32)
    else:
        first = tl.cast(segment, tl.int64) * length
        rows = length
    return first, rows


@inlined
def next_turn(turn, items, programs):
    """Which item of the next segment is this program's first, when ``items`` were dealt from the ``turn``-th on."""
    return (turn + programs - items % programs) % programs


@inlined
def row_pointers(base, rows, stride, BLOCK_D: tl.constexpr):
    return base + rows[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@inlined
def row_mask(rows, num_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    mask = rows[:, None] < num_rows
    if HEAD_DIM != BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    return mask


@inlined
def load_rows(base, rows, num_rows, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    mask = row_mask(rows, num_rows, HEAD_DIM, BLOCK_D)
    return tl.load(row_pointers(base, rows, stride, BLOCK_D), mask=mask, other=0.0)


@inlined
def store_rows(base, values, rows, num_rows, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    values = narrow(values, base.dtype.element_ty)
    tl.store(row_pointers(base, rows, stride, BLOCK_D), values, mask=row_mask(rows, num_rows, HEAD_DIM, BLOCK_D))


@inlined
def describe(
    base,
    num_segments,
    num_rows,
    stride,
    num_heads,
    head_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    """Tensor descriptor of segments of ``num_rows`` each: the hardware reads zeros behind them, and writes nothing.

    ``TMA`` counts its dimensions. 4: segments, heads, rows, columns. 2: rows of one segment, and columns of all heads,
    one beside the other, which is what Triton can specialise warps for; heads must then fill their tile.
    """
    bound = tl.maximum(num_rows, 1)  # 0 is none; then no row is asked for
    if TMA == 4:
        found = tl.make_tensor_descriptor(
            base,
            [num_segments, num_heads, bound, HEAD_DIM],
            [tl.cast(num_rows, tl.int64) * stride, head_stride, stride, 1],
            [1, 1, BLOCK, BLOCK_D],
        )
    else:
        columns = (num_heads - 1) * head_stride + HEAD_DIM
        found = tl.make_tensor_descriptor(base, [bound, columns], [stride, 1], [BLOCK, BLOCK_D])
    return found


@inlined
def segment_rows(
    whole,
    base,
    first,
    num_rows,
    stride,
    num_heads,
    head_stride,
    RAGGED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    """The descriptor to read a segment by: its own where segments differ in length, so that its bounds are theirs."""
    if RAGGED or TMA == 2:
        base += first * stride
        found = describe(base, 1, num_rows, stride, num_heads, head_stride, HEAD_DIM, BLOCK, BLOCK_D, TMA)
    else:
        found = whole
    return found


@inlined
def read_rows(
    source,
    segment,
    head,
    start,
    num_rows,
    stride,
    head_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    """``[BLOCK, BLOCK_D]`` from row ``start`` of a segment on.

    ``source`` is a descriptor, in which ``segment`` counts, or the pointer to the segment's first row of that head.
    """
    if TMA == 4:
        tile = source.load([segment, head, start, 0]).reshape([BLOCK, BLOCK_D])
    elif TMA == 2:
        tile = source.load([start, head * head_stride])
    else:
        rows = start + tl.arange(0, BLOCK)
        tile = load_rows(source, rows, num_rows, stride, HEAD_DIM, BLOCK_D)
    return tile


@inlined
def write_rows(
    target,
    values,
    segment,
    head,
    start,
    num_rows,
    stride,
    head_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    """The opposite of :func:`read_rows`."""
    if TMA == 4:
        target.store([segment, head, start, 0], narrow(values, target.dtype).reshape([1, 1, BLOCK, BLOCK_D]))
    elif TMA == 2:
        target.store([start, head * head_stride], narrow(values, target.dtype))
    else:
        rows = start + tl.arange(0, BLOCK)
        store_rows(target, values, rows, num_rows, stride, HEAD_DIM, BLOCK_D)


@inlined
def add_bias(
    keys,
    bias,
    rows,
    num_rows,
    bias_length,
    bias_stride,
    HAS_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Keys plus the bias of their position; a segment longer than the bias goes through it again."""
    if HAS_BIAS:
        mask = row_mask(rows, num_rows, HEAD_DIM, BLOCK_D)
        position = tl.load(row_pointers(bias, rows % bias_length, bias_stride, BLOCK_D), mask=mask, other=0.0)
        keys = narrow(keys.to(tl.float32) + position.to(tl.float32), keys.dtype)
    return keys


@inlined
def membership(groups, rows, num_rows, GROUPS: tl.constexpr, dtype: tl.constexpr):
    """``[rows, GROUPS]``: 1 where the key of a row belongs to the group of a column."""
    group = tl.load(groups + rows, mask=rows < num_rows, other=-1)
    return (group[:, None] == tl.arange(0, GROUPS)[None, :]).to(dtype)


@inlined
def product(a, b, PRECISION: tl.constexpr):
    """``a @ b`` in float32. The interpreter multiplies 16-bit tiles wrongly, so it gets them in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@inlined
def narrow(x, dtype: tl.constexpr):
    """``x.to(dtype)``, rounded to the nearest. The interpreter cuts bfloat16 off, so the rounding comes before."""
    if INTERPRETED and dtype == tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
