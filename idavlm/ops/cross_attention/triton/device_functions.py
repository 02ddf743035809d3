"""The arguments of the kernels, and the device functions that the kernels share.

A tile holds rows of one segment and one head, ``[rows, BLOCK_D]``, where ``BLOCK_D`` is the next power of two of the
head dimension. Columns past the head dimension and rows past the end of the segment are read as zeros and not written.
Offsets are computed in 64 bits, so neither a tensor nor a segment of a strided view is limited to 2^31 elements.
"""

import os
from typing import Any, NamedTuple

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether Triton's interpreter runs the kernels, on a CPU."""

LOG2_E = tl.constexpr(1.4426950408889634)

# The interpreter also accepts plain functions. It spends half of its time preparing calls of jitted ones.
device_function = (lambda function: function) if INTERPRETED else triton.jit


class KernelOptions(NamedTuple):
    """Options that a kernel is compiled for."""

    RAGGED_Q: bool  # segments of queries differ in length; otherwise cu_seqlens_q is not read
    RAGGED_K: bool  # the same for keys
    SHARED_Q: bool  # all segments use the same queries
    HAS_BIAS: bool  # a bias is added to the keys
    GROUPS: int  # number of groups, rounded up to a power of two; 0 without sums over groups of keys
    HEAD_DIM: int
    BLOCK_D: int  # width of a tile
    PRECISION: str  # input_precision of tl.dot
    FUSE_DQ: bool = False  # bwd_dkdv also accumulates the gradient of the queries
    BLOCK_Q: int = 0  # queries of a tile
    BLOCK_K: int = 0  # keys of a tile


class Rows(NamedTuple):
    """Rows ``[T, H, width]`` of a tensor; the last stride is 1."""

    data: Any
    stride: Any
    head_stride: Any


class Args(NamedTuple):
    """Arguments of every kernel. A kernel ignores those that it does not need."""

    q: Rows  # [Tq, H, D], or [Lq, H, D] with SHARED_Q
    k: Rows  # [Tk, H, D]
    v: Rows  # [Tk, H, D]
    key_bias: Any  # [L, H, D]
    key_groups: Any  # [Tk]
    cu_seqlens_q: Any  # [N + 1]
    cu_seqlens_k: Any  # [N + 1]
    out: Any  # [Tq, H, D]
    sums: Any  # [Tq, H, G] float32: weights summed over groups of keys
    lse: Any  # [H, Tq] float32: log2 of the sum of exp(scores)
    grad_out: Any  # as out
    grad_sums: Any  # as sums
    delta: Any  # as lse: mean of the gradients of a query's weights under these weights
    grad_q: Any  # as q; float32 with FUSE_DQ; [parts, Lq, H, D] float32 in bwd_dq_shared
    grad_k: Any  # as k
    grad_v: Any  # as v
    scale: Any
    num_heads: Any
    num_rows: Any  # queries of all segments
    length_q: Any  # queries of the longest segment
    length_k: Any  # keys of the longest segment
    num_segments: Any
    bias_length: Any
    num_groups: Any
    num_blocks: Any = 0  # tiles of the longest segment


class Segment(NamedTuple):
    """A segment: first row (int64) and number of rows. ``source_q``: first row of its queries in ``q``."""

    source_q: Any
    first_q: Any
    rows_q: Any
    first_k: Any
    rows_k: Any


# --- Which part of the work ---


