"""The backward kernel by blocks of keys: their gradient, the values', and if wanted a part of the queries'.

Weights are computed again from ``lse``. Wide heads leave no registers for both sums: then it runs once for the keys and
once for the values, one product more. Two ways to the gradient of the queries, both measured by the tuner:

- *joined*: this kernel adds it up with atomic additions, five products in all;
- *separate*: ``backward_queries.py`` sums it in registers in a fixed order, seven products in all.
"""

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
def attend_backward_keys(
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
    JOINED: tl.constexpr,
    TMA: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Gradients of blocks of keys and values, as wanted; ``JOINED`` to the keys' the queries' (``grad_q`` float32).

    Handed out as in ``forward.py``.
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
        all_gk = describe(
            grad_k, num_segments, length_k, row_size, num_heads, HEAD_DIM, HEAD_DIM, BLOCK_K, BLOCK_D, TMA
        )
        all_gv = describe(
            grad_v, num_segments, length_k, row_size, num_heads, HEAD_DIM, HEAD_DIM, BLOCK_K, BLOCK_D, TMA
        )
        turn, programs = tl.program_id(0), tl.num_programs(0)
        for segment in tl.range(num_segments, disable_licm=True):
            first_q, rows_q = segment_span(cu_seqlens_q, segment, length_q, RAGGED_Q)
            first_k, rows_k = segment_span(cu_seqlens_k, segment, length_k, RAGGED_K)
            blocks = tl.cdiv(rows_k, BLOCK_K)
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
                its_g = segment_rows(
                    all_g, grad_out, first_q, rows_q, row_size, num_heads, HEAD_DIM,
                    RAGGED_Q, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA,
                )  # fmt: skip
                its_gk = segment_rows(
                    all_gk, grad_k, first_k, rows_k, row_size, num_heads, HEAD_DIM,
                    RAGGED_K, HEAD_DIM, BLOCK_K, BLOCK_D, TMA,
                )  # fmt: skip
                its_gv = segment_rows(
                    all_gv, grad_v, first_k, rows_k, row_size, num_heads, HEAD_DIM,
                    RAGGED_K, HEAD_DIM, BLOCK_K, BLOCK_D, TMA,
                )  # fmt: skip
                for item in tl.range(turn, blocks * num_heads, programs, disable_licm=True):
                    _keys_block(
                        its_q, its_k, its_v, its_g, its_gk, its_gv, grad_q, key_bias, key_groups, grad_sums, lse, delta,
                        segment, item // blocks, (item % blocks) * BLOCK_K, first_q, rows_q, first_k, rows_k,
                        q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, scale, num_heads,
                        num_rows, bias_length, num_groups, RAGGED_Q, RAGGED_K, SHARED_Q, HAS_BIAS, GROUPS, HEAD_DIM,
                        BLOCK_D, BLOCK_Q, BLOCK_K, PRECISION, JOINED, TMA, KEYS, VALUES,
                    )  # fmt: skip
            turn = next_turn(turn, blocks * num_heads, programs)
    else:
        block, head = tl.program_id(0), tl.program_id(1)
        segment = block // num_blocks
        start = (block % num_blocks) * BLOCK_K
        first_q, rows_q = segment_span(cu_seqlens_q, segment, length_q, RAGGED_Q)
        first_k, rows_k = segment_span(cu_seqlens_k, segment, length_k, RAGGED_K)
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
        _keys_block(
            q, k, v, grad_out, grad_k, grad_v, grad_q, key_bias, key_groups, grad_sums, lse,
            delta, segment, head, start, first_q, rows_q, first_k, rows_k, q_stride, q_head_stride, k_stride,
            k_head_stride, v_stride, v_head_stride, scale, num_heads, num_rows, bias_length, num_groups, RAGGED_Q,
            RAGGED_K, SHARED_Q, HAS_BIAS, GROUPS, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_K, PRECISION, JOINED, TMA, KEYS,
            VALUES,
        )  # fmt: skip


@inlined
def _keys_block(
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
    JOINED: tl.constexpr,
    TMA: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Tiles of weights lie keys by queries, so that both gradients are products with them as they are."""
    columns = start_k + tl.arange(0, BLOCK_K)
    row_size = num_heads * HEAD_DIM
    key_bias += head * HEAD_DIM
    place_q = 0 if RAGGED_Q else segment
    place_k = 0 if RAGGED_K else segment
    if not SHARED_Q:
        grad_q += first_q * row_size
    grad_q += head * HEAD_DIM
    grad_sums += (first_q * num_heads + head) * num_groups
    lse += first_q + head.to(tl.int64) * num_rows
    delta += first_q + head.to(tl.int64) * num_rows

    keys = read_rows(k, place_k, head, start_k, rows_k, k_stride, k_head_stride, HEAD_DIM, BLOCK_K, BLOCK_D, TMA)
    keys = add_bias(keys, key_bias, columns, rows_k, bias_length, row_size, HAS_BIAS, HEAD_DIM, BLOCK_D)
    if KEYS:
        values = read_rows(v, place_k, head, start_k, rows_k, v_stride, v_head_stride, HEAD_DIM, BLOCK_K, BLOCK_D, TMA)
        if GROUPS:
            members = membership(key_groups + first_k, columns, rows_k, GROUPS, tl.float32)
        key_sum = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    if VALUES:
        value_sum = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in tl.range(0, rows_q, BLOCK_Q, disable_licm=TMA):
        rows = start + tl.arange(0, BLOCK_Q)
        queries = read_rows(
            q, 0 if SHARED_Q else place_q, head, start, rows_q, q_stride, q_head_stride, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA
        )
        # Infinity behind the end makes those weights zero.
        norms = tl.load(lse + rows, mask=rows < rows_q, other=float("inf"))
        scores = product(keys, tl.trans(queries), PRECISION) * (scale * 1.4426950408889634)
        weights = tl.exp2(tl.where(columns[:, None] < rows_k, scores - norms[None, :], float("-inf")))
        grads = read_rows(grad_out, place_q, head, start, rows_q, row_size, HEAD_DIM, HEAD_DIM, BLOCK_Q, BLOCK_D, TMA)
        if VALUES:
            value_sum += product(narrow(weights, grads.dtype), grads, PRECISION)
        if KEYS:
            grad_weights = product(values, tl.trans(grads), PRECISION)
            if GROUPS:
                mask = (rows[:, None] < rows_q) & (tl.arange(0, GROUPS)[None, :] < num_groups)
                shares = tl.load(row_pointers(grad_sums, rows, num_heads * num_groups, GROUPS), mask=mask, other=0.0)
                grad_weights += product(members, tl.trans(shares), PRECISION)
            means = tl.load(delta + rows, mask=rows < rows_q, other=0.0)
            grad_scores = narrow(weights * (grad_weights - means[None, :]), keys.dtype)
            key_sum += product(grad_scores, queries, PRECISION)
            if JOINED:
                part = product(tl.trans(grad_scores), keys, PRECISION) * scale
                mask = row_mask(rows, rows_q, HEAD_DIM, BLOCK_D)
                tl.atomic_add(row_pointers(grad_q, rows, row_size, BLOCK_D), part, mask=mask, sem="relaxed")

    if KEYS:
        key_sum *= scale
        write_rows(grad_k, key_sum, place_k, head, start_k, rows_k, row_size, HEAD_DIM, HEAD_DIM, BLOCK_K, BLOCK_D, TMA)
    if VALUES:
        write_rows(
            grad_v, value_sum, place_k, head, start_k, rows_k, row_size, HEAD_DIM, HEAD_DIM, BLOCK_K, BLOCK_D, TMA
        )
