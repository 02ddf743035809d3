"""The forward kernel: a block of queries of one head reads all keys of its segment."""

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
    row_mask,
    row_pointers,
    segment_rows,
    segment_span,
    write_rows,
)


@triton.jit
def attend_forward(
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
    """A program a block; with ``TMA`` a fixed number of programs, which walk over all segments and deal out the blocks.

    Dealt one after the other, blocks of long and of short segments spread evenly; empty segments have none.
    """
    row_size = num_heads * HEAD_DIM
    if TMA:
        sets = 1 if SHARED_Q else num_segments
        all_q = describe(q, sets, length_q, q_stride, num_heads, q_head_stride, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA)
        all_k = describe(k, num_segments, length_k, k_stride, num_heads, k_head_stride, HEAD_DIM, BLOCK_K, BLOCK_D, TMA)
        all_v = describe(v, num_segments, length_k, v_stride, num_heads, v_head_stride, HEAD_DIM, BLOCK_K, BLOCK_D, TMA)
        all_out = describe(out, num_segments, length_q, row_size, num_heads, HEAD_DIM, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA)
        turn, programs = tl.program_id(0), tl.num_programs(0)
        for segment in tl.range(num_segments, disable_licm=True):
            first_q, rows_q = segment_span(cu_seqlens_q, segment, length_q, RAGGED_Q)
            first_k, rows_k = segment_span(cu_seqlens_k, segment, length_k, RAGGED_K)
            blocks = tl.cdiv(rows_q, BLOCK_Q)
            if turn < blocks * num_heads:
                its_q = segment_rows(
                    all_q, q, 0 if SHARED_Q else first_q, rows_q, q_stride, num_heads, q_head_stride,
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
                its_out = segment_rows(
                    all_out, out, first_q, rows_q, row_size, num_heads, HEAD_DIM,
                    RAGGED_Q, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA,
                )  # fmt: skip
                for item in tl.range(turn, blocks * num_heads, programs, disable_licm=True):
                    _attend_block(
                        its_q, its_k, its_v, its_out, key_bias, key_groups, sums, lse,
                        segment, item // blocks, (item % blocks) * BLOCK_Q, first_q, rows_q, first_k, rows_k,
                        q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, scale, num_heads,
                        num_rows, bias_length, num_groups, RAGGED_Q, RAGGED_K, SHARED_Q, HAS_BIAS, GROUPS, HEAD_DIM,
                        BLOCK_D, BLOCK_Q, BLOCK_K, PRECISION, TMA,
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
        q += head * q_head_stride
        if not SHARED_Q:
            q += first_q * q_stride
        k += first_k * k_stride + head * k_head_stride
        v += first_k * v_stride + head * v_head_stride
        out += first_q * row_size + head * HEAD_DIM
        _attend_block(
            q, k, v, out, key_bias, key_groups, sums, lse, segment, head, start, first_q, rows_q, first_k, rows_k,
            q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, scale, num_heads, num_rows,
            bias_length, num_groups, RAGGED_Q, RAGGED_K, SHARED_Q, HAS_BIAS, GROUPS, HEAD_DIM, BLOCK_D, BLOCK_Q,
            BLOCK_K, PRECISION, TMA,
        )  # fmt: skip


@inlined
def _attend_block(
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
    """Softmax online: ``best`` is the highest score so far, ``total`` the sum of weights relative to it.

    ``lse`` keeps ``log2`` of the sum of ``exp(scores)`` for the backward pass. Sums of groups are one more product:
    weights times the membership of keys in groups, so no matrix of weights leaves the registers.
    """
    rows = start_q + tl.arange(0, BLOCK_Q)
    row_size = num_heads * HEAD_DIM
    key_bias += head * HEAD_DIM
    place_q = 0 if RAGGED_Q else segment
    place_k = 0 if RAGGED_K else segment
    queries = read_rows(
        q, 0 if SHARED_Q else place_q, head, start_q, rows_q, q_stride, q_head_stride, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA
    )

    best = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if GROUPS:
        shares = tl.zeros([BLOCK_Q, GROUPS], tl.float32)
    for start in tl.range(0, rows_k, BLOCK_K, warp_specialize=TMA == 2):
        columns = start + tl.arange(0, BLOCK_K)
        keys = read_rows(k, place_k, head, start, rows_k, k_stride, k_head_stride, HEAD_DIM, BLOCK_K, BLOCK_D, TMA)
        keys = add_bias(keys, key_bias, columns, rows_k, bias_length, row_size, HAS_BIAS, HEAD_DIM, BLOCK_D)
        scores = product(queries, tl.trans(keys), PRECISION) * (scale * 1.4426950408889634)
        scores = tl.where(columns[None, :] < rows_k, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(best - higher)
        best = higher
        total = total * shrink + tl.sum(weights, 1)
        values = read_rows(v, place_k, head, start, rows_k, v_stride, v_head_stride, HEAD_DIM, BLOCK_K, BLOCK_D, TMA)
        result = result * shrink[:, None]
        result += product(narrow(weights, values.dtype), values, PRECISION)
        if GROUPS:
            # Weights are at most 1, and float16 keeps them more exactly than bfloat16.
            kind: tl.constexpr = tl.float32 if values.dtype == tl.float32 else tl.float16
            members = membership(key_groups + first_k, columns, rows_k, GROUPS, kind)
            shares = shares * shrink[:, None]
            shares += product(weights.to(kind), members, PRECISION)

    divisor = tl.where(total == 0, 1.0, total)  # no keys: zeros
    result = result / divisor[:, None]
    write_rows(out, result, place_q, head, start_q, rows_q, row_size, HEAD_DIM, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA)
    lse += first_q + head.to(tl.int64) * num_rows
    tl.store(lse + rows, best + tl.log2(divisor), mask=rows < rows_q)
    if GROUPS:
        sums += (first_q * num_heads + head) * num_groups
        mask = row_mask(rows, rows_q, GROUPS, GROUPS) & (tl.arange(0, GROUPS)[None, :] < num_groups)
        tl.store(row_pointers(sums, rows, num_heads * num_groups, GROUPS), shares / divisor[:, None], mask=mask)
