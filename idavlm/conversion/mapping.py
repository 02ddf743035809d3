"""From names of a checkpoint to names of :class:`idavlm.IDAVLMForConditionalGeneration`, one tensor at a time."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Transform = Callable[[Tensor], Tensor]

ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class Rule:
    r"""What becomes of the tensors whose whole name matches ``pattern``.

    Attributes:
        pattern: regular expression.
        targets: new name (``\1`` is a group of the pattern) to what is done with the tensor, None for nothing. Empty:
            the tensor is left out on purpose.
    """

    pattern: str
    targets: dict[str, Transform | None]


class KeyMap:
    """Rules in order; the first that matches a name decides."""

    def __init__(self, rules: Iterable[Rule]):
        self._rules = [(re.compile(rule.pattern), rule.targets) for rule in rules]

    def __call__(self, name: str) -> dict[str, Transform | None] | None:
        """New names of the tensor ``name``; None if no rule knows it."""
        for pattern, targets in self._rules:
            match = pattern.fullmatch(name)
            if match is not None:
                return {match.expand(target): transform for target, transform in targets.items()}
        return None


def part(index: int, count: int) -> Transform:
    """Block ``index`` of ``count`` equal blocks of rows."""
    return lambda tensor: tensor.chunk(count)[index]


def part_of_heads(index: int, num_heads: int) -> Transform:
    """Of rows ``[q_h, k_h, v_h]`` for each head in turn, all q (0), k (1) or v (2)."""

    def transform(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (num_heads, 3, -1))[:, index].flatten(0, 1)

    return transform


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous()


def with_rows(count: int) -> Transform:
    """As many rows as ``count``: new ones are the mean of those there are, as transformers' resizing makes them.

    In a head such a row's logit is the mean of all logits, so that greedy decoding never chooses it.
    """

    def transform(tensor: Tensor) -> Tensor:
        lacking = count - len(tensor)
        if lacking <= 0:
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
