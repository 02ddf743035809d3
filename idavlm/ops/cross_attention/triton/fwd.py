"""The forward kernel: a block of queries of one head over all keys of its segment."""

import triton
import triton.language as tl

from idavlm.ops.cross_attention.triton import device_functions as device


@triton.jit
def fwd(args, OPTIONS: tl.constexpr):
    """Compute ``out``, ``sums`` and ``lse``. Grid: blocks of queries, heads.

    Online softmax: ``row_max`` is the running maximum of the scores, ``row_sum`` the sum of weights relative to it. The
    sums over groups are one more product, weights times a one-hot matrix of groups, so that the weights never leave the
    registers.
    """
    segment, head, start = device.block_of_program(OPTIONS.BLOCK_Q, args, OPTIONS)
    if start >= segment.rows_q:
        return
    rows = start + tl.arange(0, OPTIONS.BLOCK_Q)
    queries = device.load_queries(segment, head, rows, args, OPTIONS)
    row_max = tl.full([OPTIONS.BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.full([OPTIONS.BLOCK_Q], 0.0, tl.float32)
    acc = tl.full([OPTIONS.BLOCK_Q, OPTIONS.BLOCK_D], 0.0, tl.float32)
    if OPTIONS.GROUPS:
        group_acc = tl.full([OPTIONS.BLOCK_Q, OPTIONS.GROUPS], 0.0, tl.float32)
    for start_k in range(0, segment.rows_k, OPTIONS.BLOCK_K):
        columns = start_k + tl.arange(0, OPTIONS.BLOCK_K)
        keys = device.load_keys(segment, head, columns, args, OPTIONS)
        scores = device.dot(queries, tl.trans(keys), OPTIONS) * (args.scale * device.LOG2_E)
        scores = tl.where(columns[None, :] < segment.rows_k, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_max = new_max
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        values = device.load_values(segment, head, columns, args, OPTIONS)
        acc = acc * rescale[:, None]
        acc += device.dot(device.cast(weights, values.dtype), values, OPTIONS)
        if OPTIONS.GROUPS:
            # Weights are at most 1. float16 represents them more precisely than bfloat16.
            weight_dtype: tl.constexpr = tl.float32 if values.dtype == tl.float32 else tl.float16
            one_hot = device.one_hot_groups(segment, columns, weight_dtype, args, OPTIONS)
            group_acc = group_acc * rescale[:, None]
            group_acc += device.dot(weights.to(weight_dtype), one_hot, OPTIONS)

    divisor = tl.where(row_sum == 0, 1.0, row_sum)  # a segment without keys outputs zeros
    out = device.contiguous(args.out, OPTIONS.HEAD_DIM, args)
    device.store_rows(out, segment.first_q, head, rows, segment.rows_q, acc / divisor[:, None], OPTIONS)
    lse = device.per_query(args.lse, segment, head, rows, args)
    tl.store(lse, row_max + tl.log2(divisor), mask=rows < segment.rows_q)
    if OPTIONS.GROUPS:
        pointers, mask = device.sums_of_queries(args.sums, segment, head, rows, args, OPTIONS)
        tl.store(pointers, group_acc / divisor[:, None], mask=mask)
