"""The backward kernel over blocks of keys: gradients of keys and values, optionally also of queries.

Attention weights are recomputed from ``lse``. Wide heads do not leave enough registers to accumulate both gradients.
The kernel then runs twice, once per gradient (``bwd_dkdv`` and ``bwd_dv`` in a tiling), which costs one more product.

There are two ways to compute the gradient of the queries. The tuner measures both:

- ``fuse_dq``: this kernel accumulates it with atomic additions. The backward pass takes five products in total.
- otherwise ``bwd_dq.py`` accumulates it in registers in a fixed order. The backward pass takes seven products in total.
"""

import triton
import triton.language as tl

from idavlm.ops.cross_attention.triton.device_functions import (
    add_bias,
    cast,
    device_function,
    dot,
    group_one_hot,
    make_descriptor,
    next_first_item,
    read_rows,
    row_mask,
    row_pointers,
    segment_bounds,
    segment_descriptor,
    write_rows,
)


@triton.jit
def bwd_dkdv(
    q,
    k,
    v,
    key_bias,
    key_groups,
    cu_seqlens_q,
    cu_seqlens_k,
    grad_out,
    grad_sums,
    lse,
    delta,
    grad_q,
    grad_k,
    grad_v,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    scale,
    num_heads,
    num_rows,
    length_q,
    length_k,
    num_segments,
    num_blocks,
    bias_length,
    num_groups,
    RAGGED_Q: tl.constexpr,
    RAGGED_K: tl.constexpr,
    SHARED_Q: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    FUSE_DQ: tl.constexpr,
    TMA: tl.constexpr,
    COMPUTE_DK: tl.constexpr,
    COMPUTE_DV: tl.constexpr,
):
    """Compute ``grad_k`` (``COMPUTE_DK``) and ``grad_v`` (``COMPUTE_DV``), and add to float32 ``grad_q`` (``FUSE_DQ``).

    Blocks are assigned to programs as in ``fwd.py``.
    """
    row_size = num_heads * HEAD_DIM
    if TMA:
        num_sets = 1 if SHARED_Q else num_segments
        all_q = make_descriptor(
            q, num_sets, length_q, q_stride, num_heads, q_head_stride, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA
        )
        all_k = make_descriptor(
            k, num_segments, length_k, k_stride, num_heads, k_head_stride, HEAD_DIM, BLOCK_K, BLOCK_D, TMA
        )
        all_v = make_descriptor(
            v, num_segments, length_k, v_stride, num_heads, v_head_stride, HEAD_DIM, BLOCK_K, BLOCK_D, TMA
        )
        all_do = make_descriptor(
            grad_out, num_segments, length_q, row_size, num_heads, HEAD_DIM, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA
        )
        all_dk = make_descriptor(
            grad_k, num_segments, length_k, row_size, num_heads, HEAD_DIM, HEAD_DIM, BLOCK_K, BLOCK_D, TMA
        )
        all_dv = make_descriptor(
            grad_v, num_segments, length_k, row_size, num_heads, HEAD_DIM, HEAD_DIM, BLOCK_K, BLOCK_D, TMA
        )
        first_item, programs = tl.program_id(0), tl.num_programs(0)
        for segment in tl.range(num_segments, disable_licm=True):
            first_q, rows_q = segment_bounds(cu_seqlens_q, segment, length_q, RAGGED_Q)
            first_k, rows_k = segment_bounds(cu_seqlens_k, segment, length_k, RAGGED_K)
            blocks = tl.cdiv(rows_k, BLOCK_K)
            if first_item < blocks * num_heads:
                segment_q = segment_descriptor(
                    all_q, q, 0 if SHARED_Q else first_q, rows_q, q_stride, num_heads, q_head_stride,
                    RAGGED_Q, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA,
                )  # fmt: skip
                segment_k = segment_descriptor(
                    all_k, k, first_k, rows_k, k_stride, num_heads, k_head_stride,
                    RAGGED_K, HEAD_DIM, BLOCK_K, BLOCK_D, TMA,
                )  # fmt: skip
                segment_v = segment_descriptor(
                    all_v, v, first_k, rows_k, v_stride, num_heads, v_head_stride,
                    RAGGED_K, HEAD_DIM, BLOCK_K, BLOCK_D, TMA,
                )  # fmt: skip
                segment_do = segment_descriptor(
                    all_do, grad_out, first_q, rows_q, row_size, num_heads, HEAD_DIM,
                    RAGGED_Q, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA,
                )  # fmt: skip
                segment_dk = segment_descriptor(
                    all_dk, grad_k, first_k, rows_k, row_size, num_heads, HEAD_DIM,
                    RAGGED_K, HEAD_DIM, BLOCK_K, BLOCK_D, TMA,
                )  # fmt: skip
                segment_dv = segment_descriptor(
                    all_dv, grad_v, first_k, rows_k, row_size, num_heads, HEAD_DIM,
                    RAGGED_K, HEAD_DIM, BLOCK_K, BLOCK_D, TMA,
                )  # fmt: skip
                for item in tl.range(first_item, blocks * num_heads, programs, disable_licm=True):
                    _bwd_dkdv_block(
                        segment_q, segment_k, segment_v, segment_do, segment_dk, segment_dv, grad_q, key_bias,
                        key_groups, grad_sums, lse, delta, segment, item // blocks, (item % blocks) * BLOCK_K, first_q,
                        rows_q, first_k, rows_k,
                        q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, scale, num_heads,
                        num_rows, bias_length, num_groups, RAGGED_Q, RAGGED_K, SHARED_Q, HAS_BIAS, GROUPS, HEAD_DIM,
                        BLOCK_D, BLOCK_Q, BLOCK_K, PRECISION, FUSE_DQ, TMA, COMPUTE_DK, COMPUTE_DV,
                    )  # fmt: skip
            first_item = next_first_item(first_item, blocks * num_heads, programs)
    else:
        block, head = tl.program_id(0), tl.program_id(1)
        segment = block // num_blocks
        start = (block % num_blocks) * BLOCK_K
        first_q, rows_q = segment_bounds(cu_seqlens_q, segment, length_q, RAGGED_Q)
        first_k, rows_k = segment_bounds(cu_seqlens_k, segment, length_k, RAGGED_K)
        if start >= rows_k:
            return
        q += head * q_head_stride
        if not SHARED_Q:
            q += first_q * q_stride
        k += first_k * k_stride + head * k_head_stride
        v += first_k * v_stride + head * v_head_stride
        grad_out += first_q * row_size + head * HEAD_DIM
        grad_k += first_k * row_size + head * HEAD_DIM
        grad_v += first_k * row_size + head * HEAD_DIM
        _bwd_dkdv_block(
            q, k, v, grad_out, grad_k, grad_v, grad_q, key_bias, key_groups, grad_sums, lse,
            delta, segment, head, start, first_q, rows_q, first_k, rows_k, q_stride, q_head_stride, k_stride,
            k_head_stride, v_stride, v_head_stride, scale, num_heads, num_rows, bias_length, num_groups, RAGGED_Q,
            RAGGED_K, SHARED_Q, HAS_BIAS, GROUPS, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_K, PRECISION, FUSE_DQ, TMA,
            COMPUTE_DK, COMPUTE_DV,
        )  # fmt: skip


