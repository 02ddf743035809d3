"""The public function: checks, the three layouts of queries, and the choice of implementation."""

from itertools import pairwise

import torch
from torch import Tensor

from idavlm.ops.cross_attention.naive import naive_cross_attention
from idavlm.ops.cross_attention.sdpa import sdpa_cross_attention
from idavlm.utils import check_choice, outside_compile

_IMPLEMENTATIONS = {"eager": naive_cross_attention, "sdpa": sdpa_cross_attention}

ATTN_IMPLEMENTATIONS = tuple(_IMPLEMENTATIONS)
"""Values of ``attn_implementation``. A kernel enters by a line in the table above."""


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    attn_implementation: str = "sdpa",
    output_attentions: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head cross-attention ``softmax(scale * q k^T) v`` over N independent segments, dense or ragged.

    Keys and values come dense, or packed with ``cu_seqlens_k``. Queries come dense, packed with ``cu_seqlens_q``, or
    shared: one set for all segments, stored once, its gradient summed over them. All combinations are allowed.

    Args:
        q: ``[N, Lq, H, D]`` dense; ``[Tq, H, D]`` packed (``cu_seqlens_q`` given); ``[Lq, H, D]`` shared.
        k: ``[N, Lk, H, D]`` dense, or ``[Tk, H, D]`` packed (``cu_seqlens_k`` given).
        v: as ``k``.
        cu_seqlens_q: ``[N + 1]`` integers from 0 to Tq: segment n holds tokens ``cu_seqlens_q[n]`` up to
            ``cu_seqlens_q[n + 1]``, as in flash-attn. Segments may be empty.
        cu_seqlens_k: the same for keys. A query of a segment without keys gives zeros.
        max_seqlen_q: longest segment of queries; read from ``cu_seqlens_q`` if not given (a host sync on CUDA).
            On CUDA a given value is trusted: one that is too small gives wrong results.
        max_seqlen_k: the same for keys.
        scale: factor on the scores; ``D ** -0.5`` if not given.
        attn_implementation: ``"sdpa"``, or ``"eager"``, the float32 reference.
        output_attentions: also return the attention weights.

    Returns:
        ``[N, Lq, H, D]`` for dense and shared queries, ``[Tq, H, D]`` for packed ones. With ``output_attentions`` a
        pair of it and the weights ``[N, H, max_seqlen_q, max_seqlen_k]``, float32, zero where nothing stands.

    Raises:
        ValueError: shapes, segments or implementation that do not fit, with the argument and the remedy.
    """
    check_choice("attn_implementation", attn_implementation, ATTN_IMPLEMENTATIONS)
    _check_shapes(q, k, v, cu_seqlens_q, cu_seqlens_k)
    num_segments = k.shape[0] if cu_seqlens_k is None else cu_seqlens_k.numel() - 1
    if q.dim() == 3 and cu_seqlens_q is None:
        q = q.expand(num_segments, -1, -1, -1)
    num_query_segments = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    if num_query_segments != num_segments:
        raise ValueError(
            f"q has {num_query_segments} segments but k and v have {num_segments}; give one group of queries to each "
            "group of keys, or [Lq, H, D] queries without cu_seqlens_q to share them."
        )
    max_seqlen_q, equal_q = _measure_segments("q", q, cu_seqlens_q, max_seqlen_q)
    max_seqlen_k, equal_k = _measure_segments("k", k, cu_seqlens_k, max_seqlen_k)
    # Implementations see packed tokens only where their segments differ in length.
    if equal_q:
        q, cu_seqlens_q = q.unflatten(0, (num_segments, max_seqlen_q)), None
    if equal_k:
        k, v = (x.unflatten(0, (num_segments, max_seqlen_k)) for x in (k, v))
        cu_seqlens_k = None
    if num_segments == 0:
        output = q + k.sum() + v.sum()  # empty, and still hangs on all three
        attentions = q.new_zeros(
            0, q.shape[-2], max_seqlen_q, max_seqlen_k, dtype=torch.promote_types(q.dtype, torch.float32)
        )
    else:
        output, attentions = _IMPLEMENTATIONS[attn_implementation](
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            output_attentions=output_attentions,
        )
    if equal_q:
        output = output.flatten(0, 1)
    return (output, attentions) if output_attentions else output


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> None:
    dims_q, dims_k = (3, 4) if cu_seqlens_q is None else (3,), (4,) if cu_seqlens_k is None else (3,)
    if q.dim() not in dims_q:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected [Tq, H, D] with cu_seqlens_q, [N, Lq, H, D] or "
                         "[Lq, H, D] without.")  # fmt: skip
    if k.dim() not in dims_k:
        raise ValueError(f"k has shape {tuple(k.shape)}; expected [Tk, H, D] with cu_seqlens_k, [N, Lk, H, D] without.")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)} but k has {tuple(k.shape)}; they must be the same.")
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu_seqlens is not None and (
            cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point()
        ):
            raise ValueError(
                f"{name} has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; expected [N + 1] integers."
            )
    if q.shape[-2:] != k.shape[-2:]:
        raise ValueError(f"q has [H, D] = {list(q.shape[-2:])} but k has {list(k.shape[-2:])}; they must be the same.")


@outside_compile
def _measure_segments(name: str, x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> tuple[int, bool]:
    """Check ``cu_seqlens_{name}`` and ``max_seqlen_{name}`` of ``x``.

    Values are read on the CPU only: elsewhere that would cost a host sync.

    Returns:
        Length of the longest segment, and whether ``x`` is packed with all segments of that length.
    """
    if cu_seqlens is None:
        return x.shape[1], False
    if max_seqlen is None or cu_seqlens.device.type == "cpu":
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] != x.shape[0] or values != sorted(values):
            raise ValueError(f"cu_seqlens_{name}={values} must rise from 0 to the number of packed tokens, {len(x)}.")
        longest = max((end - start for start, end in pairwise(values)), default=0)
        if max_seqlen is not None and max_seqlen < longest:
            raise ValueError(
                f"max_seqlen_{name}={max_seqlen} but a segment has {longest} tokens; give the longest, or leave it out."
            )
        max_seqlen = longest if max_seqlen is None else max_seqlen
    num_segments = cu_seqlens.numel() - 1
    return max_seqlen, num_segments > 0 and x.shape[0] == num_segments * max_seqlen
