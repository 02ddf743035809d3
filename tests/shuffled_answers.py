"""Right answers in random order: what a benchmark gives a model that answers without looking."""

import math
from collections import Counter
from random import Random
from statistics import fmean, stdev


def check_shuffled(score, items: list, texts: list[str], chance: dict[str, float], *, rounds: int = 150) -> None:
    """Check that right answers in random order score ``chance``, within four standard errors over the shuffles.

    Args:
        score: ``score(items, texts)``, a result.
        items: the items.
        texts: the right answers, in the order of the items.
        chance: metric -> expected value.
        rounds: number of shuffles.
    """
    rng, values = Random(0), {metric: [] for metric in chance}
    for _ in range(rounds):
        rows = score(items, rng.sample(texts, len(texts))).summary.values()
        found = {metric: value for row in rows for metric, value in row["metrics"].items()}
        for metric in chance:
            values[metric].append(found[metric])
    for metric, expected in chance.items():
        error = stdev(values[metric]) / math.sqrt(rounds)
        assert 0 < error < 0.05, (metric, "the shuffles tell nothing")
        assert abs(fmean(values[metric]) - expected) < 4 * error, (metric, fmean(values[metric]), expected)


def chance_of_labels(labels: list[str]) -> float:
    """Expected accuracy of labels in random order: the sum of squared shares."""
    return sum(count**2 for count in Counter(labels).values()) / len(labels) ** 2


def chance_of_sets(right: list[set], written: list[set]) -> float:
    """Expected share of each right set that a random one of the written sets holds."""
    return fmean(len(first & second) / len(first) for first in right for second in written)
