"""The reference: one segment after the other, the attention matrix written out, in float32 (float64 stays float64)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from idavlm.ops.cross_attention.segments import split_segments


def naive_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    output_attentions: bool,
) -> tuple[Tensor, Tensor | None]:
    """``softmax(scale * q k^T) v`` for each segment; arguments as in :func:`idavlm.ops.cross_attention`, all given."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    outputs, attentions = [], []
    with torch.autocast(q.device.type, enabled=False):
        for queries, keys, values in zip(
            split_segments(q.to(dtype), cu_seqlens_q),
            split_segments(k.to(dtype), cu_seqlens_k),
            split_segments(v.to(dtype), cu_seqlens_k),
            strict=True,
        ):
            weights = torch.einsum("qhd,khd->hqk", queries * scale, keys).softmax(dim=-1)
            outputs.append(torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype))
            if output_attentions:
                num_q, num_k = weights.shape[1:]
                attentions.append(F.pad(weights, (0, max_seqlen_k - num_k, 0, max_seqlen_q - num_q)))
    output = torch.stack(outputs) if cu_seqlens_q is None else torch.cat(outputs)
    return output, (torch.stack(attentions) if output_attentions else None)
