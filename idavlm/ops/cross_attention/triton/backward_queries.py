"""The backward kernel by blocks of queries: their gradient, summed in registers in a fixed order."""

import triton
import triton.language as tl

from idavlm.ops.cross_attention.triton.tiles import (
    add_bias,
    describe,
    inlined,
    membership,
    narrow,
    next_turn,
    product,
    read_rows,
    row_pointers,
    segment_rows,
    segment_span,
    write_rows,
)


@triton.jit
def attend_backward_queries(
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
    """Handed out as in ``forward.py``, but for queries that segments share.

    Of those a program keeps one block in place while it walks over every ``num_parts``-th segment, and leaves one
    partial sum: ``grad_q`` is float32 ``[num_parts, Lq, H, D]``, and the grid's first axis is parts times blocks.
    """
    row_size = num_heads * HEAD_DIM
    if TMA:
        sets = 1 if SHARED_Q else num_segments
        all_q = describe(q, sets, length_q, q_stride, num_heads, q_head_stride, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA)
        all_k = describe(k, num_segments, length_k, k_stride, num_heads, k_head_stride, HEAD_DIM, BLOCK_K, BLOCK_D, TMA)
        all_v = describe(v, num_segments, length_k, v_stride, num_heads, v_head_stride, HEAD_DIM, BLOCK_K, BLOCK_D, TMA)
        all_g = describe(
            grad_out, num_segments, length_q, row_size, num_heads, HEAD_DIM, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA
        )
    if SHARED_Q:
        block, head = tl.program_id(0), tl.program_id(1)
        part = block // num_blocks
        start = (block % num_blocks) * BLOCK_Q
        source = all_q if TMA else q + head * q_head_stride
        queries = read_rows(source, 0, head, start, length_q, q_stride, q_head_stride, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA)
        result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for segment in tl.range(part, num_segments, tl.num_programs(0) // num_blocks, disable_licm=True):
            first_q = tl.cast(segment, tl.int64) * length_q
            first_k, rows_k = segment_span(cu_seqlens_k, segment, length_k, RAGGED_K)
            if TMA:
                its_k = segment_rows(
                    all_k, k, first_k, rows_k, k_stride, num_heads, k_head_stride,
                    RAGGED_K, HEAD_DIM, BLOCK_K, BLOCK_D, TMA,
                )  # fmt: skip
                its_v = segment_rows(
                    all_v, v, first_k, rows_k, v_stride, num_heads, v_head_stride,
                    RAGGED_K, HEAD_DIM, BLOCK_K, BLOCK_D, TMA,
                )  # fmt: skip
                its_g = all_g
            else:
                its_k = k + first_k * k_stride + head * k_head_stride
                its_v = v + first_k * v_stride + head * v_head_stride
                its_g = grad_out + first_q * row_size + head * HEAD_DIM
            result = _add_segment(
                result, queries, its_k, its_v, its_g, key_bias, key_groups, grad_sums, lse, delta, segment, head,
                start, first_q, length_q, first_k, rows_k, k_stride, k_head_stride, v_stride, v_head_stride, scale,
                num_heads, num_rows, bias_length, num_groups, RAGGED_Q, RAGGED_K, HAS_BIAS, GROUPS, HEAD_DIM, BLOCK_D,
                BLOCK_Q, BLOCK_K, PRECISION, TMA,
            )  # fmt: skip
        grad_q += tl.cast(part, tl.int64) * length_q * row_size + head * HEAD_DIM
        result *= scale
        write_rows(grad_q, result, 0, head, start, length_q, row_size, HEAD_DIM, HEAD_DIM, BLOCK_Q, BLOCK_D, False)
    elif TMA:
        all_gq = describe(
            grad_q, num_segments, length_q, row_size, num_heads, HEAD_DIM, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA
        )
        turn, programs = tl.program_id(0), tl.num_programs(0)
        for segment in tl.range(num_segments, disable_licm=True):
            first_q, rows_q = segment_span(cu_seqlens_q, segment, length_q, RAGGED_Q)
            first_k, rows_k = segment_span(cu_seqlens_k, segment, length_k, RAGGED_K)
            blocks = tl.cdiv(rows_q, BLOCK_Q)
            if turn < blocks * num_heads:
                its_q = segment_rows(
                    all_q, q, first_q, rows_q, q_stride, num_heads, q_head_stride,
                    RAGGED_Q, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA,
                )  # fmt: skip
                its_k = segment_rows(
                    all_k, k, first_k, rows_k, k_stride, num_heads, k_head_stride,
                    RAGGED_K, HEAD_DIM, BLOCK_K, BLOCK_D, TMA,
                )  # fmt: skip
                its_v = segment_rows(
                    all_v, v, first_k, rows_k, v_stride, num_heads, v_head_stride,
                    RAGGED_K, HEAD_DIM, BLOCK_K, BLOCK_D, TMA,
                )  # fmt: skip
                its_g = segment_rows(
                    all_g, grad_out, first_q, rows_q, row_size, num_heads, HEAD_DIM,
                    RAGGED_Q, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA,
                )  # fmt: skip
                its_gq = segment_rows(
                    all_gq, grad_q, first_q, rows_q, row_size, num_heads, HEAD_DIM,
                    RAGGED_Q, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA,
                )  # fmt: skip
                for item in tl.range(turn, blocks * num_heads, programs, disable_licm=True):
                    _queries_block(
                        its_q, its_k, its_v, its_g, its_gq, key_bias, key_groups, grad_sums, lse, delta, segment,
                        item // blocks, (item % blocks) * BLOCK_Q, first_q, rows_q, first_k, rows_k, q_stride,
                        q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, scale, num_heads, num_rows,
                        bias_length, num_groups, RAGGED_Q, RAGGED_K, HAS_BIAS, GROUPS, HEAD_DIM, BLOCK_D, BLOCK_Q,
                        BLOCK_K, PRECISION, TMA,
                    )  # fmt: skip
            turn = next_turn(turn, blocks * num_heads, programs)
    else:
        block, head = tl.program_id(0), tl.program_id(1)
        segment = block // num_blocks
        start = (block % num_blocks) * BLOCK_Q
        first_q, rows_q = segment_span(cu_seqlens_q, segment, length_q, RAGGED_Q)
        first_k, rows_k = segment_span(cu_seqlens_k, segment, length_k, RAGGED_K)
        if start >= rows_q:
            return
        q += first_q * q_stride + head * q_head_stride
        k += first_k * k_stride + head * k_head_stride
        v += first_k * v_stride + head * v_head_stride
        grad_out += first_q * row_size + head * HEAD_DIM
        grad_q += first_q * row_size + head * HEAD_DIM
        _queries_block(
            q, k, v, grad_out, grad_q, key_bias, key_groups, grad_sums, lse, delta, segment, head, start, first_q,
            rows_q, first_k, rows_k, q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, scale,
            num_heads, num_rows, bias_length, num_groups, RAGGED_Q, RAGGED_K, HAS_BIAS, GROUPS, HEAD_DIM, BLOCK_D,
            BLOCK_Q, BLOCK_K, PRECISION, TMA,
        )  # fmt: skip


@inlined
def _queries_block(
    q, k, v, grad_out, grad_q, key_bias, key_groups, grad_sums, lse, delta, segment, head, start_q, first_q, rows_q,
    first_k, rows_k, q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, scale, num_heads,
    num_rows, bias_length, num_groups, RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    place_q = 0 if RAGGED_Q else segment
    row_size = num_heads * HEAD_DIM
    queries = read_rows(q, place_q, head, start_q, rows_q, q_stride, q_head_stride, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA)
    result = _add_segment(
        tl.zeros([BLOCK_Q, BLOCK_D], tl.float32), queries, k, v, grad_out, key_bias, key_groups, grad_sums, lse, delta,
        segment, head, start_q, first_q, rows_q, first_k, rows_k, k_stride, k_head_stride, v_stride, v_head_stride,
        scale, num_heads, num_rows, bias_length, num_groups, RAGGED_Q, RAGGED_K, HAS_BIAS, GROUPS, HEAD_DIM, BLOCK_D,
        BLOCK_Q, BLOCK_K, PRECISION, TMA,
    )  # fmt: skip
    result *= scale
    write_rows(grad_q, result, place_q, head, start_q, rows_q, row_size, HEAD_DIM, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA)


@inlined
def _add_segment(
    result, queries, k, v, grad_out, key_bias, key_groups, grad_sums, lse, delta, segment, head, start_q, first_q,
    rows_q, first_k, rows_k, k_stride, k_head_stride, v_stride, v_head_stride, scale, num_heads, num_rows, bias_length,
    num_groups, RAGGED_Q: tl.constexpr, RAGGED_K: tl.constexpr, HAS_BIAS: tl.constexpr, GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """``result`` and the gradient of a block of queries from all keys of one segment."""
    rows = start_q + tl.arange(0, BLOCK_Q)
    row_size = num_heads * HEAD_DIM
    key_bias += head * HEAD_DIM
    place_q = 0 if RAGGED_Q else segment
    place_k = 0 if RAGGED_K else segment
    offset = first_q + head.to(tl.int64) * num_rows
    norms = tl.load(lse + offset + rows, mask=rows < rows_q, other=float("inf"))
    means = tl.load(delta + offset + rows, mask=rows < rows_q, other=0.0)
    grads = read_rows(grad_out, place_q, head, start_q, rows_q, row_size, HEAD_DIM, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA)
    if GROUPS:
        grad_sums += (first_q * num_heads + head) * num_groups
        mask = (rows[:, None] < rows_q) & (tl.arange(0, GROUPS)[None, :] < num_groups)
        shares = tl.load(row_pointers(grad_sums, rows, num_heads * num_groups, GROUPS), mask=mask, other=0.0)
    for start in range(0, rows_k, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        keys = read_rows(k, place_k, head, start, rows_k, k_stride, k_head_stride, HEAD_DIM, BLOCK_K, BLOCK_D, TMA)
        keys = add_bias(keys, key_bias, columns, rows_k, bias_length, row_size, HAS_BIAS, HEAD_DIM, BLOCK_D)
        # Before the products: one barrier serves both. float32 would hold an operand in registers across a second.
        values = read_rows(v, place_k, head, start, rows_k, v_stride, v_head_stride, HEAD_DIM, BLOCK_K, BLOCK_D, TMA)
        scores = product(queries, tl.trans(keys), PRECISION) * (scale * 1.4426950408889634)
        weights = tl.exp2(tl.where(columns[None, :] < rows_k, scores - norms[:, None], float("-inf")))
        grad_weights = product(grads, tl.trans(values), PRECISION)
        if GROUPS:
            members = membership(key_groups + first_k, columns, rows_k, GROUPS, tl.float32)
            grad_weights += product(shares, tl.trans(members), PRECISION)
        grad_scores = narrow(weights * (grad_weights - means[:, None]), keys.dtype)
        result += product(grad_scores, keys, PRECISION)
    return result
