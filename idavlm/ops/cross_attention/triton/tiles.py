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
def load_keys(
    base,
    bias,
    rows,
    num_rows,
    stride,
    bias_length,
    bias_stride,
    HAS_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of keys plus the bias of their position; a segment longer than the bias goes through it again."""
    keys = load_rows(base, rows, num_rows, stride, HEAD_DIM, BLOCK_D)
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
