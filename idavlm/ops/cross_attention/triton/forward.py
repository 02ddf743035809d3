"""The forward kernel: one program reads one block of queries of one head, and all keys of its segment."""

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
):
    """Softmax online: ``best`` is the highest score so far, ``total`` the sum of weights relative to it.

    ``lse`` keeps ``log2`` of the sum of ``exp(scores)`` for the backward pass. Sums of groups are one more product:
    weights times the membership of keys in groups, so no matrix of weights leaves the registers.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    segment = block // num_blocks
    rows = (block % num_blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    first_q, rows_q = segment_span(cu_seqlens_q, segment, length_q, RAGGED_Q)
    first_k, rows_k = segment_span(cu_seqlens_k, segment, length_k, RAGGED_K)
    if (block % num_blocks) * BLOCK_Q >= rows_q:
        return

    q += head * q_head_stride
    if not SHARED_Q:
        q += first_q * q_stride
    k += first_k * k_stride + head * k_head_stride
    v += first_k * v_stride + head * v_head_stride
    key_bias += head * HEAD_DIM
    queries = load_rows(q, rows, rows_q, q_stride, HEAD_DIM, BLOCK_D)

    best = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if GROUPS:
        shares = tl.zeros([BLOCK_Q, GROUPS], tl.float32)
    for start in range(0, rows_k, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        keys = load_keys(
            k, key_bias, columns, rows_k, k_stride, bias_length, num_heads * HEAD_DIM,
            HAS_BIAS, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        scores = product(queries, tl.trans(keys), PRECISION) * (scale * 1.4426950408889634)
        scores = tl.where(columns[None, :] < rows_k, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(best - higher)
        best = higher
        total = total * shrink + tl.sum(weights, 1)
        values = load_rows(v, columns, rows_k, v_stride, HEAD_DIM, BLOCK_D)
        result = result * shrink[:, None]
        result += product(narrow(weights, values.dtype), values, PRECISION)
        if GROUPS:
            # Weights are at most 1, and float16 keeps them more exactly than bfloat16.
            kind: tl.constexpr = tl.float32 if values.dtype == tl.float32 else tl.float16
            members = membership(key_groups + first_k, columns, rows_k, GROUPS, kind)
            shares = shares * shrink[:, None]
            shares += product(weights.to(kind), members, PRECISION)

    divisor = tl.where(total == 0, 1.0, total)  # no keys: zeros
    out += first_q * num_heads * HEAD_DIM + head * HEAD_DIM
    result = result / divisor[:, None]
    store_rows(out, result, rows, rows_q, num_heads * HEAD_DIM, HEAD_DIM, BLOCK_D)
    lse += first_q + head.to(tl.int64) * num_rows
    tl.store(lse + rows, best + tl.log2(divisor), mask=rows < rows_q)
    if GROUPS:
        sums += (first_q * num_heads + head) * num_groups
        mask = row_mask(rows, rows_q, GROUPS, GROUPS) & (tl.arange(0, GROUPS)[None, :] < num_groups)
        tl.store(row_pointers(sums, rows, num_heads * num_groups, GROUPS), shares / divisor[:, None], mask=mask)
