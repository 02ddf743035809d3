"""Multiple choice: which tasks have candidates, in which order, and which one a model prefers."""

import math
from collections.abc import Sequence

from idavlm.data.errors import quote
from idavlm.data.schema import Sample

CHOICE_TASKS = ("qa_single", "qa_multi")
"""Tasks whose answer is chosen among the right answer and the false ones; the others are generated freely."""


def candidates(sample: Sample) -> list[str]:
    """Possible answers; the right one is last. Ties are resolved in favour of the first, so a tie counts as wrong."""
    return [*sample.false_answers, sample.answer]


def most_likely(sample: Sample, likelihoods: Sequence[float]) -> str:
    """The candidate with the highest likelihood; the first one in case of a tie.

    Raises:
        ValueError: the number of likelihoods is not that of the candidates, or one of them is NaN or infinite.
    """
    texts = candidates(sample)
    if len(texts) != len(likelihoods):
        raise ValueError(
            f"the answer to {quote(sample.id)} has {len(likelihoods)} likelihoods for {len(texts)} candidates; pass "
            "the samples that the answers were generated for."
        )
    if not all(map(math.isfinite, likelihoods)):
        raise ValueError(
            f"the answer to {quote(sample.id)} has likelihoods {list(likelihoods)}, which cannot be compared; all must "
            "be finite. Check the weights of the model that computed them."
        )
    return texts[likelihoods.index(max(likelihoods))]
