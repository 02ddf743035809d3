"""Fused cross-attention in Triton, see ``docs/kernels.md``. Importing a module of this folder imports triton."""
