"""Multi-head cross-attention with positions folded into the projections' biases."""

import torch
from torch import Tensor, nn

from idavlm.ops import cross_attention
from idavlm.ops.cross_attention import ATTN_IMPLEMENTATIONS
from idavlm.utils import check_choice, check_positive


class CrossAttention(nn.Module):
    """Queries attend to another sequence's keys and values, in N dense or ragged segments.

    ``out_proj(softmax(q k^T / sqrt(head_dim)) v)`` with ``q = q_proj(query) + query_bias``,
    ``k = k_proj(key_value) + key_bias`` and ``v = v_proj(key_value)``. It computes what ``nn.MultiheadAttention``
    computes for ``(query + position, key_value + position, key_value)`` with less work: positions are the same for all
    images, so they are projected once and enter as biases (:meth:`query_bias`, :meth:`key_bias`); queries shared by
    all segments are projected once; no attention matrix is kept.

    Parameters (``state_dict`` keys): ``q_proj``, ``out_proj`` ``[C, C]`` and ``k_proj``, ``v_proj`` ``[C, Ckv]``, each
    with ``.weight`` and ``.bias``. They are called as modules, so LoRA and quantised layers may stand in for them.

    Args:
        hidden_size: C, width of queries and output.
        num_heads: must divide ``hidden_size``.
        key_value_hidden_size: Ckv, width of the other sequence; ``hidden_size`` if not given.
        attn_implementation: see :func:`idavlm.ops.cross_attention`.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        key_value_hidden_size: int | None = None,
        attn_implementation: str = "sdpa",
    ):
        super().__init__()
        check_positive(hidden_size=hidden_size, num_heads=num_heads, key_value_hidden_size=key_value_hidden_size)
        check_choice("attn_implementation", attn_implementation, ATTN_IMPLEMENTATIONS)
        if hidden_size % num_heads:
            raise ValueError(
                f"num_heads={num_heads} does not divide hidden_size={hidden_size}; choose a divisor of it."
            )
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.attn_implementation = attn_implementation
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(key_value_hidden_size or hidden_size, hidden_size)
        self.v_proj = nn.Linear(key_value_hidden_size or hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        key_value: Tensor,
        *,
        query_bias: Tensor | None = None,
        key_bias: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        output_attentions: bool = False,
        key_groups: Tensor | None = None,
        num_key_groups: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        Args:
            query: ``[N, Lq, C]``, or ``[Lq, C]`` shared by all segments. With ``cu_seqlens_q`` any ``[..., C]``: its
                leading dimensions are one packed sequence (images of a sample, one after the other).
            key_value: ``[N, Lk, Ckv]``; with ``cu_seqlens_k`` any ``[..., Ckv]``.
            query_bias: added to the projected queries, broadcastable to ``[..., C]``.
            key_bias: ``[L, C]``, added to the projected keys by their position in their segment, modulo L.
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as in :func:`idavlm.ops.cross_attention`.
            output_attentions: also return the weights ``[N, H, max_seqlen_q, max_seqlen_k]``.
            key_groups, num_key_groups: return them summed over groups of keys, as in that function.

        Returns:
            ``[N, Lq, C]``, or the shape of ``query`` with ``cu_seqlens_q``; a pair with ``output_attentions``.
        """
        q, k = self.queries(query, query_bias), self.keys(key_value)
        v = self._heads(self.v_proj(key_value))
        if cu_seqlens_q is not None:
            q = q.flatten(0, -3)
        if cu_seqlens_k is not None:
            k, v = k.flatten(0, -3), v.flatten(0, -3)
        result = cross_attention(
            q,
            k,
            v,
            key_bias=None if key_bias is None else self._heads(key_bias),
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            attn_implementation=self.attn_implementation,
            output_attentions=output_attentions,
            key_groups=key_groups,
            num_key_groups=num_key_groups,
        )
        output, attentions = result if output_attentions else (result, None)
        output = self.out_proj(output.flatten(-2))
        if cu_seqlens_q is not None:
            output = output.view(query.shape)
        return (output, attentions) if output_attentions else output

    def queries(self, query: Tensor, query_bias: Tensor | None = None) -> Tensor:
        """``[..., C]`` projected to ``[..., H, C / H]``."""
        projected = self.q_proj(query)
        return self._heads(projected if query_bias is None else projected + query_bias)

    def keys(self, key_value: Tensor) -> Tensor:
        """``[..., Ckv]`` projected to ``[..., H, C / H]``."""
        return self._heads(self.k_proj(key_value))

    def query_bias(self, position: Tensor) -> Tensor:
        """What ``position`` ``[..., C]`` adds to projected queries. Linear: it may be interpolated afterwards."""
        return _linear_part(self.q_proj, position)

    def key_bias(self, position: Tensor) -> Tensor:
        """What ``position`` ``[..., Ckv]`` adds to projected keys."""
        return _linear_part(self.k_proj, position)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.hidden_size // self.num_heads))


def _linear_part(projection: nn.Module, x: Tensor) -> Tensor:
    """``projection(x)`` less its bias, whatever adapters the projection carries."""
    return projection(x) - projection(torch.zeros_like(x[:1]))