@device_function
def _bwd_dkdv_block(
    q,
    k,
    v,
    grad_out,
    grad_k,
    grad_v,
    grad_q,
    key_bias,
    key_groups,
    grad_sums,
    lse,
    delta,
    segment,
    head,
    start_k,
    first_q,
    rows_q,
    first_k,
    rows_k,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    scale,
    num_heads,
    num_rows,
    bias_length,
    num_groups,
    RAGGED_Q: tl.constexpr,
    RAGGED_K: tl.constexpr,
    SHARED_Q: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    FUSE_DQ: tl.constexpr,
    TMA: tl.constexpr,
    COMPUTE_DK: tl.constexpr,
    COMPUTE_DV: tl.constexpr,
):
    """Tiles of weights are ``[keys, queries]``, so that neither gradient needs them transposed."""
    columns = start_k + tl.arange(0, BLOCK_K)
    row_size = num_heads * HEAD_DIM
    key_bias += head * HEAD_DIM
    index_q = 0 if RAGGED_Q else segment
    index_k = 0 if RAGGED_K else segment
    if not SHARED_Q:
        grad_q += first_q * row_size
    grad_q += head * HEAD_DIM
    grad_sums += (first_q * num_heads + head) * num_groups
    lse += first_q + head.to(tl.int64) * num_rows
    delta += first_q + head.to(tl.int64) * num_rows

    keys = read_rows(k, index_k, head, start_k, rows_k, k_stride, k_head_stride, HEAD_DIM, BLOCK_K, BLOCK_D, TMA)
    keys = add_bias(keys, key_bias, columns, rows_k, bias_length, row_size, HAS_BIAS, HEAD_DIM, BLOCK_D)
    if COMPUTE_DK:
        values = read_rows(v, index_k, head, start_k, rows_k, v_stride, v_head_stride, HEAD_DIM, BLOCK_K, BLOCK_D, TMA)
        if GROUPS:
            one_hot = group_one_hot(key_groups + first_k, columns, rows_k, GROUPS, tl.float32)
        dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    if COMPUTE_DV:
        dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in tl.range(0, rows_q, BLOCK_Q, disable_licm=TMA):
        rows = start + tl.arange(0, BLOCK_Q)
        queries = read_rows(
            q, 0 if SHARED_Q else index_q, head, start, rows_q, q_stride, q_head_stride, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA
        )
        # Infinity for rows past the end makes their weights zero.
        lse_tile = tl.load(lse + rows, mask=rows < rows_q, other=float("inf"))
        scores = dot(keys, tl.trans(queries), PRECISION) * (scale * 1.4426950408889634)
        weights = tl.exp2(tl.where(columns[:, None] < rows_k, scores - lse_tile[None, :], float("-inf")))
        do = read_rows(grad_out, index_q, head, start, rows_q, row_size, HEAD_DIM, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA)
        if COMPUTE_DV:
            dv += dot(cast(weights, do.dtype), do, PRECISION)
        if COMPUTE_DK:
            grad_weights = dot(values, tl.trans(do), PRECISION)
            if GROUPS:
                mask = (rows[:, None] < rows_q) & (tl.arange(0, GROUPS)[None, :] < num_groups)
                grad_sums_tile = tl.load(
                    row_pointers(grad_sums, rows, num_heads * num_groups, GROUPS), mask=mask, other=0.0
                )
                grad_weights += dot(one_hot, tl.trans(grad_sums_tile), PRECISION)
            delta_tile = tl.load(delta + rows, mask=rows < rows_q, other=0.0)
            grad_scores = cast(weights * (grad_weights - delta_tile[None, :]), keys.dtype)
            dk += dot(grad_scores, queries, PRECISION)
            if FUSE_DQ:
                dq = dot(tl.trans(grad_scores), keys, PRECISION) * scale
                mask = row_mask(rows, rows_q, HEAD_DIM, BLOCK_D)
                tl.atomic_add(row_pointers(grad_q, rows, row_size, BLOCK_D), dq, mask=mask, sem="relaxed")

    if COMPUTE_DK:
        dk *= scale
        write_rows(grad_k, dk, index_k, head, start_k, rows_k, row_size, HEAD_DIM, HEAD_DIM, BLOCK_K, BLOCK_D, TMA)
    if COMPUTE_DV:
        write_rows(grad_v, dv, index_k, head, start_k, rows_k, row_size, HEAD_DIM, HEAD_DIM, BLOCK_K, BLOCK_D, TMA)
