"""The backward kernel over blocks of queries: their gradient, accumulated in registers in a fixed order."""

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
    row_pointers,
    segment_bounds,
    segment_descriptor,
    write_rows,
)


@triton.jit
def bwd_dq(
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
    """Compute ``grad_q``. Blocks are assigned to programs as in ``fwd.py``, except for shared queries.

    With ``SHARED_Q`` a program keeps one block of queries and loops over every ``num_parts``-th segment. It writes one
    partial sum: ``grad_q`` is float32 ``[num_parts, Lq, H, D]``, and the first axis of the grid has
    ``num_parts * num_blocks`` programs.
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
    if SHARED_Q:
        block, head = tl.program_id(0), tl.program_id(1)
        part = block // num_blocks
        start = (block % num_blocks) * BLOCK_Q
        source = all_q if TMA else q + head * q_head_stride
        queries = read_rows(source, 0, head, start, length_q, q_stride, q_head_stride, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA)
        dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for segment in tl.range(part, num_segments, tl.num_programs(0) // num_blocks, disable_licm=True):
            first_q = tl.cast(segment, tl.int64) * length_q
            first_k, rows_k = segment_bounds(cu_seqlens_k, segment, length_k, RAGGED_K)
            if TMA:
                segment_k = segment_descriptor(
                    all_k, k, first_k, rows_k, k_stride, num_heads, k_head_stride,
                    RAGGED_K, HEAD_DIM, BLOCK_K, BLOCK_D, TMA,
                )  # fmt: skip
                segment_v = segment_descriptor(
                    all_v, v, first_k, rows_k, v_stride, num_heads, v_head_stride,
                    RAGGED_K, HEAD_DIM, BLOCK_K, BLOCK_D, TMA,
                )  # fmt: skip
                segment_do = all_do
            else:
                segment_k = k + first_k * k_stride + head * k_head_stride
                segment_v = v + first_k * v_stride + head * v_head_stride
                segment_do = grad_out + first_q * row_size + head * HEAD_DIM
            dq = _accumulate_dq(
                dq, queries, segment_k, segment_v, segment_do, key_bias, key_groups, grad_sums, lse, delta, segment,
                head, start, first_q, length_q, first_k, rows_k, k_stride, k_head_stride, v_stride, v_head_stride,
                scale, num_heads, num_rows, bias_length, num_groups, RAGGED_Q, RAGGED_K, HAS_BIAS, GROUPS, HEAD_DIM,
                BLOCK_D, BLOCK_Q, BLOCK_K, PRECISION, TMA,
            )  # fmt: skip
        grad_q += tl.cast(part, tl.int64) * length_q * row_size + head * HEAD_DIM
        dq *= scale
        write_rows(grad_q, dq, 0, head, start, length_q, row_size, HEAD_DIM, HEAD_DIM, BLOCK_Q, BLOCK_D, False)
    elif TMA:
        all_dq = make_descriptor(
            grad_q, num_segments, length_q, row_size, num_heads, HEAD_DIM, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA
        )
        first_item, programs = tl.program_id(0), tl.num_programs(0)
        for segment in tl.range(num_segments, disable_licm=True):
            first_q, rows_q = segment_bounds(cu_seqlens_q, segment, length_q, RAGGED_Q)
            first_k, rows_k = segment_bounds(cu_seqlens_k, segment, length_k, RAGGED_K)
            blocks = tl.cdiv(rows_q, BLOCK_Q)
            if first_item < blocks * num_heads:
                segment_q = segment_descriptor(
                    all_q, q, first_q, rows_q, q_stride, num_heads, q_head_stride,
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
                segment_dq = segment_descriptor(
                    all_dq, grad_q, first_q, rows_q, row_size, num_heads, HEAD_DIM,
                    RAGGED_Q, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA,
                )  # fmt: skip
                for item in tl.range(first_item, blocks * num_heads, programs, disable_licm=True):
                    _bwd_dq_block(
                        segment_q, segment_k, segment_v, segment_do, segment_dq, key_bias, key_groups, grad_sums, lse,
                        delta, segment, item // blocks, (item % blocks) * BLOCK_Q, first_q, rows_q, first_k, rows_k,
                        q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, scale, num_heads,
                        num_rows, bias_length, num_groups, RAGGED_Q, RAGGED_K, HAS_BIAS, GROUPS, HEAD_DIM, BLOCK_D,
                        BLOCK_Q, BLOCK_K, PRECISION, TMA,
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
        q += first_q * q_stride + head * q_head_stride
        k += first_k * k_stride + head * k_head_stride
        v += first_k * v_stride + head * v_head_stride
        grad_out += first_q * row_size + head * HEAD_DIM
        grad_q += first_q * row_size + head * HEAD_DIM
        _bwd_dq_block(
            q, k, v, grad_out, grad_q, key_bias, key_groups, grad_sums, lse, delta, segment, head, start, first_q,
            rows_q, first_k, rows_k, q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, scale,
            num_heads, num_rows, bias_length, num_groups, RAGGED_Q, RAGGED_K, HAS_BIAS, GROUPS, HEAD_DIM, BLOCK_D,
            BLOCK_Q, BLOCK_K, PRECISION, TMA,
        )  # fmt: skip


@device_function
def _bwd_dq_block(
    q, k, v, grad_out, grad_q, key_bias, key_groups, grad_sums, lse, delta, segment, head, start_q, first_q, rows_q,
    first_k, rows_k, q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, scale, num_heads,
    num_rows, bias_length, num_groups, RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    index_q = 0 if RAGGED_Q else segment
    row_size = num_heads * HEAD_DIM
    queries = read_rows(q, index_q, head, start_q, rows_q, q_stride, q_head_stride, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA)
    dq = _accumulate_dq(
        tl.zeros([BLOCK_Q, BLOCK_D], tl.float32), queries, k, v, grad_out, key_bias, key_groups, grad_sums, lse, delta,
        segment, head, start_q, first_q, rows_q, first_k, rows_k, k_stride, k_head_stride, v_stride, v_head_stride,
        scale, num_heads, num_rows, bias_length, num_groups, RAGGED_Q, RAGGED_K, HAS_BIAS, GROUPS, HEAD_DIM, BLOCK_D,
        BLOCK_Q, BLOCK_K, PRECISION, TMA,
    )  # fmt: skip
    dq *= scale
    write_rows(grad_q, dq, index_q, head, start_q, rows_q, row_size, HEAD_DIM, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA)


@device_function
def _accumulate_dq(
    dq, queries, k, v, grad_out, key_bias, key_groups, grad_sums, lse, delta, segment, head, start_q, first_q,
    rows_q, first_k, rows_k, k_stride, k_head_stride, v_stride, v_head_stride, scale, num_heads, num_rows, bias_length,
    num_groups, RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, HAS_BIAS: tl.constexpr, GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add the gradient of one block of queries over all keys of one segment to ``dq``."""
    rows = start_q + tl.arange(0, BLOCK_Q)
    row_size = num_heads * HEAD_DIM
    key_bias += head * HEAD_DIM
    index_q = 0 if RAGGED_Q else segment
    index_k = 0 if RAGGED_K else segment
    offset = first_q + head.to(tl.int64) * num_rows
    lse_tile = tl.load(lse + offset + rows, mask=rows < rows_q, other=float("inf"))
    delta_tile = tl.load(delta + offset + rows, mask=rows < rows_q, other=0.0)
    do = read_rows(grad_out, index_q, head, start_q, rows_q, row_size, HEAD_DIM, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA)
    if GROUPS:
        grad_sums += (first_q * num_heads + head) * num_groups
        mask = (rows[:, None] < rows_q) & (tl.arange(0, GROUPS)[None, :] < num_groups)
        grad_sums_tile = tl.load(row_pointers(grad_sums, rows, num_heads * num_groups, GROUPS), mask=mask, other=0.0)
    for start in range(0, rows_k, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        keys = read_rows(k, index_k, head, start, rows_k, k_stride, k_head_stride, HEAD_DIM, BLOCK_K, BLOCK_D, TMA)
        keys = add_bias(keys, key_bias, columns, rows_k, bias_length, row_size, HAS_BIAS, HEAD_DIM, BLOCK_D)
        # Loaded before the products so that one barrier serves both. With a second barrier, float32 would have to
        # keep an operand in registers across it.
        values = read_rows(v, index_k, head, start, rows_k, v_stride, v_head_stride, HEAD_DIM, BLOCK_K, BLOCK_D, TMA)
        scores = dot(queries, tl.trans(keys), PRECISION) * (scale * 1.4426950408889634)
        weights = tl.exp2(tl.where(columns[None, :] < rows_k, scores - lse_tile[:, None], float("-inf")))
        grad_weights = dot(do, tl.trans(values), PRECISION)
        if GROUPS:
            one_hot = group_one_hot(key_groups + first_k, columns, rows_k, GROUPS, tl.float32)
            grad_weights += dot(grad_sums_tile, tl.trans(one_hot), PRECISION)
        grad_scores = cast(weights * (grad_weights - delta_tile[:, None]), keys.dtype)
        dq += dot(grad_scores, keys, PRECISION)
    return dq
