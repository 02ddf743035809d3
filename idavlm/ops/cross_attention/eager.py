"""``attn_implementation="eager"``: the reference implementation.

It loops over segments, materialises the attention matrix, and computes in float32 (float64 inputs in float64).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from idavlm.ops.cross_attention.segments import (
    Options,
    Segments,
    add_key_bias,
    group_sums,
    repeat_shared,
    split_segments,
)


def eager_cross_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, options: Options
) -> tuple[Tensor, Tensor | None]:
    """``softmax(scale * q k^T) v`` per segment."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = repeat_shared(q, segments), add_key_bias(k, options.key_bias, segments)
    outputs, attentions = [], []
    with torch.autocast(q.device.type, enabled=False):
        for queries, keys, values in zip(
            split_segments(q.to(dtype), segments.cu_seqlens_q),
            split_segments(k.to(dtype), segments.cu_seqlens_k),
            split_segments(v.to(dtype), segments.cu_seqlens_k),
            strict=True,
        ):
            weights = torch.einsum("qhd,khd->hqk", queries * options.scale, keys).softmax(dim=-1)
            outputs.append(torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype))
            if options.output_attentions:
                num_q, num_k = weights.shape[1:]
                attentions.append(F.pad(weights, (0, segments.max_seqlen_k - num_k, 0, segments.max_seqlen_q - num_q)))
    output = torch.stack(outputs) if segments.cu_seqlens_q is None else torch.cat(outputs)
    if not options.output_attentions:
        return output, None
    weights = torch.stack(attentions)
    if options.key_groups is not None:
        weights = group_sums(weights, len(q), segments, options)
    return output, weights
