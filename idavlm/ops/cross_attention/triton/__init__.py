"""Fused cross-attention in Triton, see ``docs/kernels.md``. Importing a module of this package imports triton."""

import triton

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
    raise ImportError(
        f"attn_implementation='triton' needs triton 3.6 or later, but {triton.__version__} is installed; run pip "
        "install -U triton, or use attn_implementation='sdpa'."
    )
