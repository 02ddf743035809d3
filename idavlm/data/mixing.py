"""Identity and general data in one DataLoader: deterministic, the same sources on all ranks, resumable at any batch."""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from idavlm.data.packing import PackingCollator
from idavlm.data.schema import SOURCES
from idavlm.utils import check_choice

MODES = ("extra", "interleave", "joint")
IDENTITY, GENERAL = range(len(SOURCES))
_LARGEST_SEED = 2**62


class DualDataLoader(DataLoader):
    """A DataLoader over two DataLoaders: identity data and general data.

    The mode decides which batch a step reads:

    - ``"extra"``: an identity batch; after some identity batches, one additional general batch (as in IDA-VLM).
    - ``"interleave"``: either an identity batch or a general batch.
    - ``"joint"``: an identity batch and a general batch, collated together by ``identity_loader.collate_fn``.
      ``mixing_ratio`` has no effect.

    An epoch is one pass over the identity batches. All epochs have the same length: the number of general steps is
    ``round(mixing_ratio * identity batches)`` in mode "extra" and the share ``mixing_ratio`` of all steps in mode
    "interleave", at least one unless ``mixing_ratio`` is 0. Their positions are drawn again for every epoch. The
    general stream continues across epochs and is reshuffled when it is exhausted.

    The contents of a step are a pure function of (seed, epoch, step) and the lengths of the loaders. The global
    generator of torch is neither used nor changed. All ranks therefore read the same source at the same step, and a
    run can be resumed at any batch: by :meth:`load_state_dict`, or by ``accelerate.skip_first_batches`` (used by
    ``transformers.Trainer``) without any state. Skipped samples are not read.

    Every batch is a dict: the output of ``collate_fn`` plus ``source`` ("identity", "general" or "joint") and
    ``sample_source`` ``[B]`` int64 (0 identity, 1 general).

    Args:
        identity_loader: DataLoader that provides the dataset, the batches, their order and ``collate_fn``. Its
            samplers are seeded again for every pass. A loader prepared by accelerate is accepted, and batches are
            then moved to its device. In distributed training, prepare the two loaders, not the DualDataLoader.
        general_loader: DataLoader for general data. The worker settings are taken from the loader with more workers.
        mixing_ratio: amount of general data, in 0..1.
        mode: ``"extra"``, ``"interleave"`` or ``"joint"``.
        seed: seed of the sources, the orders and the workers.

    Raises:
        ValueError: an option is out of range, or a loader cannot be indexed by batch (an IterableDataset,
            ``batch_size=None``, or no batches).
    """

    def __init__(
        self,
        identity_loader: DataLoader,
        general_loader: DataLoader,
        *,
        mixing_ratio: float = 0.1,
        mode: str = "extra",
        seed: int = 0,
    ) -> None:
        streams = _Stream("identity", identity_loader, seed), _Stream("general", general_loader, seed)
        self.schedule = MixingSchedule(mode, mixing_ratio, seed, len(streams[IDENTITY]))
        self._streams = streams
        self._device = getattr(identity_loader, "device", None)
        self._step = self._resume_at = 0
        busier = max(identity_loader, general_loader, key=lambda loader: loader.num_workers)
        super().__init__(
            _TwoDatasets([stream.dataset for stream in streams]),
            batch_sampler=DualBatchSampler(self.schedule, streams),
            collate_fn=_Collate([stream.collate_fn for stream in streams]),
            generator=torch.Generator(),
            pin_memory=identity_loader.pin_memory or general_loader.pin_memory,
            num_workers=busier.num_workers,
            prefetch_factor=busier.prefetch_factor,
            persistent_workers=busier.persistent_workers,
            worker_init_fn=busier.worker_init_fn,
            multiprocessing_context=busier.multiprocessing_context,
            timeout=busier.timeout,
        )

    @property
    def epoch(self) -> int:
        """Epoch of the next batch."""
        return self.batch_sampler.epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration. A loaded step of the same epoch is kept."""
        if epoch != self.epoch:
            self._step = self._resume_at = 0
        self.batch_sampler.set_epoch(epoch)

    def sources(self, epoch: int | None = None) -> list[str]:
        """Source of every step of ``epoch`` (default: the current epoch)."""
        if self.schedule.mode == "joint":
            return ["joint"] * len(self)
        return [SOURCES[int(general)] for general in self.schedule.sources(self.epoch if epoch is None else epoch)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over the batches of the epoch: from the loaded step after :meth:`load_state_dict`, else from step 0.

        After the last batch, :attr:`epoch` is the next epoch.
        """
        epoch, start, self._resume_at = self.epoch, self._resume_at, 0
        self._step = start
        self.generator.manual_seed(derive_seed(self.schedule.seed, "workers", epoch))
        with self.batch_sampler.starting_at(start):
            batches = super().__iter__()
        return self._count(batches, epoch, start)

    def _count(self, batches: Iterator[dict[str, Any]], epoch: int, step: int) -> Iterator[dict[str, Any]]:
        """Count the batches that the consumer received. Workers may have loaded more."""
        for batch in batches:
            if self._device is not None:
                from accelerate.utils import send_to_device

                batch = send_to_device(batch, self._device)
            step += 1
            if step < len(self):
                self._step = step
            else:
                self.set_epoch(epoch + 1)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch that the consumer received. The state can be serialised as JSON."""
        return {**self._settings(), "epoch": self.epoch, "step": self._step, **self._positions(self.epoch, self._step)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the next iteration at the position of ``state``.

        Raises:
            ValueError: ``state`` is from a loader with another length, mode, mixing_ratio or seed.
        """
        for name, value in self._settings().items():
            if state.get(name) != value:
                raise ValueError(
                    f"the state has {name}={state.get(name)!r}, this loader has {value!r}; resume with the same data, "
                    "batch sizes, number of processes, mode, mixing_ratio and seed."
                )
        epoch, step = state["epoch"], state["step"]
        if not (epoch >= 0 and 0 <= step < len(self)):
            raise ValueError(
                f"the state has epoch={epoch}, step={step}; an epoch has steps 0..{len(self) - 1}; resume with the "
                "same data."
            )
        positions = self._positions(epoch, step)
        if any(state.get(name) != value for name, value in positions.items()):
            raise ValueError(
                f"the state was written by another version: at epoch {epoch}, step {step}, expected {positions}; start "
                "a new run."
            )
        self.batch_sampler.set_epoch(epoch)
        self._step = self._resume_at = step

    def _settings(self) -> dict[str, Any]:
        counts = {f"{stream.name}_batches": len(stream) for stream in self._streams}
        counts |= {f"{stream.name}_samples": len(stream.dataset) for stream in self._streams}
        schedule = self.schedule
        return {"seed": schedule.seed, "mode": schedule.mode, "mixing_ratio": schedule.mixing_ratio, **counts}

    def _positions(self, epoch: int, step: int) -> dict[str, dict[str, int]]:
        """For each stream, the pass and the batch within the pass that is read next."""
        positions = zip(self._streams, self.schedule.positions(epoch, step), strict=True)
        found = {stream.name: divmod(position, len(stream)) for stream, position in positions}
        return {name: {"pass": number, "batch": batch} for name, (number, batch) in found.items()}


