"""Arguments of the kernels as named tuples, and the device functions that the kernels share.

Tiles are ``[rows, BLOCK_D]``, where ``BLOCK_D`` is the next power of two of the head dimension. Columns past the head
dimension and rows past the end of the segment are read as zeros and not written.
"""

import os
from typing import Any, NamedTuple

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether Triton's interpreter runs the kernels, on a CPU."""

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
    BLOCK_Q: int = 0  # queries of a tile
    BLOCK_K: int = 0  # keys of a tile
    TMA: int = 0  # dimensions of the tensor descriptors, 4 or 2 (see make_descriptor); 0 for pointers
    FUSE_DQ: bool = False  # bwd_dkdv also accumulates the gradient of the queries
    COMPUTE_DK: bool = True  # bwd_dkdv computes the gradient of the keys
    COMPUTE_DV: bool = True  # bwd_dkdv computes the gradient of the values


class Rows(NamedTuple):
    """Rows ``[T, H, D]`` of a tensor, or of one of its segments.

    ``data`` is a tensor on the host. In a kernel it is a pointer or, with ``TMA``, a tensor descriptor.
    """

    data: Any
    stride: Any
    head_stride: Any


class Inputs(NamedTuple):
    """Inputs of all kernels. ``num_blocks``: number of tiles of the longest segment, for grids without ``TMA``."""

    q: Rows
    k: Rows
    v: Rows
    key_bias: Any
    key_groups: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    scale: Any
    num_heads: Any
    num_rows: Any
    length_q: Any
    length_k: Any
    num_segments: Any
    bias_length: Any
    num_groups: Any
    num_blocks: Any = 0


class BackwardInputs(NamedTuple):
    """Further inputs of the backward kernels: ``[Tq, H, D]``, ``[Tq, H, G]``, and twice ``[H, Tq]``."""

    grad_out: Any
    grad_sums: Any
    lse: Any
    delta: Any


class Segment(NamedTuple):
    """A segment: first row (int64) and number of rows of its queries and keys.

    ``index_q`` and ``index_k`` are its positions in the tensor descriptors; 0 where it has descriptors of its own.
    """

    index_q: Any
    first_q: Any
    rows_q: Any
    index_k: Any
    first_k: Any
    rows_k: Any


@device_function
def load_segment(number, inputs, OPTIONS: tl.constexpr):
    """The :class:`Segment` with this number."""
    first_q, rows_q = _bounds(inputs.cu_seqlens_q, number, inputs.length_q, OPTIONS.RAGGED_Q)
    first_k, rows_k = _bounds(inputs.cu_seqlens_k, number, inputs.length_k, OPTIONS.RAGGED_K)
    index_q = 0 if OPTIONS.RAGGED_Q else number
    index_k = 0 if OPTIONS.RAGGED_K else number
    return Segment(index_q, first_q, rows_q, index_k, first_k, rows_k)


@device_function
def _bounds(cu_seqlens, segment, length, RAGGED: tl.constexpr):
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
def contiguous_rows(data, inputs, OPTIONS: tl.constexpr):
    """:class:`Rows` of a contiguous tensor."""
    return Rows(data, inputs.num_heads * OPTIONS.HEAD_DIM, OPTIONS.HEAD_DIM)


@device_function
def offset_rows(x, first, head):
    """Rows of one head from row ``first`` on, as a pointer."""
    return Rows(x.data + (first * x.stride + head * x.head_stride), x.stride, x.head_stride)


@device_function
def row_pointers(base, rows, stride, BLOCK_D: tl.constexpr):
    """Pointers ``[rows, BLOCK_D]`` to the elements of rows."""
    return base + rows[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@device_function
def row_mask(rows, num_rows, WIDTH, BLOCK_D: tl.constexpr):
    """``[rows, BLOCK_D]``: which elements are inside the segment and among the first ``WIDTH`` columns."""
    mask = rows[:, None] < num_rows
    if WIDTH != BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D)[None, :] < WIDTH)
    return mask


@device_function
def make_descriptor(x, num_segments, num_rows, inputs, BLOCK: tl.constexpr, OPTIONS: tl.constexpr):
    """Rows of segments of ``num_rows`` each, as a tensor descriptor.

    ``TMA`` is the number of its dimensions. 4: segments, heads, rows, columns. 2: rows of one segment, and the columns
    of all heads side by side. Triton specialises warps only for the latter; ``HEAD_DIM`` must then equal ``BLOCK_D``.
    """
    bound = tl.maximum(num_rows, 1)  # a descriptor needs at least one row; of an empty segment none is read
    if OPTIONS.TMA == 4:
        descriptor = tl.make_tensor_descriptor(
            x.data,
            [num_segments, inputs.num_heads, bound, OPTIONS.HEAD_DIM],
            [tl.cast(num_rows, tl.int64) * x.stride, x.head_stride, x.stride, 1],
            [1, 1, BLOCK, OPTIONS.BLOCK_D],
        )
    else:
        columns = (inputs.num_heads - 1) * x.head_stride + OPTIONS.HEAD_DIM
        descriptor = tl.make_tensor_descriptor(x.data, [bound, columns], [x.stride, 1], [BLOCK, OPTIONS.BLOCK_D])
    return Rows(descriptor, x.stride, x.head_stride)


@device_function
def describe_queries(x, inputs, SHARED: tl.constexpr, OPTIONS: tl.constexpr):
    """Rows per query of all segments, as a tensor descriptor. ``SHARED``: one set of rows for all segments."""
    num_sets = 1 if SHARED else inputs.num_segments
    return make_descriptor(x, num_sets, inputs.length_q, inputs, OPTIONS.BLOCK_Q, OPTIONS)