@device_function
def block_of_program(BLOCK: tl.constexpr, args, OPTIONS: tl.constexpr):
    """The segment, the head, and the rows of the segment that this program computes. Grid: blocks, heads."""
    program = tl.program_id(0)
    segment = load_segment(program // args.num_blocks, args, OPTIONS)
    start = (program % args.num_blocks) * BLOCK
    return segment, tl.program_id(1).to(tl.int64), start


@device_function
def load_segment(number, args, OPTIONS: tl.constexpr):
    """The :class:`Segment` with this number."""
    first_q, rows_q = _bounds(args.cu_seqlens_q, number, args.length_q, OPTIONS.RAGGED_Q)
    first_k, rows_k = _bounds(args.cu_seqlens_k, number, args.length_k, OPTIONS.RAGGED_K)
    source_q = first_q * 0 if OPTIONS.SHARED_Q else first_q
    return Segment(source_q, first_q, rows_q, first_k, rows_k)


@device_function
def _bounds(cu_seqlens, segment, length, RAGGED: tl.constexpr):
    if RAGGED:
        first = tl.load(cu_seqlens + segment).to(tl.int64)
        rows = (tl.load(cu_seqlens + segment + 1).to(tl.int64) - first).to(tl.int32)
    else:
        first = tl.cast(segment, tl.int64) * length
        rows = length
    return first, rows


# --- Tiles ---


@device_function
def contiguous(data, width, args):
    """:class:`Rows` of a contiguous tensor ``[T, H, width]``."""
    return Rows(data, args.num_heads * width, width)


@device_function
def elements(x, first, head, rows, OPTIONS: tl.constexpr):
    """Pointers ``[rows, BLOCK_D]`` to rows of a segment that starts at row ``first``."""
    # The offsets are added one after the other; their sum takes more registers.
    base = x.data + first * x.stride + head * x.head_stride
    return base + rows.to(tl.int64)[:, None] * x.stride + tl.arange(0, OPTIONS.BLOCK_D)[None, :]


@device_function
def exist(rows, num_rows, OPTIONS: tl.constexpr):
    """``[rows, BLOCK_D]``: which elements are inside the segment and the head."""
    mask = rows[:, None] < num_rows
    if OPTIONS.HEAD_DIM != OPTIONS.BLOCK_D:
        mask = mask & (tl.arange(0, OPTIONS.BLOCK_D)[None, :] < OPTIONS.HEAD_DIM)
    return mask


@device_function
def load_rows(x, first, head, rows, num_rows, OPTIONS: tl.constexpr):
    """A tile of ``x``."""
    return tl.load(elements(x, first, head, rows, OPTIONS), mask=exist(rows, num_rows, OPTIONS), other=0.0)


@device_function
def store_rows(x, first, head, rows, num_rows, values, OPTIONS: tl.constexpr):
    """Store a tile, cast to the dtype of ``x``."""
    values = cast(values, x.data.dtype.element_ty)
    tl.store(elements(x, first, head, rows, OPTIONS), values, mask=exist(rows, num_rows, OPTIONS))


@device_function
def load_queries(segment, head, rows, args, OPTIONS: tl.constexpr):
    """A tile of queries."""
    return load_rows(args.q, segment.source_q, head, rows, segment.rows_q, OPTIONS)


@device_function
def load_keys(segment, head, columns, args, OPTIONS: tl.constexpr):
    """A tile of keys, plus the bias of their position in the segment, modulo its length."""
    keys = load_rows(args.k, segment.first_k, head, columns, segment.rows_k, OPTIONS)
    if OPTIONS.HAS_BIAS:
        bias = contiguous(args.key_bias, OPTIONS.HEAD_DIM, args)
        pointers = elements(bias, 0, head, columns % args.bias_length, OPTIONS)
        position = tl.load(pointers, mask=exist(columns, segment.rows_k, OPTIONS), other=0.0)
        keys = cast(keys.to(tl.float32) + position.to(tl.float32), keys.dtype)
    return keys


@device_function
def load_values(segment, head, columns, args, OPTIONS: tl.constexpr):
    """A tile of values."""
    return load_rows(args.v, segment.first_k, head, columns, segment.rows_k, OPTIONS)


@device_function
def load_grad_out(segment, head, rows, args, OPTIONS: tl.constexpr):
    """A tile of the gradient of the output."""
    grad_out = contiguous(args.grad_out, OPTIONS.HEAD_DIM, args)
    return load_rows(grad_out, segment.first_q, head, rows, segment.rows_q, OPTIONS)


@device_function
def per_query(x, segment, head, rows, args):
    """Pointers to the elements of ``[H, Tq]``: one per query."""
    return x + head * args.num_rows + segment.first_q + rows


@device_function
def load_per_query(x, segment, head, rows, other, args):
    """Elements of ``[H, Tq]``; ``other`` for rows past the end."""
    return tl.load(per_query(x, segment, head, rows, args), mask=rows < segment.rows_q, other=other)


@device_function
def sums_of_queries(x, segment, head, rows, args, OPTIONS: tl.constexpr):
    """Pointers ``[rows, GROUPS]`` into ``[Tq, H, G]``, and which of them exist."""
    base = x + (segment.first_q * args.num_heads + head) * args.num_groups
    groups = tl.arange(0, OPTIONS.GROUPS)
    mask = (rows[:, None] < segment.rows_q) & (groups[None, :] < args.num_groups)
    return base + rows.to(tl.int64)[:, None] * (args.num_heads * args.num_groups) + groups[None, :], mask


@device_function
def load_sums(x, segment, head, rows, args, OPTIONS: tl.constexpr):
    """A tile ``[rows, GROUPS]`` of ``[Tq, H, G]``."""
    pointers, mask = sums_of_queries(x, segment, head, rows, args, OPTIONS)
    return tl.load(pointers, mask=mask, other=0.0)


@device_function
def one_hot_groups(segment, columns, dtype: tl.constexpr, args, OPTIONS: tl.constexpr):
    """``[columns, GROUPS]``: 1 where the key belongs to the group, else 0."""
    group = tl.load(args.key_groups + segment.first_k + columns, mask=columns < segment.rows_k, other=-1)
    return (group[:, None] == tl.arange(0, OPTIONS.GROUPS)[None, :]).to(dtype)


# --- Arithmetic ---


@device_function
def recompute_weights(left, right, lse, is_key, args, OPTIONS: tl.constexpr):
    """Attention weights for the backward pass: of queries and keys, or transposed, of keys and queries."""
    scores = dot(left, tl.trans(right), OPTIONS) * (args.scale * LOG2_E)
    return tl.exp2(tl.where(is_key, scores - lse, float("-inf")))


@device_function
def dot(a, b, OPTIONS: tl.constexpr):
    """``a @ b`` in float32. The interpreter multiplies 16-bit tiles wrongly, so they are cast to float32 first."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=OPTIONS.PRECISION)


@device_function
def cast(x, dtype: tl.constexpr):
    """``x.to(dtype)``, rounded to nearest. The interpreter truncates to bfloat16, so the value is rounded before."""
    if INTERPRETED and dtype == tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
