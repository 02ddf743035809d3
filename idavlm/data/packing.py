"""Packing: several samples in one row of a batch, one after the other, so that little or no padding is computed."""

import heapq
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from idavlm.utils import IGNORE_INDEX, check_positive

_PADDING = {"labels": IGNORE_INDEX, "token_identity_index": -1}
"""Values at the end of a row that is shorter than the longest; 0 for all other fields but ``input_ids``."""


class PackingCollator:
    """Collates samples as another collator does, then packs them into as few rows as possible.

    The samples of the batch stay the same, so losses and gradients are those of the batch without packing. Only the
    rows change: the fields of tokens are ``[R, L]``, with R rows of L tokens, in place of ``[B, T]``. The fields of
    images and boxes, and ``sample_index``, still count samples. The samples are numbered in the order of the rows.

    ``attention_mask`` is replaced by two fields:

    - ``position_ids`` ``[R, L]``: position of each token within its sample. It starts again at 0 with each sample, by
      which language models of transformers recognise packed rows.
    - ``token_sample_index`` ``[R, L]``: sample of each token, -1 at padding.

    The first token of a sample has no label, because the token before it belongs to another sample.

    Args:
        collate: function from encoded samples to a batch, such as ``collate`` of a processor.
        pad_token_id: token at the end of rows that are shorter than the longest.
        max_length: largest number of tokens of a row. With None, all samples of a batch are in one row, without any
            padding; flash attention needs that. Attention that is computed with a mask takes memory and time for each
            pair of tokens of a row, so rows should be short for it.

    Raises:
        ValueError: on a batch with a sample that is longer than ``max_length``, or that has no tokens. The message
            names the sample.
    """

    def __init__(
        self, collate: Callable[[list], dict[str, Any]], *, pad_token_id: int, max_length: int | None = None
    ) -> None:
        check_positive(max_length=max_length)
        if isinstance(pad_token_id, bool) or not isinstance(pad_token_id, int) or pad_token_id < 0:
            raise ValueError(f"pad_token_id={pad_token_id!r} must be an integer >= 0; set the tokenizer's pad_token.")
        self.collate = collate
        self.pad_token_id = pad_token_id
        self.max_length = max_length

    def order(self, samples: Sequence[dict[str, Any]]) -> list[int]:
        """The order in which the samples are in the batch."""
        return [number for row in self._rows(samples) for number in row]

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate and pack encoded samples."""
        rows = self._rows(samples)
        samples_per_row = [len(row) for row in rows]
        samples = [samples[number] for row in rows for number in row]
        batch = dict(self.collate(samples))
        if "attention_mask" not in batch:
            raise ValueError("the collator to pack returned no attention_mask, which tells padding from tokens.")
        is_token = batch.pop("attention_mask").bool()
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        if is_token.sum(1).tolist() != lengths.tolist():
            raise ValueError(
                f"the samples have {lengths.tolist()} tokens, but the collator to pack returned rows of "
                f"{is_token.sum(1).tolist()}; it must keep each sample in a row of its own."
            )
        length_of_row = torch.stack([part.sum() for part in lengths.split(samples_per_row)])
        columns = torch.arange(int(length_of_row.max()))
        is_filled = columns < length_of_row[:, None]

        def in_rows(tokens: Tensor, padding: int) -> Tensor:
            packed = torch.full(is_filled.shape, padding, dtype=tokens.dtype)
            packed[is_filled] = tokens
            return packed

        for name, value in batch.items():
            if all(_is_per_token(sample, name) for sample in samples):
                padding = self.pad_token_id if name == "input_ids" else _PADDING.get(name, 0)
                batch[name] = in_rows(value[is_token], padding)
        positions = in_rows(torch.cat([torch.arange(length) for length in lengths.tolist()]), 0)
        batch["position_ids"] = torch.where(is_filled, positions, columns - length_of_row[:, None])
        batch["token_sample_index"] = in_rows(torch.arange(len(samples)).repeat_interleave(lengths), -1)
        if "labels" in batch:
            batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] == 0, IGNORE_INDEX)
        return batch

    def _rows(self, samples: Sequence[dict[str, Any]]) -> list[list[int]]:
        if not samples:
            raise ValueError("samples is empty; pass at least one encoded sample.")
        lengths = [len(sample["input_ids"]) for sample in samples]
        for number, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            name = f"sample {sample['id']!r}" if "id" in sample else f"samples[{number}]"
            if length == 0:
                raise ValueError(f"{name} has no tokens; remove it.")
            if self.max_length is not None and length > self.max_length:
                raise ValueError(
                    f"{name} has {length} tokens, more than max_length={self.max_length}, the length of a packed row; "
                    "raise max_length, or build the processor with this max_length and read the records with "
                    "on_error='skip'."
                )
        return assign_rows(lengths, self.max_length)


def _is_per_token(sample: dict[str, Any], name: str) -> bool:
    value = sample.get(name)
    return isinstance(value, Tensor) and tuple(value.shape) == (len(sample["input_ids"]),)


def assign_rows(lengths: Sequence[int], max_length: int | None = None) -> list[list[int]]:
    """Distribute samples over as few rows as possible, of nearly equal lengths.

    Args:
        lengths: number of tokens of each sample, at most ``max_length``.
        max_length: largest number of tokens of a row; None for a single row.

    Returns:
        The samples of each row, in order; the rows by their first sample.
    """
    if max_length is None:
        return [list(range(len(lengths)))]
    longest_first = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    rows: list[list[int]] = []
    free: list[int] = []
    for number in longest_first:  # first fit: few rows
        place = next((row for row, left in enumerate(free) if left >= lengths[number]), len(rows))
        if place == len(rows):
            rows.append([])
            free.append(max_length)
        rows[place].append(number)
        free[place] -= lengths[number]
    balanced: list[list[int]] = [[] for _ in rows]
    heap = [(0, row) for row in range(len(rows))]
    for number in longest_first:  # into the shortest row: rows of nearly equal lengths
        used, row = heapq.heappop(heap)
        balanced[row].append(number)
        heapq.heappush(heap, (used + lengths[number], row))
    chosen = balanced if max(heap)[0] <= max_length else rows
    return sorted(sorted(row) for row in chosen)


def tokens_of_samples(token_sample_index: Tensor) -> Tensor:
    """Where the tokens of each sample are in packed rows.

    Args:
        token_sample_index: ``[R, L]`` sample of each token, -1 at padding.

    Returns:
        ``[B, T]`` index of each token among the R * L tokens of all rows; -1 where a sample is shorter than T.

    Raises:
        ValueError: the samples are not numbered 0, 1, ... in the order of the rows, or one is split.
    """
    samples = token_sample_index.flatten()
    tokens = (samples >= 0).nonzero().flatten()
    samples = samples[tokens]
    counts = torch.bincount(samples)
    ends = counts.cumsum(0)
    first, last = tokens[(ends - counts).clamp(max=len(tokens) - 1)], tokens[ends - 1]
    row_length = token_sample_index.shape[1]
    is_whole = (counts > 0) & (last - first + 1 == counts) & (last // row_length == first // row_length)
    if not (is_whole.all() and (samples.diff() >= 0).all()):
        raise ValueError(
            "token_sample_index does not number the samples 0, 1, ... in the order of the rows, each in one piece; "
            "pass the batch of PackingCollator unchanged."
        )
    is_token = torch.arange(int(counts.max()), device=samples.device) < counts[:, None]
    found = torch.full(is_token.shape, -1, device=samples.device)
    found[is_token] = tokens
    return found


def unpack(values: Tensor, tokens: Tensor, padding: int | bool) -> Tensor:
    """Values ``[B, T, ...]`` of samples from values ``[R, L, ...]`` of packed rows.

    Args:
        values: the values of packed rows.
        tokens: ``[B, T]`` of :func:`tokens_of_samples`.
        padding: value where a sample is shorter than T.
    """
    unpacked = values.flatten(0, 1)[tokens.clamp(min=0)]
    is_padding = (tokens < 0).view(*tokens.shape, *[1] * (values.dim() - 2))
    return unpacked.masked_fill(is_padding, padding)