@device_function
def describe_keys(x, inputs, OPTIONS: tl.constexpr):
    """Rows per key of all segments, as a tensor descriptor."""
    return make_descriptor(x, inputs.num_segments, inputs.length_k, inputs, OPTIONS.BLOCK_K, OPTIONS)


@device_function
def segment_queries(x, whole, segment, inputs, SHARED: tl.constexpr, OPTIONS: tl.constexpr):
    """Rows per query of a segment, as a tensor descriptor. ``whole`` is the result of :func:`describe_queries`.

    Segments of different lengths have descriptors of their own, so that the bounds are those of the segment.
    """
    if OPTIONS.RAGGED_Q or OPTIONS.TMA == 2:
        x = offset_rows(x, 0 if SHARED else segment.first_q, 0)
        rows = make_descriptor(x, 1, segment.rows_q, inputs, OPTIONS.BLOCK_Q, OPTIONS)
    else:
        rows = whole
    return rows


@device_function
def segment_keys(x, whole, segment, inputs, OPTIONS: tl.constexpr):
    """The same for rows per key."""
    if OPTIONS.RAGGED_K or OPTIONS.TMA == 2:
        x = offset_rows(x, segment.first_k, 0)
        rows = make_descriptor(x, 1, segment.rows_k, inputs, OPTIONS.BLOCK_K, OPTIONS)
    else:
        rows = whole
    return rows


@device_function
def read_rows(x, index, head, start, num_rows, BLOCK: tl.constexpr, OPTIONS: tl.constexpr):
    """Load ``[BLOCK, BLOCK_D]`` starting at row ``start`` of a segment.

    ``x`` is a descriptor, indexed by ``index`` and ``head``, or a pointer to the first row of the segment and head.
    """
    if OPTIONS.TMA == 4:
        tile = x.data.load([index, head, start, 0]).reshape([BLOCK, OPTIONS.BLOCK_D])
    elif OPTIONS.TMA == 2:
        tile = x.data.load([start, head * x.head_stride])
    else:
        rows = start + tl.arange(0, BLOCK)
        mask = row_mask(rows, num_rows, OPTIONS.HEAD_DIM, OPTIONS.BLOCK_D)
        tile = tl.load(row_pointers(x.data, rows, x.stride, OPTIONS.BLOCK_D), mask=mask, other=0.0)
    return tile


@device_function
def write_rows(x, values, index, head, start, num_rows, BLOCK: tl.constexpr, OPTIONS: tl.constexpr):
    """Store a tile, cast to the dtype of ``x``; arguments as in :func:`read_rows`."""
    if OPTIONS.TMA == 4:
        x.data.store([index, head, start, 0], cast(values, x.data.dtype).reshape([1, 1, BLOCK, OPTIONS.BLOCK_D]))
    elif OPTIONS.TMA == 2:
        x.data.store([start, head * x.head_stride], cast(values, x.data.dtype))
    else:
        store_rows(x, values, start + tl.arange(0, BLOCK), num_rows, OPTIONS)


@device_function
def store_rows(x, values, rows, num_rows, OPTIONS: tl.constexpr):
    """Store rows through pointers, cast to the dtype of ``x``."""
    mask = row_mask(rows, num_rows, OPTIONS.HEAD_DIM, OPTIONS.BLOCK_D)
    values = cast(values, x.data.dtype.element_ty)
    tl.store(row_pointers(x.data, rows, x.stride, OPTIONS.BLOCK_D), values, mask=mask)


@device_function
def read_keys(k, bias, segment, head, start, inputs, OPTIONS: tl.constexpr):
    """Load keys and add the bias of their position, modulo its length. ``bias``: pointer to the bias of the head."""
    keys = read_rows(k, segment.index_k, head, start, segment.rows_k, OPTIONS.BLOCK_K, OPTIONS)
    if OPTIONS.HAS_BIAS:
        rows = start + tl.arange(0, OPTIONS.BLOCK_K)
        mask = row_mask(rows, segment.rows_k, OPTIONS.HEAD_DIM, OPTIONS.BLOCK_D)
        row_size = inputs.num_heads * OPTIONS.HEAD_DIM
        pointers = row_pointers(bias, rows % inputs.bias_length, row_size, OPTIONS.BLOCK_D)
        position = tl.load(pointers, mask=mask, other=0.0)
        keys = cast(keys.to(tl.float32) + position.to(tl.float32), keys.dtype)
    return keys


@device_function
def key_group_one_hot(segment, start, inputs, dtype: tl.constexpr, OPTIONS: tl.constexpr):
    """``[BLOCK_K, GROUPS]``: 1 where the key of the row belongs to the group of the column, else 0."""
    rows = start + tl.arange(0, OPTIONS.BLOCK_K)
    group = tl.load(inputs.key_groups + segment.first_k + rows, mask=rows < segment.rows_k, other=-1)
    return (group[:, None] == tl.arange(0, OPTIONS.GROUPS)[None, :]).to(dtype)


@device_function
def group_elements(base, rows, num_rows, num_heads, num_groups, GROUPS: tl.constexpr):
    """Pointers ``[rows, GROUPS]`` into ``[Tq, H, G]``, and which of them are inside the segment and a group.

    ``base`` is a pointer to the element of the first row of the segment, the head and group 0.
    """
    mask = (rows[:, None] < num_rows) & (tl.arange(0, GROUPS)[None, :] < num_groups)
    return row_pointers(base, rows, num_heads * num_groups, GROUPS), mask


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
