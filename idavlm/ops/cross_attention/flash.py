"""``attn_implementation="flash_attention_2"``: the variable-length attention of the package flash-attn."""

import torch
from torch import Tensor

from idavlm.ops.cross_attention.sdpa import attention_weights, cast_for_autocast
from idavlm.ops.cross_attention.segments import Options, Segments, add_key_bias, repeat_shared


def flash_cross_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, options: Options
) -> tuple[Tensor, Tensor | None]:
    """One call for all segments. Shared queries are copied per segment."""
    q, k, v, key_bias = cast_for_autocast(q, k, v, options.key_bias)
    _check(q)
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise ImportError(
            "attn_implementation='flash_attention_2' needs the package flash-attn; run pip install "
            "'idavlm[flash-attn]', or use attn_implementation='sdpa'."
        ) from error
    q, k = repeat_shared(q, segments), add_key_bias(k, key_bias, segments)
    dense = segments.cu_seqlens_q is None
    output = flash_attn_varlen_func(
        q.flatten(0, 1) if dense else q,
        k.flatten(0, 1) if k.dim() == 4 else k,
        v.flatten(0, 1) if v.dim() == 4 else v,
        _segment_starts(segments.cu_seqlens_q, segments.num, segments.max_seqlen_q, q.device),
        _segment_starts(segments.cu_seqlens_k, segments.num, segments.max_seqlen_k, q.device),
        segments.max_seqlen_q,
        segments.max_seqlen_k,
        softmax_scale=options.scale,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    if dense:
        output = output.unflatten(0, (segments.num, segments.max_seqlen_q))
    if not options.output_attentions:
        return output, None
    return output, attention_weights(q, k, segments, options)


def _segment_starts(cu_seqlens: Tensor | None, num: int, length: int, device: torch.device) -> Tensor:
    if cu_seqlens is None:
        return torch.arange(num + 1, dtype=torch.int32, device=device) * length
    return cu_seqlens.to(device=device, dtype=torch.int32)


def _check(q: Tensor) -> None:
    if q.device.type != "cuda":
        raise ValueError(
            f"attn_implementation='flash_attention_2' needs a CUDA GPU, but q is on {q.device}; use "
            "attn_implementation='sdpa'."
        )
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"q has dtype {q.dtype}; attn_implementation='flash_attention_2' supports float16 and bfloat16. Cast it or "
            "use autocast, or use attn_implementation='sdpa'."
        )
