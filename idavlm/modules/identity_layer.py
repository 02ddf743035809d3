"""One step of identity recognition: a scene's patches look at the references."""

import torch
from torch import Tensor, nn

from idavlm.modules.cross_attention import CrossAttention
from idavlm.modules.feed_forward import FeedForward
from idavlm.utils import check_choice

GATES = ("zero_init", "tanh", "none")


class IdentityLayer(nn.Module):
    """``patches + g * attention(patches + position, keys, keys)``, and a feed-forward block where asked for.

    ``gate`` says how far the layer is open at the start:

    - ``"zero_init"`` (released): ``g = 1``, the attention's output projection starts at zero;
    - ``"tanh"``: ``g = tanh(a)`` with a learned scalar ``a`` that starts at 0 (Flamingo);
    - ``"none"``: ``g = 1`` and ordinary initialisation: open from the first step.

    Args:
        hidden_size: C.
        num_heads: attention heads.
        gate: as above.
        feed_forward: add ``patches + g' * FeedForward(patches)`` behind the attention, gated the same way.
        intermediate_size: its inner width; ``4 * hidden_size`` if not given.
        attn_implementation: see :func:`idavlm.ops.cross_attention`.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        gate: str = "zero_init",
        feed_forward: bool = False,
        intermediate_size: int | None = None,
        attn_implementation: str = "sdpa",
    ):
        super().__init__()
        check_choice("gate", gate, GATES)
        self.attention = CrossAttention(
            hidden_size=hidden_size, num_heads=num_heads, attn_implementation=attn_implementation
        )
        self.feed_forward = (
            FeedForward(hidden_size, intermediate_size, zero_init=gate == "zero_init") if feed_forward else None
        )
        if gate == "zero_init":
            nn.init.zeros_(self.attention.out_proj.weight)
        self.attention_gate = nn.Parameter(torch.zeros(())) if gate == "tanh" else None
        self.feed_forward_gate = nn.Parameter(torch.zeros(())) if gate == "tanh" and feed_forward else None

    def forward(
        self, patches: Tensor, keys: Tensor, *, query_bias: Tensor, output_attentions: bool = False, **segments
    ) -> tuple[Tensor, Tensor | None]:
        """Let patches look at references.

        Args:
            patches: ``[S, P, C]`` patches of scenes, grouped into N samples by ``cu_seqlens_q``.
            keys: ``[T, C]`` packed reference tokens, grouped by ``cu_seqlens_k``.
            query_bias: ``[P, C]`` projected positions of the patches.
            output_attentions: also return the weights, summed over groups of keys: ``[S * P, H, G]``.
            segments: what :func:`idavlm.modules.image_groups.attention_segments` gives.

        Returns:
            ``[S, P, C]`` patches, and the weights or None.
        """
        result = self.attention(patches, keys, query_bias=query_bias, output_attentions=output_attentions, **segments)
        found, attentions = result if output_attentions else (result, None)
        patches = patches + _gated(found, self.attention_gate)
        if self.feed_forward is not None:
            patches = patches + _gated(self.feed_forward(patches), self.feed_forward_gate)
        return patches, attentions


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else gate.tanh() * x
