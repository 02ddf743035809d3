"""Map the tensors of a checkpoint to those of :class:`idavlm.IDAVLMForConditionalGeneration`: names and values."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Transform = Callable[[Tensor], Tensor]

ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class Rule:
    r"""Conversion of the tensors whose full name matches ``pattern``.

    Attributes:
        pattern: regular expression.
        targets: new name (``\1`` refers to a group of the pattern) -> transform of the tensor, or None to keep it. If
            empty, the tensor is dropped.
    """

    pattern: str
    targets: dict[str, Transform | None]


class KeyMap:
    """Applies the first matching rule to a name."""

    def __init__(self, rules: Iterable[Rule]):
        self._rules = [(re.compile(rule.pattern), rule.targets) for rule in rules]

    def __call__(self, name: str) -> dict[str, Transform | None] | None:
        """New names of the tensor ``name`` with their transforms; None if no rule matches."""
        for pattern, targets in self._rules:
            match = pattern.fullmatch(name)
            if match is not None:
                return {match.expand(target): transform for target, transform in targets.items()}
        return None


def row_block(index: int, count: int) -> Transform:
    """Select block ``index`` of ``count`` equal blocks of rows."""
    return lambda tensor: tensor.chunk(count)[index]


def head_rows(index: int, num_heads: int) -> Transform:
    """Select all q (0), k (1) or v (2) rows of a fused projection whose rows are ``[q_h, k_h, v_h]`` per head."""

    def transform(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (num_heads, 3, -1))[:, index].flatten(0, 1)

    return transform


def transposed(tensor: Tensor) -> Tensor:
    """Transpose the last two dimensions."""
    return tensor.mT.contiguous()


def resize_rows(count: int) -> Transform:
    """Grow to ``count`` rows. New rows are the mean of the existing ones, as in ``resize_token_embeddings``.

    In an output head, the logit of such a row is the mean of all logits, so greedy decoding never selects it.
    """

    def transform(tensor: Tensor) -> Tensor:
        missing = count - len(tensor)
        if missing <= 0:
            return tensor
        grown = tensor.new_empty(count, *tensor.shape[1:])
        if not tensor.is_meta:
            total = torch.zeros(tensor.shape[1:], dtype=torch.float64)
            for start in range(0, len(tensor), ROWS_AT_A_TIME):
                rows = tensor[start : start + ROWS_AT_A_TIME]
                grown[start : start + len(rows)] = rows
                total += rows.float().sum(0)
            grown[len(tensor) :] = (total / len(tensor)).to(tensor.dtype)
        return grown

    return transform
