"""The backward kernels: by blocks of keys (with or without the queries' gradient), and by blocks of queries.

Weights are computed again from ``lse``. Two ways to the gradient of the queries, both measured by the tuner:

- *joined*: :func:`attend_backward_keys` adds it up with atomic additions, five products in all;
- *separate*: :func:`attend_backward_queries` sums it in registers in a fixed order, seven products in all. Shared
  queries stay in place while the program walks from segment to segment.
"""

import triton
import triton.language as tl

from idavlm.ops.cross_attention.triton.tiles import (
    load_keys,
    load_rows,
    membership,
    narrow,
    product,
    row_mask,
    row_pointers,
    segment_span,
    store_rows,
)


@triton.jit
def attend_backward_delta(
    out,
    grad_out,
    sums,
    grad_sums,
    delta,
    num_heads,
    num_rows,
    num_groups,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """``delta``: the weighted mean of the gradient of the weights, from what it was multiplied into."""
    head = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * BLOCK_Q
    rows = tl.arange(0, BLOCK_Q)
    left = num_rows - first
    base = (first * num_heads + head) * HEAD_DIM
    outputs = load_rows(out + base, rows, left, num_heads * HEAD_DIM, HEAD_DIM, BLOCK_D).to(tl.float32)
    grads = load_rows(grad_out + base, rows, left, num_heads * HEAD_DIM, HEAD_DIM, BLOCK_D).to(tl.float32)
    mean = tl.sum(outputs * grads, 1)
    if GROUPS:
        base = (first * num_heads + head) * num_groups
        mask = row_mask(rows, left, GROUPS, GROUPS) & (tl.arange(0, GROUPS)[None, :] < num_groups)
        shares = tl.load(row_pointers(sums + base, rows, num_heads * num_groups, GROUPS), mask=mask, other=0.0)
        grads = tl.load(row_pointers(grad_sums + base, rows, num_heads * num_groups, GROUPS), mask=mask, other=0.0)
        mean += tl.sum(shares * grads, 1)
    tl.store(delta + head.to(tl.int64) * num_rows + first + rows, mean, mask=rows < left)


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
):
    """Gradients of one block of keys and values; with ``JOINED`` their part of the queries' too (``grad_q`` float32).

    Tiles of weights lie keys by queries, so that both gradients are products with them as they are.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    segment = block // num_blocks
    columns = (block % num_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    first_q, rows_q = segment_span(cu_seqlens_q, segment, length_q, RAGGED_Q)
    first_k, rows_k = segment_span(cu_seqlens_k, segment, length_k, RAGGED_K)
    if (block % num_blocks) * BLOCK_K >= rows_k:
        return

    row_size = num_heads * HEAD_DIM
    q += head * q_head_stride
    grad_q += head * HEAD_DIM
    if not SHARED_Q:
        q += first_q * q_stride
        grad_q += first_q * row_size
    k += first_k * k_stride + head * k_head_stride
    v += first_k * v_stride + head * v_head_stride
    key_bias += head * HEAD_DIM
    grad_out += first_q * row_size + head * HEAD_DIM
    grad_sums += (first_q * num_heads + head) * num_groups
    lse += first_q + head.to(tl.int64) * num_rows
    delta += first_q + head.to(tl.int64) * num_rows

    keys = load_keys(k, key_bias, columns, rows_k, k_stride, bias_length, row_size, HAS_BIAS, HEAD_DIM, BLOCK_D)
    values = load_rows(v, columns, rows_k, v_stride, HEAD_DIM, BLOCK_D)
    if GROUPS:
        members = membership(key_groups + first_k, columns, rows_k, GROUPS, tl.float32)
    key_sum = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, rows_q, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        queries = load_rows(q, rows, rows_q, q_stride, HEAD_DIM, BLOCK_D)
        # Infinity behind the end makes those weights zero.
        norms = tl.load(lse + rows, mask=rows < rows_q, other=float("inf"))
        scores = product(keys, tl.trans(queries), PRECISION) * (scale * 1.4426950408889634)
        weights = tl.exp2(tl.where(columns[:, None] < rows_k, scores - norms[None, :], float("-inf")))
        grads = load_rows(grad_out, rows, rows_q, row_size, HEAD_DIM, BLOCK_D)
        value_sum += product(narrow(weights, grads.dtype), grads, PRECISION)
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

    grad_k += first_k * row_size + head * HEAD_DIM
    grad_v += first_k * row_size + head * HEAD_DIM
    store_rows(grad_k, key_sum * scale, columns, rows_k, row_size, HEAD_DIM, BLOCK_D)
    store_rows(grad_v, value_sum, columns, rows_k, row_size, HEAD_DIM, BLOCK_D)


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
    num_blocks,
    bias_length,
    num_groups,
    num_segments,
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
):
    """Gradient of one block of queries. Shared ones: of every ``num_parts``-th segment, one partial sum a program.

    The grid's first axis is segments times blocks; for shared queries parts times blocks, and ``grad_q`` is
    ``[num_parts, Lq, H, D]``.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    part = block // num_blocks
    start_q = (block % num_blocks) * BLOCK_Q
    rows = start_q + tl.arange(0, BLOCK_Q)
    row_size = num_heads * HEAD_DIM
    if SHARED_Q:
        step = tl.num_programs(0) // num_blocks
        last_segment = num_segments
        first_q, rows_q = segment_span(cu_seqlens_q, part, length_q, False)
        queries_base = q + head * q_head_stride
    else:
        step = 1
        last_segment = part + 1
        first_q, rows_q = segment_span(cu_seqlens_q, part, length_q, RAGGED_Q)
        queries_base = q + first_q * q_stride + head * q_head_stride
    if start_q >= rows_q:
        return

    grad_q += first_q * row_size + head * HEAD_DIM
    key_bias += head * HEAD_DIM
    queries = load_rows(queries_base, rows, rows_q, q_stride, HEAD_DIM, BLOCK_D)
    result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for segment in range(part, last_segment, step):
        if SHARED_Q:
            first_q = tl.cast(segment, tl.int64) * length_q
        first_k, rows_k = segment_span(cu_seqlens_k, segment, length_k, RAGGED_K)
        offset = first_q + head.to(tl.int64) * num_rows
        norms = tl.load(lse + offset + rows, mask=rows < rows_q, other=float("inf"))
        means = tl.load(delta + offset + rows, mask=rows < rows_q, other=0.0)
        grad_base = grad_out + first_q * row_size + head * HEAD_DIM
        grads = load_rows(grad_base, rows, rows_q, row_size, HEAD_DIM, BLOCK_D)
        if GROUPS:
            sums_base = grad_sums + (first_q * num_heads + head) * num_groups
            mask = (rows[:, None] < rows_q) & (tl.arange(0, GROUPS)[None, :] < num_groups)
            shares = tl.load(row_pointers(sums_base, rows, num_heads * num_groups, GROUPS), mask=mask, other=0.0)
        keys_base = k + first_k * k_stride + head * k_head_stride
        values_base = v + first_k * v_stride + head * v_head_stride
        for start in range(0, rows_k, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            keys = load_keys(
                keys_base, key_bias, columns, rows_k, k_stride, bias_length, row_size,
                HAS_BIAS, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            # Before the products: one barrier serves both. float32 would hold an operand in registers across a second.
            values = load_rows(values_base, columns, rows_k, v_stride, HEAD_DIM, BLOCK_D)
            scores = product(queries, tl.trans(keys), PRECISION) * (scale * 1.4426950408889634)
            weights = tl.exp2(tl.where(columns[None, :] < rows_k, scores - norms[:, None], float("-inf")))
            grad_weights = product(grads, tl.trans(values), PRECISION)
            if GROUPS:
                members = membership(key_groups + first_k, columns, rows_k, GROUPS, tl.float32)
                grad_weights += product(shares, tl.trans(members), PRECISION)
            grad_scores = narrow(weights * (grad_weights - means[:, None]), keys.dtype)
            result += product(grad_scores, keys, PRECISION)
    store_rows(grad_q, result * scale, rows, rows_q, row_size, HEAD_DIM, BLOCK_D)
