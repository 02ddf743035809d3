"""The forward kernel. Each program computes blocks of queries of one head over all keys of their segment."""

import triton
import triton.language as tl

from idavlm.ops.cross_attention.triton import device_functions as device


@triton.jit
def fwd(inputs, out, sums, lse, OPTIONS: tl.constexpr):
    """Compute ``out``, ``lse`` and the attention weights summed over groups of keys (``sums``).

    Without ``TMA`` the grid has one program per block of queries and head. With ``TMA`` the kernel is persistent: a
    fixed number of programs loop over all segments and take the blocks in round-robin order. This balances long and
    short segments, and empty segments cost nothing.
    """
    out = device.contiguous_rows(out, inputs, OPTIONS)
    if OPTIONS.TMA:
        all_q = device.describe_queries(inputs.q, inputs, OPTIONS.SHARED_Q, OPTIONS)
        all_k = device.describe_keys(inputs.k, inputs, OPTIONS)
        all_v = device.describe_keys(inputs.v, inputs, OPTIONS)
        all_out = device.describe_queries(out, inputs, False, OPTIONS)
        first_item, programs = tl.program_id(0), tl.num_programs(0)
        for number in tl.range(inputs.num_segments, disable_licm=True):
            segment = device.load_segment(number, inputs, OPTIONS)
            blocks = tl.cdiv(segment.rows_q, OPTIONS.BLOCK_Q)
            items = blocks * inputs.num_heads
            if first_item < items:
                segment_q = device.segment_queries(inputs.q, all_q, segment, inputs, OPTIONS.SHARED_Q, OPTIONS)
                segment_k = device.segment_keys(inputs.k, all_k, segment, inputs, OPTIONS)
                segment_v = device.segment_keys(inputs.v, all_v, segment, inputs, OPTIONS)
                segment_out = device.segment_queries(out, all_out, segment, inputs, False, OPTIONS)
                for item in tl.range(first_item, items, programs, disable_licm=True):
                    head, start = item // blocks, (item % blocks) * OPTIONS.BLOCK_Q
                    _fwd_block(
                        segment_q, segment_k, segment_v, segment_out, sums, lse, segment, head, start, inputs, OPTIONS
                    )
            first_item = device.next_first_item(first_item, items, programs)
    else:
        block, head = tl.program_id(0), tl.program_id(1)
        segment = device.load_segment(block // inputs.num_blocks, inputs, OPTIONS)
        start = (block % inputs.num_blocks) * OPTIONS.BLOCK_Q
        if start >= segment.rows_q:
            return
        q = device.offset_rows(inputs.q, 0, head)
        if not OPTIONS.SHARED_Q:
            q = device.offset_rows(q, segment.first_q, 0)
        k = device.offset_rows(inputs.k, segment.first_k, head)
        v = device.offset_rows(inputs.v, segment.first_k, head)
        out = device.offset_rows(out, segment.first_q, head)
        _fwd_block(q, k, v, out, sums, lse, segment, head, start, inputs, OPTIONS)


@device.device_function
def _fwd_block(q, k, v, out, sums, lse, segment, head, start_q, inputs, OPTIONS: tl.constexpr):
    """Online softmax: ``row_max`` is the running maximum of the scores, ``row_sum`` the sum of weights relative to it.

    ``lse`` stores ``log2`` of the sum of ``exp(scores)`` for the backward pass. The group sums are one more product,
    weights times a one-hot matrix of groups, so that the weights never leave the registers.
    """
    rows = start_q + tl.arange(0, OPTIONS.BLOCK_Q)
    bias = inputs.key_bias + head * OPTIONS.HEAD_DIM
    index_q = 0 if OPTIONS.SHARED_Q else segment.index_q
    queries = device.read_rows(q, index_q, head, start_q, segment.rows_q, OPTIONS.BLOCK_Q, OPTIONS)

    row_max = tl.full([OPTIONS.BLOCK_Q], float("-inf"), tl.float32)
    row_sum = tl.full([OPTIONS.BLOCK_Q], 0.0, tl.float32)
    acc = tl.full([OPTIONS.BLOCK_Q, OPTIONS.BLOCK_D], 0.0, tl.float32)
    if OPTIONS.GROUPS:
        group_acc = tl.full([OPTIONS.BLOCK_Q, OPTIONS.GROUPS], 0.0, tl.float32)
    for start in tl.range(0, segment.rows_k, OPTIONS.BLOCK_K, warp_specialize=OPTIONS.TMA == 2):
        columns = start + tl.arange(0, OPTIONS.BLOCK_K)
        keys = device.read_keys(k, bias, segment, head, start, inputs, OPTIONS)
        scores = device.dot(queries, tl.trans(keys), OPTIONS) * (inputs.scale * 1.4426950408889634)
        scores = tl.where(columns[None, :] < segment.rows_k, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_max = new_max
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        values = device.read_rows(v, segment.index_k, head, start, segment.rows_k, OPTIONS.BLOCK_K, OPTIONS)
        acc = acc * rescale[:, None]
        acc += device.dot(device.cast(weights, values.dtype), values, OPTIONS)
        if OPTIONS.GROUPS:
            # Weights are at most 1. float16 represents them more precisely than bfloat16.
            weight_dtype: tl.constexpr = tl.float32 if values.dtype == tl.float32 else tl.float16
            one_hot = device.key_group_one_hot(segment, start, inputs, weight_dtype, OPTIONS)
            group_acc = group_acc * rescale[:, None]
            group_acc += device.dot(weights.to(weight_dtype), one_hot, OPTIONS)

    divisor = tl.where(row_sum == 0, 1.0, row_sum)  # a segment without keys outputs zeros
    acc = acc / divisor[:, None]
    device.write_rows(out, acc, segment.index_q, head, start_q, segment.rows_q, OPTIONS.BLOCK_Q, OPTIONS)
    lse += segment.first_q + head.to(tl.int64) * inputs.num_rows
    tl.store(lse + rows, row_max + tl.log2(divisor), mask=rows < segment.rows_q)
    if OPTIONS.GROUPS:
        sums += (segment.first_q * inputs.num_heads + head) * inputs.num_groups
        pointers, mask = device.group_elements(
            sums, rows, segment.rows_q, inputs.num_heads, inputs.num_groups, OPTIONS.GROUPS
        )
        tl.store(pointers, group_acc / divisor[:, None], mask=mask)
