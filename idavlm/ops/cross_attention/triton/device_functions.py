"""Device functions that the kernels share: bounds of a segment, loads and stores of its rows, and products of tiles.

Tiles are ``[rows, BLOCK_D]``, where ``BLOCK_D`` is the next power of two of the head dimension. Columns past the head
dimension and rows past the end of the segment are read as zeros and not written.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether Triton's interpreter runs the kernels, on a CPU."""

# The interpreter also accepts plain functions. It spends half of its time preparing calls of jitted ones.
device_function = (lambda function: function) if INTERPRETED else triton.jit


@device_function
def segment_bounds(cu_seqlens, segment, length, RAGGED: tl.constexpr):
    """First row (int64) and number of rows of a segment. Without ``RAGGED`` every segment has ``length`` rows."""
    if RAGGED:
        first = tl.load(cu_seqlens + segment).to(tl.int64)
        rows = (tl.load(cu_seqlens + segment + 1).to(tl.int64) - first).to(tl.int32)
    else:
        first = tl.cast(segment, tl.int64) * length
        rows = length
    return first, rows


@device_function
def next_first_item(first_item, items, programs):
    """Index of the program's first item in the next segment, after its share of ``items`` from ``first_item`` on."""
    return (first_item + programs - items % programs) % programs


@device_function
def row_pointers(base, rows, stride, BLOCK_D: tl.constexpr):
    """Pointers ``[rows, BLOCK_D]`` to the elements of rows."""
    return base + rows[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@device_function
def row_mask(rows, num_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """``[rows, BLOCK_D]``: which elements are inside the segment and the head."""
    mask = rows[:, None] < num_rows
    if HEAD_DIM != BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    return mask


@device_function
def load_rows(base, rows, num_rows, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows through pointers."""
    mask = row_mask(rows, num_rows, HEAD_DIM, BLOCK_D)
    return tl.load(row_pointers(base, rows, stride, BLOCK_D), mask=mask, other=0.0)


@device_function
def store_rows(base, values, rows, num_rows, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store rows through pointers, cast to the dtype of the target."""
    values = cast(values, base.dtype.element_ty)
    tl.store(row_pointers(base, rows, stride, BLOCK_D), values, mask=row_mask(rows, num_rows, HEAD_DIM, BLOCK_D))


@device_function
def make_descriptor(
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
    """Tensor descriptor of segments of ``num_rows`` each. Rows past their end are read as zeros and not written.

    ``TMA`` is the number of its dimensions. 4: segments, heads, rows, columns. 2: rows of one segment, and the columns
    of all heads side by side. Triton specialises warps only for the latter; ``HEAD_DIM`` must then equal ``BLOCK_D``.
    """
    bound = tl.maximum(num_rows, 1)  # a descriptor needs at least one row; of an empty segment none is read
    if TMA == 4:
        descriptor = tl.make_tensor_descriptor(
            base,
            [num_segments, num_heads, bound, HEAD_DIM],
            [tl.cast(num_rows, tl.int64) * stride, head_stride, stride, 1],
            [1, 1, BLOCK, BLOCK_D],
        )
    else:
        columns = (num_heads - 1) * head_stride + HEAD_DIM
        descriptor = tl.make_tensor_descriptor(base, [bound, columns], [stride, 1], [BLOCK, BLOCK_D])
    return descriptor


@device_function
def segment_descriptor(
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
    """The descriptor of a segment: one of its own where lengths differ, so that the bounds are those of the segment."""
    if RAGGED or TMA == 2:
        base += first * stride
        descriptor = make_descriptor(base, 1, num_rows, stride, num_heads, head_stride, HEAD_DIM, BLOCK, BLOCK_D, TMA)
    else:
        descriptor = whole
    return descriptor


@device_function
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
    """Load ``[BLOCK, BLOCK_D]`` starting at row ``start`` of a segment.

    ``source`` is a descriptor, indexed by ``segment``, or a pointer to the first row of the segment and head.
    """
    if TMA == 4:
        tile = source.load([segment, head, start, 0]).reshape([BLOCK, BLOCK_D])
    elif TMA == 2:
        tile = source.load([start, head * head_stride])
    else:
        rows = start + tl.arange(0, BLOCK)
        tile = load_rows(source, rows, num_rows, stride, HEAD_DIM, BLOCK_D)
    return tile


@device_function
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
    """Store a tile; arguments as in :func:`read_rows`."""
    if TMA == 4:
        target.store([segment, head, start, 0], cast(values, target.dtype).reshape([1, 1, BLOCK, BLOCK_D]))
    elif TMA == 2:
        target.store([start, head * head_stride], cast(values, target.dtype))
    else:
        rows = start + tl.arange(0, BLOCK)
        store_rows(target, values, rows, num_rows, stride, HEAD_DIM, BLOCK_D)


@device_function
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
    """Keys plus the bias of their position, modulo the length of the bias."""
    if HAS_BIAS:
        mask = row_mask(rows, num_rows, HEAD_DIM, BLOCK_D)
        position = tl.load(row_pointers(bias, rows % bias_length, bias_stride, BLOCK_D), mask=mask, other=0.0)
        keys = cast(keys.to(tl.float32) + position.to(tl.float32), keys.dtype)
    return keys


@device_function
def group_one_hot(groups, rows, num_rows, GROUPS: tl.constexpr, dtype: tl.constexpr):
    """``[rows, GROUPS]``: 1 where the key of the row belongs to the group of the column, else 0."""
    group = tl.load(groups + rows, mask=rows < num_rows, other=-1)
    return (group[:, None] == tl.arange(0, GROUPS)[None, :]).to(dtype)


@device_function
def dot(a, b, PRECISION: tl.constexpr):
    """``a @ b`` in float32. The interpreter multiplies 16-bit tiles wrongly, so they are cast to float32 first."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@device_function
def cast(x, dtype: tl.constexpr):
    """``x.to(dtype)``, rounded to nearest. The interpreter truncates to bfloat16, so the value is rounded before."""
    if INTERPRETED and dtype == tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
