"""The forward kernel. Each program computes blocks of queries of one head over all keys of their segment."""

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
def fwd(
    q,
    k,
    v,
    key_bias,
    key_groups,
    cu_seqlens_q,
    cu_seqlens_k,
    out,
    sums,
    lse,
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
    TMA: tl.constexpr,
):
    """Compute ``out``, ``lse`` and the attention weights summed over groups of keys (``sums``).

    Without ``TMA`` the grid has one program per block of queries and head. With ``TMA`` the kernel is persistent: a
    fixed number of programs loop over all segments and take the blocks in round-robin order. This balances long and
    short segments, and empty segments cost nothing.
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
        all_out = make_descriptor(
            out, num_segments, length_q, row_size, num_heads, HEAD_DIM, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA
        )
        first_item, programs = tl.program_id(0), tl.num_programs(0)
        for segment in tl.range(num_segments, disable_licm=True):
            first_q, rows_q = segment_bounds(cu_seqlens_q, segment, length_q, RAGGED_Q)
            first_k, rows_k = segment_bounds(cu_seqlens_k, segment, length_k, RAGGED_K)
            blocks = tl.cdiv(rows_q, BLOCK_Q)
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
                segment_out = segment_descriptor(
                    all_out, out, first_q, rows_q, row_size, num_heads, HEAD_DIM,
                    RAGGED_Q, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA,
                )  # fmt: skip
                for item in tl.range(first_item, blocks * num_heads, programs, disable_licm=True):
                    _fwd_block(
                        segment_q, segment_k, segment_v, segment_out, key_bias, key_groups, sums, lse,
                        segment, item // blocks, (item % blocks) * BLOCK_Q, first_q, rows_q, first_k, rows_k,
                        q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, scale, num_heads,
                        num_rows, bias_length, num_groups, RAGGED_Q, RAGGED_K, SHARED_Q, HAS_BIAS, GROUPS, HEAD_DIM,
                        BLOCK_D, BLOCK_Q, BLOCK_K, PRECISION, TMA,
                    )  # fmt: skip
            first_item = next_first_item(first_item, blocks * num_heads, programs)
    else:
        block, head = tl.program_id(0), tl.program_id(1)
        segment = block // num_blocks
        start = (block % num_blocks) * BLOCK_Q
        first_q, rows_q = segment_bounds(cu_seqlens_q, segment, length_q, RAGGED_Q)
        first_k, rows_k = segment_bounds(cu_seqlens_k, segment, length_k, RAGGED_K)
        if start >= rows_q:
            return
        q += head * q_head_stride
        if not SHARED_Q:
            q += first_q * q_stride
        k += first_k * k_stride + head * k_head_stride
        v += first_k * v_stride + head * v_head_stride
        out += first_q * row_size + head * HEAD_DIM
        _fwd_block(
            q, k, v, out, key_bias, key_groups, sums, lse, segment, head, start, first_q, rows_q, first_k, rows_k,
            q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, scale, num_heads, num_rows,
            bias_length, num_groups, RAGGED_Q, RAGGED_K, SHARED_Q, HAS_BIAS, GROUPS, HEAD_DIM, BLOCK_D, BLOCK_Q,
            BLOCK_K, PRECISION, TMA,
        )  # fmt: skip


@device_function
def _fwd_block(
    q,
    k,
    v,
    out,
    key_bias,
    key_groups,
    sums,
    lse,
    segment,
    head,
    start_q,
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
    TMA: tl.constexpr,
):
    """Online softmax: ``row_max`` is the running maximum of the scores, ``row_sum`` the sum of weights relative to it.

    ``lse`` stores ``log2`` of the sum of ``exp(scores)`` for the backward pass. The group sums are one more product,
    weights times a one-hot matrix of groups, so that the weights never leave the registers.
    """
    rows = start_q + tl.arange(0, BLOCK_Q)
    row_size = num_heads * HEAD_DIM
    key_bias += head * HEAD_DIM
    index_q = 0 if RAGGED_Q else segment
    index_k = 0 if RAGGED_K else segment
    queries = read_rows(
        q, 0 if SHARED_Q else index_q, head, start_q, rows_q, q_stride, q_head_stride, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA
    )

    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if GROUPS:
        group_acc = tl.zeros([BLOCK_Q, GROUPS], tl.float32)
    for start in tl.range(0, rows_k, BLOCK_K, warp_specialize=TMA == 2):
        columns = start + tl.arange(0, BLOCK_K)
        keys = read_rows(k, index_k, head, start, rows_k, k_stride, k_head_stride, HEAD_DIM, BLOCK_K, BLOCK_D, TMA)
        keys = add_bias(keys, key_bias, columns, rows_k, bias_length, row_size, HAS_BIAS, HEAD_DIM, BLOCK_D)
        scores = dot(queries, tl.trans(keys), PRECISION) * (scale * 1.4426950408889634)
        scores = tl.where(columns[None, :] < rows_k, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_max = new_max
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        values = read_rows(v, index_k, head, start, rows_k, v_stride, v_head_stride, HEAD_DIM, BLOCK_K, BLOCK_D, TMA)
        acc = acc * rescale[:, None]
        acc += dot(cast(weights, values.dtype), values, PRECISION)
        if GROUPS:
            # Weights are at most 1. float16 represents them more precisely than bfloat16.
            weight_dtype: tl.constexpr = tl.float32 if values.dtype == tl.float32 else tl.float16
            one_hot = group_one_hot(key_groups + first_k, columns, rows_k, GROUPS, weight_dtype)
            group_acc = group_acc * rescale[:, None]
            group_acc += dot(weights.to(weight_dtype), one_hot, PRECISION)

    divisor = tl.where(row_sum == 0, 1.0, row_sum)  # a segment without keys outputs zeros
    acc = acc / divisor[:, None]
    write_rows(out, acc, index_q, head, start_q, rows_q, row_size, HEAD_DIM, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA)
    lse += first_q + head.to(tl.int64) * num_rows
    tl.store(lse + rows, row_max + tl.log2(divisor), mask=rows < rows_q)
    if GROUPS:
        sums += (first_q * num_heads + head) * num_groups
        mask = row_mask(rows, rows_q, GROUPS, GROUPS) & (tl.arange(0, GROUPS)[None, :] < num_groups)
        tl.store(row_pointers(sums, rows, num_heads * num_groups, GROUPS), group_acc / divisor[:, None], mask=mask)