def check_mixing_options(*, mixing_mode: str = "extra", mixing_ratio: float = 0.1) -> None:
    """Raise ``ValueError`` unless the options of a configuration are those of a :class:`DualDataLoader`."""
    check_choice("mixing_mode", mixing_mode, MODES)
    MixingSchedule(mixing_mode, mixing_ratio, seed=0, identity_batches=1)


@dataclass(frozen=True)
class MixingSchedule:
    """Source of every step of every epoch, as a pure function of (seed, epoch). See :class:`DualDataLoader`.

    Every epoch has the same number of general steps: ``mixing_ratio`` is met exactly, rounded to a whole number of
    steps and at least one. Only the positions of the general steps differ between epochs.
    """

    mode: str
    mixing_ratio: float
    seed: int
    identity_batches: int

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        ratio = self.mixing_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
            raise ValueError(f"mixing_ratio={ratio!r} must be in 0..1.")
        if self.mode == "interleave" and ratio == 1:
            raise ValueError("mixing_ratio=1 with mode='interleave' leaves no identity step; use a value below 1.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r} must be an integer.")

    @functools.cached_property
    def general_steps(self) -> int:
        """Number of general batches read in an epoch."""
        if self.mode == "joint":
            return self.identity_batches
        share = self.mixing_ratio if self.mode == "extra" else self.mixing_ratio / (1 - self.mixing_ratio)
        return max(1, math.floor(self.identity_batches * share + 0.5)) if share else 0

    def __len__(self) -> int:
        """Number of steps of an epoch."""
        return self.identity_batches + (0 if self.mode == "joint" else self.general_steps)

    def sources(self, epoch: int) -> np.ndarray:
        """``[len(self)]`` bool: whether each step of the epoch reads a general batch (in mode "joint", all do)."""
        if self.mode == "joint":
            return np.ones(len(self), bool)
        size = self.identity_batches if self.mode == "extra" else len(self)
        # Raw output of the counter-based generator. Unlike numpy's permutations, it is the same in all numpy versions.
        noise = np.random.Philox(key=derive_seed(self.seed, "source", epoch)).random_raw(size)
        chosen = np.zeros(size, bool)
        chosen[np.argsort(noise, kind="stable")[: self.general_steps]] = True
        if self.mode == "interleave":
            return chosen
        # Insert one general step after each chosen identity step.
        return np.repeat(np.tile([False, True], size), np.stack([np.ones(size, int), chosen], 1).ravel())

    def positions(self, epoch: int, step: int) -> tuple[int, int]:
        """Number of identity and of general batches read before ``step`` of ``epoch``, since the start of training."""
        general = int(self.sources(epoch)[:step].sum())
        identity = step if self.mode == "joint" else step - general
        return epoch * self.identity_batches + identity, epoch * self.general_steps + general


