"""The order in which samples are read: batches of like length waste less time on padding."""

from collections.abc import Sequence
from random import Random

from idavlm.utils.checks import check_positive


def batches_of_like_length(
    order: Sequence[int], lengths: Sequence[int], batch_size: int, rng: Random, *, window: int = 8
) -> list[int]:
    """Rearrange ``order`` so that the samples of each batch are of like length.

    Every ``window`` batches are sorted by length, cut into batches, and the batches shuffled: no sample moves further
    than that, so a curriculum stays one. Train on ``torch.utils.data.Subset(dataset, order)`` with
    ``train_sampling_strategy="sequential"``. (``"group_by_length"`` of transformers encodes all samples beforehand,
    and reads the batches of every fifty from long to short.)

    Args:
        order: numbers of samples, in the order they are to be read.
        lengths: by number of the sample, in any unit: the number of its images is as good as its tokens.
        batch_size: samples a batch.
        rng: shuffles the batches.
        window: batches that are sorted together.

    Returns:
        The same numbers. A last batch that is not full stays last.
    """
    check_positive(batch_size=batch_size, window=window)
    arranged: list[int] = []
    for start in range(0, len(order), window * batch_size):
        some = sorted(order[start : start + window * batch_size], key=lambda number: lengths[number])
        batches = [some[first : first + batch_size] for first in range(0, len(some), batch_size)]
        rest = batches.pop() if len(batches[-1]) < batch_size else []
        rng.shuffle(batches)
        arranged += [number for batch in [*batches, rest] for number in batch]
    return arranged
