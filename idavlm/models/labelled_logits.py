"""Logits where there is a label and nowhere else: most of a prompt is images, and a vocabulary is large."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from idavlm.utils import IGNORE_INDEX


def next_tokens(labels: Tensor) -> Tensor:
    """``[B, T]`` what each position is to predict, -100 where nothing."""
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].contiguous()


def targets_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Of ``targets`` ``[B, T]`` those that ``logits`` are for: all, or the labelled ones."""
    everywhere = logits.shape[:2] == targets.shape
    return (targets if everywhere else targets[targets != IGNORE_INDEX]).to(logits.device)


@contextmanager
def head_reads_only(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """Within it, ``head`` reads hidden states ``[B, T, C]`` at ``positions`` ``[B, T]`` alone, as ``[1, N, C]``.

    What a language model does to its logits behind the head (scaling, capping) stays in place.
    """
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][positions.to(inputs[0].device)][None],))
    try:
        yield
    finally:
        hook.remove()
