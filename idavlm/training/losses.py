"""The loss of a global batch, independent of how the batch is split into micro-batches and over processes.

The loss of a source is the mean cross-entropy over its labelled tokens in the global batch: in all micro-batches of an
optimizer step on all processes. The losses of the identity attention are means over the supervised scenes of the global
batch. A micro-batch contributes its own mean times its share of the tokens or scenes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from idavlm.data.schema import SOURCES
from idavlm.models.supervision import count_supervised_scenes
from idavlm.utils import IGNORE_INDEX

_NAMES = ("loss_identity", "loss_general", "identity_map_loss", "auxiliary_loss")


@dataclass(frozen=True)
class LossCounts:
    """What the losses of a batch are means over.

    Attributes:
        tokens: number of labelled tokens of each source.
        scenes: number of supervised scenes.
    """

    tokens: Mapping[str, float]
    scenes: float

    def share_of_tokens(self, source: str, batch: "LossCounts") -> float:
        """Share of ``batch`` in the labelled tokens of a source."""
        return batch.tokens[source] / self.tokens[source] if self.tokens[source] else 0.0

    def share_of_scenes(self, batch: "LossCounts") -> float:
        """Share of ``batch`` in the supervised scenes."""
        return batch.scenes / self.scenes if self.scenes else 0.0


def count_losses(batches: Sequence[Mapping[str, Any]]) -> list[LossCounts]:
    """Count the labelled tokens of each source, and the supervised scenes, of every batch.

    A batch without ``labels`` (of a model that makes its own targets) counts as one token of its source.
    """
    if not batches:
        return []
    tokens = torch.stack([_labelled_tokens(batch) for batch in batches]).tolist()  # waits for the device once
    return [
        LossCounts(dict(zip(SOURCES, row, strict=True)), count_supervised_scenes(batch))
        for row, batch in zip(tokens, batches, strict=True)
    ]


def sum_counts(counts: Sequence[LossCounts], accelerator: Accelerator) -> LossCounts:
    """The counts of the global batch: the sum over micro-batches and processes."""
    values = [[*count.tokens.values(), count.scenes] for count in counts]
    total = torch.tensor(values, dtype=torch.int64).reshape(-1, len(SOURCES) + 1).sum(0)
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total.to(accelerator.device), reduction="sum")
    *tokens, scenes = total.tolist()
    return LossCounts(dict(zip(SOURCES, tokens, strict=True)), scenes)


def row_sources(batch: Mapping[str, Any], num_rows: int, device: torch.device | None = None) -> Tensor:
    """``[B]`` index of the source of each sample. A batch without a source has identity samples."""
    if batch.get("sample_source") is not None:
        return batch["sample_source"].to(device)
    sources = batch.get("source") or "identity"
    if isinstance(sources, str):
        if sources not in SOURCES:
            raise ValueError(
                f"the batch has source={sources!r} but no field sample_source, as DualDataLoader makes it."
            )
        sources = [sources] * num_rows
    return torch.tensor([SOURCES.index(source) for source in sources], device=device)


def token_sources(batch: Mapping[str, Any], labels: Tensor) -> Tensor:
    """Index of the source of each token: ``[B, 1]``, or ``[R, L]`` for packed rows, which may have both sources."""
    token_sample = batch.get("token_sample_index")
    if token_sample is None:
        return row_sources(batch, len(labels), labels.device)[:, None]
    token_sample = token_sample.to(labels.device).clamp(min=0)  # padding has no labels
    return row_sources(batch, int(token_sample.max()) + 1, labels.device)[token_sample]


def _labelled_tokens(batch: Mapping[str, Any]) -> Tensor:
    """``[sources]`` number of tokens that enter the loss."""
    labels = batch.get("labels")
    if labels is None:
        return F.one_hot(row_sources(batch, 1)[0].cpu(), len(SOURCES))
    sources = token_sources(batch, labels)
    if labels.dim() > 1:  # the first token of a row has no prediction
        labels, sources = labels[:, 1:].flatten(1), sources if sources.shape[1] == 1 else sources[:, 1:]
    is_labelled = (labels != IGNORE_INDEX).reshape(len(labels), -1).long()
    counts = torch.zeros(len(SOURCES), dtype=torch.int64, device=labels.device)
    return counts.index_add_(0, sources.expand_as(is_labelled).flatten(), is_labelled.flatten())


def language_loss_by_source(logits: Tensor, labels: Tensor, token_source: Tensor) -> dict[str, Tensor]:
    """Mean next-token cross-entropy of each source in a batch that mixes them.

    Args:
        logits: ``[B, T, vocabulary]``.
        labels: ``[B, T]``, -100 at tokens that have no loss.
        token_source: ``[B, T]`` or ``[B, 1]``, 0 for tokens of identity samples and 1 for tokens of general samples.

    Returns:
        The loss of each source that the batch has samples of; 0 if they have no labels.
    """
    targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].to(logits.device)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2)
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
    is_labelled = targets != IGNORE_INDEX
    losses = {}
    for index, source in enumerate(SOURCES):
        of_source = (token_source == index).expand_as(loss)
        if of_source.any():
            losses[source] = loss[of_source].sum() / is_labelled[of_source].sum().clamp(min=1)
    return losses


@dataclass
class LossAverages:
    """Weighted means of the logged losses. All processes hold the same names, so that they can be reduced together."""

    sums: dict[str, Tensor | float] = field(default_factory=lambda: dict.fromkeys(_NAMES, 0.0))
    weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_NAMES, 0.0))

    def add(self, entries: Iterable[tuple[str, Tensor, float]]) -> None:
        """Add means with their weights. Values stay on their device."""
        for name, value, weight in entries:
            if weight:
                self.sums[name] = (
                    self.sums[name] + value.detach().to(torch.promote_types(value.dtype, torch.float32)) * weight
                )
                self.weights[name] += weight

    def compute(self, accelerator: Accelerator) -> dict[str, float]:
        """The mean of every loss that any process has added."""
        device = accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        sums = [torch.as_tensor(value, dtype=dtype, device=device) for value in self.sums.values()]
        weights = [torch.tensor(value, dtype=dtype, device=device) for value in self.weights.values()]
        totals = accelerator.reduce(torch.stack(sums + weights), reduction="sum").tolist()
        pairs = zip(_NAMES, totals[: len(_NAMES)], totals[len(_NAMES) :], strict=True)
        return {name: total / weight for name, total, weight in pairs if weight}


def without_repeated(batch: Mapping[str, Any], accelerator: Accelerator) -> Mapping[str, Any]:
    """Remove labels and boxes of the samples that fill up the last batch of a distributed evaluation.

    accelerate repeats the first samples so that all processes read batches of one size.
    """
    state, labels = accelerator.gradient_state, batch.get("labels")
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0 or labels is None:
        return batch
    first = accelerator.process_index * len(labels)
    is_repeated = torch.arange(first, first + len(labels), device=labels.device) >= state.remainder
    rows = is_repeated.view(-1, *[1] * (labels.dim() - 1))
    batch = dict(batch) | {"labels": labels.masked_fill(rows, IGNORE_INDEX)}
    if batch.get("boxes") is not None:
        kept = ~is_repeated[batch["sample_index"][batch["box_image"]]]
        batch |= {name: batch[name][kept] for name in ("boxes", "box_image", "box_identity")}
    return batch
