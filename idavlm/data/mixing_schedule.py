"""Which stream every step reads, as a pure function of (seed, epoch, step); no state, no global random numbers."""

import functools
import hashlib
import math
from dataclasses import dataclass

import numpy as np

from idavlm.data.schema import SOURCES
from idavlm.utils import check_choice

MODES = ("extra", "interleave", "joint")
IDENTITY, GENERAL = range(len(SOURCES))
_LARGEST_SEED = 2**62


def derive_seed(*parts: int | str) -> int:
    """A seed in 0..2**62 - 1 that depends on all ``parts``, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _LARGEST_SEED


@dataclass(frozen=True)
class MixingSchedule:
    """What every step of every epoch reads; see :class:`DualDataLoader` for the modes.

    An epoch is one pass over the ``identity_batches``, and every epoch has as many general steps as any other, so that
    all have the same length: ``mixing_ratio`` is met exactly (to a whole number of steps, at least one), only where
    the general steps stand is drawn anew for each epoch.
    """

    mode: str
    mixing_ratio: float
    seed: int
    identity_batches: int

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        ratio = self.mixing_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
            raise ValueError(f"mixing_ratio={ratio!r} must lie in 0..1.")
        if self.mode == "interleave" and ratio == 1:
            raise ValueError("mixing_ratio=1 with mode='interleave' leaves no identity step; take less than 1.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r} must be an integer.")

    @functools.cached_property
    def general_steps(self) -> int:
        """General batches read in an epoch."""
        if self.mode == "joint":
            return self.identity_batches
        share = self.mixing_ratio if self.mode == "extra" else self.mixing_ratio / (1 - self.mixing_ratio)
        return max(1, math.floor(self.identity_batches * share + 0.5)) if share else 0

    def __len__(self) -> int:
        """Steps of an epoch."""
        return self.identity_batches + (0 if self.mode == "joint" else self.general_steps)

    def sources(self, epoch: int) -> np.ndarray:
        """``[len(self)]`` bool: whether each step of the epoch reads a general batch (alone, or in "joint" as well)."""
        if self.mode == "joint":
            return np.ones(len(self), bool)
        places = self.identity_batches if self.mode == "extra" else len(self)
        # Raw numbers of the counter-based generator: unlike numpy's permutations they never change between versions.
        drawn = np.random.Philox(key=derive_seed(self.seed, "source", epoch)).random_raw(places)
        chosen = np.zeros(places, bool)
        chosen[np.argsort(drawn, kind="stable")[: self.general_steps]] = True
        if self.mode == "interleave":
            return chosen
        # After each chosen identity step, one more.
        return np.repeat(np.tile([False, True], places), np.stack([np.ones(places, int), chosen], 1).ravel())

    def positions(self, epoch: int, step: int) -> tuple[int, int]:
        """Identity and general batches read before ``step`` of ``epoch``, counted from the start of training."""
        general = int(self.sources(epoch)[:step].sum())
        identity = step if self.mode == "joint" else step - general
        return epoch * self.identity_batches + identity, epoch * self.general_steps + general
