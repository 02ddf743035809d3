"""Bootstrap confidence intervals: the variation of a mean under resampling of the items."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` items with its 95 % confidence interval."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap_mean(values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean of ``values`` with the 2.5th and 97.5th percentile of the means of ``resamples`` draws with replacement.

    The result is deterministic for a given ``seed``.

    Raises:
        ValueError: ``values`` is empty.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("values is empty; pass at least one value.")
    low, high = np.percentile(resampled_means(values, resamples, seed), [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high), len(values))


def resampled_means(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Means ``[resamples]`` of draws of ``len(values)`` values with replacement."""
    return _resample_counts(len(values), resamples, seed) @ values / len(values)


@lru_cache(maxsize=8)
def _resample_counts(n: int, resamples: int, seed: int) -> np.ndarray:
    """``[resamples, n]``: how often each of ``n`` items is drawn in each resample."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
