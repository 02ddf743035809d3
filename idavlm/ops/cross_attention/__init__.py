"""Ragged cross-attention. One file an implementation; ``interface.py`` checks, dispatches and names them."""

from idavlm.ops.cross_attention.interface import ATTN_IMPLEMENTATIONS, cross_attention

__all__ = ["ATTN_IMPLEMENTATIONS", "cross_attention"]
