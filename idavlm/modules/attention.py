"""The two building blocks of the resampler and the ID-Former: multi-head cross-attention and the feed-forward block."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from idavlm.ops import cross_attention
from idavlm.ops.cross_attention import ATTN_IMPLEMENTATIONS
from idavlm.utils import check_choice, check_positive
from idavlm.utils.sharding import num_processes

IMAGES_PER_CHUNK = 8
"""Segments whose keys and values are in memory at one time on a CPU without gradients."""


class CrossAttention(nn.Module):
    """Multi-head cross-attention over N dense or ragged segments.

    Computes ``out_proj(softmax(q k^T / sqrt(head_dim)) v)`` with ``q = q_proj(query + query_position)``,
    ``k = k_proj(key_value) + key_bias`` and ``v = v_proj(key_value)``. The result equals ``nn.MultiheadAttention`` on
    ``(query + position, key_value + position, key_value)`` and needs less work and memory. Positions of keys, which are
    the same for all images, are projected once and enter as a bias (:meth:`key_bias`), because the values need the
    keys without positions. Queries that all segments share are projected once. The attention matrix is not kept for the
    backward pass. On a CPU without gradients, segments that share their queries are computed in chunks, which takes
    less memory and no more time.

    ``state_dict`` keys: ``q_proj``, ``out_proj`` of shape ``[C, C]`` and ``k_proj``, ``v_proj`` of shape ``[C, Ckv]``,
    each with ``.weight`` and ``.bias``. The projections are called as modules, so LoRA and quantised layers can replace
    them.

    Args:
        hidden_size: width C of the queries and the output.
        num_heads: number of attention heads; must divide ``hidden_size``.
        key_value_hidden_size: width Ckv of the keys and values. Defaults to ``hidden_size``.
        attn_implementation: backend, see :func:`idavlm.cross_attention`.

    Raises:
        ValueError: ``num_heads`` does not divide ``hidden_size``, or the backend is unknown.
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
                f"num_heads={num_heads} does not divide hidden_size={hidden_size}; choose a divisor of hidden_size."
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
        """Initialise the projections with Xavier-uniform weights and zero biases."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        key_value: Tensor,
        *,
        query_position: Tensor | None = None,
        key_bias: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        output_attentions: bool = False,
        **segments,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from queries to keys and values.

        Args:
            query: ``[N, Lq, C]``, or ``[Lq, C]`` if all segments share the queries. With ``cu_seqlens_q`` any shape
                ``[..., C]``; the leading dimensions form one packed sequence.
            key_value: ``[N, Lk, Ckv]``. With ``cu_seqlens_k`` any shape ``[..., Ckv]``.
            query_position: added to the queries before their projection; broadcastable to ``[..., C]``.
            key_bias: ``[L, C]``, added to the projected keys by position within their segment, modulo L.
            output_attentions: also return the attention weights ``[N, H, max_seqlen_q, max_seqlen_k]``.
            cu_seqlens_q, cu_seqlens_k, segments: ``max_seqlen_q``, ``max_seqlen_k``, ``key_groups`` and
                ``num_key_groups`` as well, see :func:`idavlm.cross_attention`.

        Returns:
            ``[N, Lq, C]``, or the shape of ``query`` with ``cu_seqlens_q``. With ``output_attentions`` a pair of the
            output and the weights.
        """
        key_bias = None if key_bias is None else self._split_heads(key_bias)
        segments |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "key_bias": key_bias}
        segments["output_attentions"] = output_attentions
        if query.dim() == 2 and len(segments) == 4 and not output_attentions and saves_memory(query):
            return self.out_proj(self._attend_in_chunks(self.queries(query, query_position), key_value, segments))
        # No name for the projected queries, so that they are freed before the output is projected.
        output, attentions = self._attend(self.queries(query, query_position), key_value, segments)
        output = self.out_proj(output)
        if cu_seqlens_q is not None:
            output = output.view(query.shape)
        return (output, attentions) if output_attentions else output

    def _attend_in_chunks(self, q: Tensor, key_value: Tensor, segments: dict) -> Tensor:
        return torch.cat([self._attend(q, chunk, segments)[0] for chunk in key_value.split(IMAGES_PER_CHUNK)])

    def _attend(self, q: Tensor, key_value: Tensor, segments: dict) -> tuple[Tensor, Tensor | None]:
        k, v = self.keys(key_value), self._split_heads(self.v_proj(key_value))
        if segments["cu_seqlens_q"] is not None:
            q = q.flatten(0, -3)
        if segments["cu_seqlens_k"] is not None:
            k, v = k.flatten(0, -3), v.flatten(0, -3)
        result = cross_attention(q, k, v, attn_implementation=self.attn_implementation, **segments)
        output, attentions = result if segments["output_attentions"] else (result, None)
        return rearrange(output, "... h d -> ... (h d)"), attentions

    def queries(self, query: Tensor, position: Tensor | None = None) -> Tensor:
        """Project queries ``[..., C]``, to which positions are added first, to ``[..., H, C / H]``."""
        return self._split_heads(self.q_proj(query if position is None else query + position))

    def keys(self, key_value: Tensor) -> Tensor:
        """Project keys ``[..., Ckv]`` to ``[..., H, C / H]``."""
        return self._split_heads(self.k_proj(key_value))

    def key_bias(self, position: Tensor) -> Tensor:
        """Return the term that positions ``[L, Ckv]`` add to projected keys. It is linear, so it can be resized.

        That is ``k_proj(position)`` without its bias, which is what the projection of zeros returns, for any adapter
        that wraps the projection. The zeros are a row of the same product: a product of one row reads all weights, and
        its backward pass writes a gradient of all weights.
        """
        projected = self.k_proj(torch.cat([position, torch.zeros_like(position[:1])]))
        return projected[:-1] - projected[-1:]

    def _split_heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "... (h d) -> ... h d", h=self.num_heads)


class FeedForward(nn.Module):
    """Pre-norm feed-forward block ``down_proj(gelu(up_proj(norm(x))))``; the caller adds the residual.

    The figure of the IDA-VLM paper shows it after a cross-attention. The released code does not have it.

    Args:
        hidden_size: width C.
        intermediate_size: inner width. Defaults to ``4 * hidden_size``.
        zero_init: initialise ``down_proj`` with zeros, so that a block added to trained weights changes nothing at
            first.
    """

    def __init__(self, hidden_size: int, intermediate_size: int | None = None, *, zero_init: bool = True):
        super().__init__()
        check_positive(hidden_size=hidden_size, intermediate_size=intermediate_size)
        intermediate_size = intermediate_size or 4 * hidden_size
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)
        if zero_init:
            nn.init.zeros_(self.down_proj.weight)
            nn.init.zeros_(self.down_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., C]`` to ``[..., C]``."""
        return self.down_proj(F.gelu(self.up_proj(self.norm(x))))


def saves_memory(x: Tensor) -> bool:
    """Whether to compute in chunks: on a CPU without gradients, in one process.

    Elsewhere the number of calls of a module must not depend on the batch, because ZeRO-3 gathers weights at each call.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return num_processes() == 1
