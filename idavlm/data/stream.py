"""The batches of a DataLoader as an endless list of indices whose order is a pure function of (seed, name, pass)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from idavlm.data.mixing_schedule import derive_seed


class Stream:
    """What a DataLoader would read, pass after pass.

    Every pass takes a new order from the loader's own samplers: their generators are seeded with
    ``(seed, name, pass)``, those with ``set_epoch`` (DistributedSampler, accelerate's) are told the pass, and what
    others draw from torch's global generator comes from that seed too, without touching its state.

    Args:
        name: of the stream, for messages and seeds.
        loader: a DataLoader over a map-style dataset with automatic batching, plain or prepared by accelerate.
        seed: of the training run.

    Raises:
        ValueError: a loader whose batches cannot be named by index.
    """

    def __init__(self, name: str, loader: DataLoader, seed: int) -> None:
        self.name = name
        self.dataset = loader.dataset
        self.batch_sampler = loader.batch_sampler
        self.collate_fn = loader.collate_fn
        self._seed = seed
        self._cached: tuple[int, list[Any]] = (-1, [])
        argument = f"{name}_loader"
        if isinstance(self.dataset, IterableDataset):
            raise ValueError(
                f"{argument} reads an IterableDataset, which cannot be resumed by index; use RecordDataset."
            )
        if self.batch_sampler is None:
            raise ValueError(f"{argument} has no batch_sampler (batch_size=None); give it a batch_size.")
        if any(kind.__name__ == "DataLoaderDispatcher" for kind in type(loader).__mro__):
            raise ValueError(f"{argument} reads on one process only; prepare it with dispatch_batches=False.")
        if getattr(loader, "skip_batches", 0):
            raise ValueError(f"{argument} skips its first batches in every pass; resume with load_state_dict instead.")
        if len(self.batch_sampler) == 0:
            raise ValueError(
                f"{argument} has no batches ({len(self.dataset)} samples); lower batch_size or set drop_last=False."
            )

    def __len__(self) -> int:
        """Batches of a pass."""
        return len(self.batch_sampler)

    def batches_from(self, position: int) -> Iterator[list[int]]:
        """Indices of every batch from ``position`` (batches since the start of training) on, without end."""
        number, start = divmod(position, len(self))
        while True:
            yield from self._order(number)[start:]
            number, start = number + 1, 0

    def _order(self, number: int) -> list[list[int]]:
        """All batches of pass ``number``; listed at once, so that nothing can change the samplers meanwhile."""
        if self._cached[0] != number:
            seed = derive_seed(self._seed, self.name, number)
            for sampler in _samplers(self.batch_sampler):
                if isinstance(getattr(sampler, "generator", None), torch.Generator):
                    sampler.generator.manual_seed(seed)
                if hasattr(sampler, "initial_seed"):  # accelerate's SeedableRandomSampler adds the epoch to it
                    sampler.initial_seed = derive_seed(self._seed, self.name)
                if hasattr(sampler, "set_epoch"):
                    sampler.set_epoch(number)
            with _global_generator(seed):
                batches = list(self.batch_sampler)
            if len(batches) != len(self):
                raise ValueError(
                    f"{self.name}_loader gave {len(batches)} batches in pass {number} but its length is {len(self)}; "
                    "use a sampler of constant length."
                )
            self._cached = number, batches
        return self._cached[1]


def _samplers(batch_sampler: Any) -> Iterator[Any]:
    """A batch sampler and everything inside it; accelerate wraps them several times."""
    waiting, seen = [batch_sampler], set()
    while waiting:
        sampler = waiting.pop()
        if sampler is not None and id(sampler) not in seen:
            seen.add(id(sampler))
            yield sampler
            waiting += [getattr(sampler, "batch_sampler", None), getattr(sampler, "sampler", None)]


@contextmanager
def _global_generator(seed: int) -> Iterator[None]:
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
