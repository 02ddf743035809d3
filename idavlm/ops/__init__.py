"""Functions without parameters. Each fast implementation has a readable reference beside it."""

from idavlm.ops.cross_attention import cross_attention

__all__ = ["cross_attention"]
