"""The backward kernel over blocks of queries: their gradient, accumulated in registers in a fixed order."""

import triton
import triton.language as tl

from idavlm.ops.cross_attention.triton import device_functions as device


@triton.jit
def bwd_dq(inputs, backward, grad_q, OPTIONS: tl.constexpr):
    """Compute ``grad_q``. Blocks are assigned to programs as in ``fwd.py``, except for shared queries.

    With ``SHARED_Q`` a program keeps one block of queries and loops over every ``num_parts``-th segment. It writes one
    partial sum: ``grad_q`` is float32 ``[num_parts, Lq, H, D]``, and the first axis of the grid has
    ``num_parts * num_blocks`` programs.
    """
    grad_out = device.contiguous_rows(backward.grad_out, inputs, OPTIONS)
    grad_q = device.contiguous_rows(grad_q, inputs, OPTIONS)
    if OPTIONS.TMA:
        all_q = device.describe_queries(inputs.q, inputs, OPTIONS.SHARED_Q, OPTIONS)
        all_k = device.describe_keys(inputs.k, inputs, OPTIONS)
        all_v = device.describe_keys(inputs.v, inputs, OPTIONS)
        all_do = device.describe_queries(grad_out, inputs, False, OPTIONS)
    if OPTIONS.SHARED_Q:
        block, head = tl.program_id(0), tl.program_id(1)
        part = block // inputs.num_blocks
        start = (block % inputs.num_blocks) * OPTIONS.BLOCK_Q
        q = all_q if OPTIONS.TMA else device.offset_rows(inputs.q, 0, head)
        queries = device.read_rows(q, 0, head, start, inputs.length_q, OPTIONS.BLOCK_Q, OPTIONS)
        dq = tl.full([OPTIONS.BLOCK_Q, OPTIONS.BLOCK_D], 0.0, tl.float32)
        num_parts = tl.num_programs(0) // inputs.num_blocks
        for number in tl.range(part, inputs.num_segments, num_parts, disable_licm=True):
            segment = device.load_segment(number, inputs, OPTIONS)
            if OPTIONS.TMA:
                k = device.segment_keys(inputs.k, all_k, segment, inputs, OPTIONS)
                v = device.segment_keys(inputs.v, all_v, segment, inputs, OPTIONS)
                do = all_do
            else:
                # Offsets are added one after the other; the sum of both takes more registers.
                k = device.offset_rows(device.offset_rows(inputs.k, segment.first_k, 0), 0, head)
                v = device.offset_rows(device.offset_rows(inputs.v, segment.first_k, 0), 0, head)
                do = device.offset_rows(device.offset_rows(grad_out, segment.first_q, 0), 0, head)
            dq = _accumulate_dq(dq, queries, k, v, do, segment, head, start, inputs, backward, OPTIONS)
        grad_q = device.offset_rows(grad_q, tl.cast(part, tl.int64) * inputs.length_q, head)
        rows = start + tl.arange(0, OPTIONS.BLOCK_Q)
        device.store_rows(grad_q, dq * inputs.scale, rows, inputs.length_q, OPTIONS)
    elif OPTIONS.TMA:
        all_dq = device.describe_queries(grad_q, inputs, False, OPTIONS)
        first_item, programs = tl.program_id(0), tl.num_programs(0)
        for number in tl.range(inputs.num_segments, disable_licm=True):
            segment = device.load_segment(number, inputs, OPTIONS)
            blocks = tl.cdiv(segment.rows_q, OPTIONS.BLOCK_Q)
            items = blocks * inputs.num_heads
            if first_item < items:
                segment_q = device.segment_queries(inputs.q, all_q, segment, inputs, False, OPTIONS)
                segment_k = device.segment_keys(inputs.k, all_k, segment, inputs, OPTIONS)
                segment_v = device.segment_keys(inputs.v, all_v, segment, inputs, OPTIONS)
                segment_do = device.segment_queries(grad_out, all_do, segment, inputs, False, OPTIONS)
                segment_dq = device.segment_queries(grad_q, all_dq, segment, inputs, False, OPTIONS)
                for item in tl.range(first_item, items, programs, disable_licm=True):
                    head, start = item // blocks, (item % blocks) * OPTIONS.BLOCK_Q
                    _bwd_dq_block(
                        segment_q, segment_k, segment_v, segment_do, segment_dq, segment, head, start, inputs, backward,
                        OPTIONS,
                    )  # fmt: skip
            first_item = device.next_first_item(first_item, items, programs)
    else:
        block, head = tl.program_id(0), tl.program_id(1)
        segment = device.load_segment(block // inputs.num_blocks, inputs, OPTIONS)
        start = (block % inputs.num_blocks) * OPTIONS.BLOCK_Q
        if start >= segment.rows_q:
            return
        q = device.offset_rows(inputs.q, segment.first_q, head)
        k = device.offset_rows(inputs.k, segment.first_k, head)
        v = device.offset_rows(inputs.v, segment.first_k, head)
        do = device.offset_rows(grad_out, segment.first_q, head)
        dq = device.offset_rows(grad_q, segment.first_q, head)
        _bwd_dq_block(q, k, v, do, dq, segment, head, start, inputs, backward, OPTIONS)


@device.device_function
def _bwd_dq_block(q, k, v, grad_out, grad_q, segment, head, start_q, inputs, backward, OPTIONS: tl.constexpr):
    queries = device.read_rows(q, segment.index_q, head, start_q, segment.rows_q, OPTIONS.BLOCK_Q, OPTIONS)
    dq = tl.full([OPTIONS.BLOCK_Q, OPTIONS.BLOCK_D], 0.0, tl.float32)
    dq = _accumulate_dq(dq, queries, k, v, grad_out, segment, head, start_q, inputs, backward, OPTIONS)
    dq *= inputs.scale
    device.write_rows(grad_q, dq, segment.index_q, head, start_q, segment.rows_q, OPTIONS.BLOCK_Q, OPTIONS)


@device.device_function
def _accumulate_dq(dq, queries, k, v, grad_out, segment, head, start_q, inputs, backward, OPTIONS: tl.constexpr):
    """Add the gradient of one block of queries over all keys of one segment to ``dq``."""
    rows = start_q + tl.arange(0, OPTIONS.BLOCK_Q)
    bias = inputs.key_bias + head * OPTIONS.HEAD_DIM
    offset = segment.first_q + head.to(tl.int64) * inputs.num_rows
    lse_tile = tl.load(backward.lse + offset + rows, mask=rows < segment.rows_q, other=float("inf"))
    delta_tile = tl.load(backward.delta + offset + rows, mask=rows < segment.rows_q, other=0.0)
    do = device.read_rows(grad_out, segment.index_q, head, start_q, segment.rows_q, OPTIONS.BLOCK_Q, OPTIONS)
    if OPTIONS.GROUPS:
        grad_sums = backward.grad_sums + (segment.first_q * inputs.num_heads + head) * inputs.num_groups
        pointers, mask = device.group_elements(
            grad_sums, rows, segment.rows_q, inputs.num_heads, inputs.num_groups, OPTIONS.GROUPS
        )
        grad_sums_tile = tl.load(pointers, mask=mask, other=0.0)
    for start in range(0, segment.rows_k, OPTIONS.BLOCK_K):
        columns = start + tl.arange(0, OPTIONS.BLOCK_K)
        keys = device.read_keys(k, bias, segment, head, start, inputs, OPTIONS)
        # Loaded before the products so that one barrier serves both. With a second barrier, float32 would have to
        # keep an operand in registers across it.
        values = device.read_rows(v, segment.index_k, head, start, segment.rows_k, OPTIONS.BLOCK_K, OPTIONS)
        scores = device.dot(queries, tl.trans(keys), OPTIONS) * (inputs.scale * 1.4426950408889634)
        weights = tl.exp2(tl.where(columns[None, :] < segment.rows_k, scores - lse_tile[:, None], float("-inf")))
        grad_weights = device.dot(do, tl.trans(values), OPTIONS)
        if OPTIONS.GROUPS:
            one_hot = device.key_group_one_hot(segment, start, inputs, tl.float32, OPTIONS)
            grad_weights += device.dot(grad_sums_tile, tl.trans(one_hot), OPTIONS)
        grad_scores = device.cast(weights * (grad_weights - delta_tile[:, None]), keys.dtype)
        dq += device.dot(grad_scores, keys, OPTIONS)
    return dq
