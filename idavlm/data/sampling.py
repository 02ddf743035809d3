"""Sampling order: curricula over tasks, and batches of samples with similar lengths."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from torch.utils.data import ConcatDataset, Dataset, Sampler, Subset

from idavlm.data.dataset import RecordDataset
from idavlm.data.mixing import derive_seed
from idavlm.data.schema import Sample
from idavlm.utils import check_positive

ALL_TASKS = "*"
"""Key of :attr:`CurriculumStage.weights` for all samples, whatever their task."""


@dataclass(frozen=True)
class CurriculumStage:
    """A stage of a curriculum.

    Attributes:
        steps: number of training steps.
        weights: relative frequency of each task. For every draw, a key is chosen with its weight, then a sample of
            this task with equal probability. The key ``"*"`` stands for all samples.
        condition: only samples for which this function returns True are drawn; None for all.
    """

    steps: int
    weights: Mapping[str, float]
    condition: Callable[[Sample], bool] | None = None

    def __post_init__(self) -> None:
        check_positive(steps=self.steps)
        weights = self.weights.values()
        if not all(weight >= 0 for weight in weights) or not sum(weights) > 0:
            raise ValueError(
                f"weights={dict(self.weights)!r} must have at least one positive weight and no negative weight."
            )


class CurriculumSampler(Sampler[int]):
    """Indices of samples, drawn with replacement in the stages of a curriculum.

    The order is computed once and depends only on the arguments. Every iteration returns the same order. For example,
    150 steps on location samples only, then 700 steps with 30 % location samples and 70 % samples of any task::

        stages = [CurriculumStage(150, {"location": 1.0}), CurriculumStage(700, {"location": 0.3, "*": 0.7})]
        sampler = CurriculumSampler(dataset, stages, batch_size=16, lengths=lengths)
        loader = DataLoader(dataset, batch_size=16, sampler=sampler, collate_fn=processor.collate)

    ``transformers.Trainer`` creates its sampler itself. Pass it the indices as a subset that is read sequentially; a
    resumed run then continues with exactly the same batches::

        args = IDTrainingArguments(..., max_steps=850, train_sampling_strategy="sequential")
        trainer = IDTrainer(..., args=args, train_dataset=Subset(dataset, sampler.indices))

    Args:
        samples: the samples, or the :class:`RecordDataset` that contains them (with or without ``encode``).
        stages: stages in their order.
        batch_size: samples per training step, over all processes and accumulation steps.
        seed: seed of the draws.
        lengths: length of every sample, in any unit; if given, the order is rearranged by :func:`group_by_length`. A
            sample then moves by less than ``window`` batches, also across the boundary of two stages.
        window: see :func:`group_by_length`.

    Attributes:
        indices: the order, ``batch_size`` x (steps of all stages) indices of ``samples``.

    Raises:
        ValueError: no sample has a task of ``weights`` and meets ``condition``, or an argument is out of range.
    """

    def __init__(
        self,
        samples: Sequence[Sample] | RecordDataset,
        stages: Sequence[CurriculumStage],
        *,
        batch_size: int,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        window: int = 8,
    ) -> None:
        check_positive(batch_size=batch_size, window=window)
        if not stages:
            raise ValueError("stages is empty; pass at least one CurriculumStage.")
        if isinstance(samples, RecordDataset):
            samples = [samples.sample(index) for index in range(len(samples))]
        if lengths is not None and len(lengths) != len(samples):
            raise ValueError(f"lengths has {len(lengths)} entries for {len(samples)} samples; pass one per sample.")
        rng = Random(seed)
        indices = [index for stage in stages for index in _draw(samples, stage, batch_size, rng)]
        self.indices = indices if lengths is None else _group(indices, lengths, batch_size, window, rng)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


class LengthGroupedSampler(Sampler[int]):
    """A random order in which each batch has samples of similar length; another one in each epoch.

    The order is a pure function of (seed, epoch), so a resumed run reads the batches that it would have read otherwise.
    :class:`idavlm.IDTrainer` uses it with ``train_sampling_strategy="group_by_length"``.

    Args:
        lengths: length of every sample, see :func:`token_counts`.
        batch_size: samples per batch.
        seed: seed of the order.
        window: number of batches that are sorted together. It is smaller in small data sets, so that batches differ
            between epochs.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int = 0, window: int = 50) -> None:
        check_positive(batch_size=batch_size, window=window)
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.window = max(1, min(window, len(self.lengths) // (4 * batch_size)))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = Random(derive_seed(self.seed, "length", self.epoch))
        indices = list(range(len(self.lengths)))
        rng.shuffle(indices)
        return iter(_group(indices, self.lengths, self.batch_size, self.window, rng))


def token_counts(dataset: Dataset | Sequence, length_column: str = "length") -> list[int]:
    """The number of tokens of each sample, without reading its images.

    Args:
        dataset: a :class:`RecordDataset` whose ``encode`` is a method of a processor, a ``Subset`` or ``ConcatDataset``
            of these, a ``datasets.Dataset`` with a column of lengths, or a list of encoded samples.
        length_column: the column of lengths.

    Raises:
        ValueError: the lengths cannot be known in advance.
    """
    if isinstance(dataset, RecordDataset):
        return dataset.token_counts()
    if isinstance(dataset, Subset):
        counts = token_counts(dataset.dataset, length_column)
        return [counts[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        return [count for part in dataset.datasets for count in token_counts(part, length_column)]
    if length_column in getattr(dataset, "column_names", ()):
        return list(dataset[length_column])
    if isinstance(dataset, (list, tuple)):
        return [len(sample["input_ids"]) for sample in dataset]
    raise ValueError(
        f"the lengths of the samples of {type(dataset).__name__} are not known; use a RecordDataset, a "
        f"datasets.Dataset with a column {length_column!r}, or another train_sampling_strategy than 'group_by_length'."
    )


def group_by_length(
    indices: Sequence[int], lengths: Sequence[int], batch_size: int, *, window: int = 8, seed: int = 0
) -> list[int]:
    """Rearrange an order of samples so that each batch contains samples of similar length, which reduces padding.

    Every ``window`` batches are sorted by length and cut into batches, and these batches are shuffled. A sample moves
    by less than ``window`` batches, so the stages of a curriculum are preserved up to that distance.

    Args:
        indices: indices of samples, in the order in which they are to be read. Repetitions are allowed.
        lengths: length of every sample, by index. Any unit is possible: the number of images works as well as tokens.
        batch_size: samples per batch.
        window: number of batches that are sorted together.
        seed: seed for shuffling the batches.

    Returns:
        The rearranged indices. If the last batch is incomplete, it remains the last.
    """
    check_positive(batch_size=batch_size, window=window)
    return _group(indices, lengths, batch_size, window, Random(seed))


def _draw(samples: Sequence[Sample], stage: CurriculumStage, batch_size: int, rng: Random) -> list[int]:
    candidates: dict[str | None, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        if stage.condition is None or stage.condition(sample):
            candidates[sample.task].append(index)
            candidates[ALL_TASKS].append(index)
    tasks = list(stage.weights)
    for task in tasks:
        if not candidates[task]:
            condition = "" if stage.condition is None else " that meets the condition of the stage"
            raise ValueError(
                f"weights={dict(stage.weights)!r} names {task!r}, but no sample has this task{condition}; training "
                'records name their task in "type".'
            )
    weights = list(stage.weights.values())
    return [rng.choice(candidates[rng.choices(tasks, weights)[0]]) for _ in range(stage.steps * batch_size)]


def _group(indices: Sequence[int], lengths: Sequence[int], batch_size: int, window: int, rng: Random) -> list[int]:
    grouped: list[int] = []
    for start in range(0, len(indices), window * batch_size):
        by_length = sorted(indices[start : start + window * batch_size], key=lambda index: lengths[index])
        batches = [by_length[first : first + batch_size] for first in range(0, len(by_length), batch_size)]
        incomplete = batches.pop() if len(batches[-1]) < batch_size else []
        rng.shuffle(batches)
        grouped += [index for batch in [*batches, incomplete] for index in batch]
    return grouped
