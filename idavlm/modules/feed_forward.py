"""The feed-forward block that the IDA-VLM paper draws behind a cross-attention."""

import torch.nn.functional as F
from torch import Tensor, nn

from idavlm.utils import check_positive


class FeedForward(nn.Module):
    """Pre-norm ``down_proj(gelu(up_proj(norm(x))))``; the caller adds the residual.

    Args:
        hidden_size: C.
        intermediate_size: inner width; ``4 * hidden_size`` if not given.
        zero_init: start ``down_proj`` at zero, so that a block added to trained weights changes nothing at first.
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
        """``[..., C] -> [..., C]``."""
        return self.down_proj(F.gelu(self.up_proj(self.norm(x))))