class _Stream:
    """The batches of a DataLoader as an endless sequence of lists of indices, pass after pass.

    The order of a pass is a pure function of (seed, name, pass). It comes from the loader's own samplers: their
    generators are seeded with (seed, name, pass), samplers with ``set_epoch`` (DistributedSampler, accelerate's) get
    the number of the pass, and torch's global generator is seeded temporarily for all others.
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
            raise ValueError(f"{argument} has no batch_sampler (batch_size=None); set batch_size.")
        if any(kind.__name__ == "DataLoaderDispatcher" for kind in type(loader).__mro__):
            raise ValueError(f"{argument} reads on the main process only; prepare it with dispatch_batches=False.")
        if getattr(loader, "skip_batches", 0):
            raise ValueError(
                f"{argument} skips its first batches in every pass; resume with DualDataLoader.load_state_dict instead."
            )
        if len(self.batch_sampler) == 0:
            raise ValueError(
                f"{argument} has no batches ({len(self.dataset)} samples); lower batch_size or set drop_last=False."
            )

    def __len__(self) -> int:
        """Number of batches of a pass."""
        return len(self.batch_sampler)

    def batches_from(self, position: int) -> Iterator[list[int]]:
        """Yield the indices of every batch from ``position`` (batches since the start of training) on, without end."""
        number, start = divmod(position, len(self))
        while True:
            yield from self._order(number)[start:]
            number, start = number + 1, 0

    def _order(self, number: int) -> list[list[int]]:
        """All batches of pass ``number``, computed at once so that later changes of the samplers have no effect."""
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
                    f"{self.name}_loader has {len(batches)} batches in pass {number} but its length is {len(self)}; "
                    "use a sampler of constant length."
                )
            self._cached = number, batches
        return self._cached[1]


class DualBatchSampler(Sampler):
    """Batch sampler of :class:`DualDataLoader`: a batch is a list of ``(source, index)``, 0 identity, 1 general."""

    def __init__(self, schedule: MixingSchedule, streams: tuple[_Stream, _Stream]) -> None:
        self.schedule = schedule
        self.streams = streams
        self.epoch = 0
        self._start = 0

    def __len__(self) -> int:
        return len(self.schedule)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"epoch={epoch!r} must be an integer >= 0.")
        self.epoch = epoch

    @contextmanager
    def starting_at(self, step: int) -> Iterator[None]:
        """Context in which iterators start at ``step``. A DataLoader with workers creates two iterators."""
        self._start = step
        try:
            yield
        finally:
            self._start = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # Not a generator: epoch and start are read now, not when the first batch is requested.
        return self._batches(self.epoch, self._start)

    def _batches(self, epoch: int, start: int) -> Iterator[list[tuple[int, int]]]:
        positions = self.schedule.positions(epoch, start)
        identity, general = (stream.batches_from(at) for stream, at in zip(self.streams, positions, strict=True))
        joint = self.schedule.mode == "joint"
        for is_general in self.schedule.sources(epoch)[start:]:
            keys = [] if is_general and not joint else [(IDENTITY, index) for index in next(identity)]
            yield keys + ([(GENERAL, index) for index in next(general)] if is_general else [])


class _TwoDatasets(Dataset):
    """Dataset with keys ``(source, index)``. Consecutive samples of one source are fetched together."""

    def __init__(self, datasets: list[Dataset]) -> None:
        self.datasets = datasets

    def __len__(self) -> int:
        return sum(map(len, self.datasets))

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[int, list[Any]]]:
        groups = []
        for source, group in groupby(keys, key=lambda key: key[0]):
            dataset, indices = self.datasets[source], [index for _, index in group]
            fetch = getattr(dataset, "__getitems__", None)
            groups.append((source, fetch(indices) if fetch else [dataset[index] for index in indices]))
        return groups


class _Collate:
    """Calls the ``collate_fn`` of the source and adds the source to the batch."""

    def __init__(self, collate_fns: list[Callable]) -> None:
        self.collate_fns = collate_fns

    def __call__(self, groups: list[tuple[int, list[Any]]]) -> dict[str, Any]:
        joint = len(groups) > 1
        samples = [sample for _, group in groups for sample in group]
        collate = self.collate_fns[IDENTITY if joint else groups[0][0]]
        batch = collate(samples)
        if not isinstance(batch, Mapping):
            raise ValueError(f"collate_fn returned {type(batch).__name__}; it must return a dict, like Collator.")
        counts = torch.tensor([len(group) for _, group in groups])
        sample_source = torch.tensor([source for source, _ in groups]).repeat_interleave(counts)
        if isinstance(collate, PackingCollator):
            sample_source = sample_source[collate.order(samples)]
        return {
            **batch,
            "source": "joint" if joint else SOURCES[groups[0][0]],
            "sample_source": sample_source,
        }


def _samplers(batch_sampler: Any) -> Iterator[Any]:
    """Yield a batch sampler and all samplers inside it; accelerate wraps samplers several times."""
    queue, visited = [batch_sampler], set()
    while queue:
        sampler = queue.pop()
        if sampler is not None and id(sampler) not in visited:
            visited.add(id(sampler))
            yield sampler
            queue += [getattr(sampler, "batch_sampler", None), getattr(sampler, "sampler", None)]


@contextmanager
def _global_generator(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside the context and restore its state afterwards."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def derive_seed(*parts: int | str) -> int:
    """Derive a seed in 0..2**62 - 1 from all ``parts``. The result is the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _LARGEST_SEED
