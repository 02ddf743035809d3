"""Ragged cross-attention: one file per backend, and ``interface.py`` with the public function that selects one."""

from idavlm.ops.cross_attention.interface import ATTN_IMPLEMENTATIONS, cross_attention

__all__ = ["ATTN_IMPLEMENTATIONS", "cross_attention"]
