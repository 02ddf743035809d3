"""Identity and general data in one loader: deterministic, equal on every rank, resumable at any batch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from idavlm.data.mixing_schedule import GENERAL, IDENTITY, MixingSchedule, derive_seed
from idavlm.data.schema import SOURCES
from idavlm.data.stream import Stream


class DualDataLoader(DataLoader):
    """One DataLoader that reads two: identity records and general records.

    - ``"extra"``: after an identity batch, with probability ``mixing_ratio``, one more general batch (IDA-VLM's).
    - ``"interleave"``: each batch is general with probability ``mixing_ratio``, otherwise identity.
    - ``"joint"``: each batch holds a batch of both, collated together by ``identity_loader.collate_fn``;
      ``mixing_ratio`` plays no part.

    An epoch is one pass over the identity batches. All epochs have the same length: of their steps
    ``round(mixing_ratio * identity batches)`` are general ("interleave": ``mixing_ratio`` of all steps), at least one
    unless ``mixing_ratio`` is 0; which ones is drawn anew for every epoch. The general stream goes on from epoch to
    epoch and is reshuffled when it is exhausted.

    What a step reads is a pure function of (seed, epoch, step) and of the length of the loaders. Nothing else enters,
    not even torch's global generator, which is left alone: so all ranks read the same source at the same step, and a
    run is resumed at any batch by :meth:`load_state_dict`, or by ``accelerate.skip_first_batches`` (as
    ``transformers.Trainer`` does) without any state; skipped data is not read.

    Every batch is a dict with ``source`` ("identity", "general" or "joint") and ``sample_source`` ``[B]`` int64
    (0 identity, 1 general) beside what ``collate_fn`` made.

    Args:
        identity_loader: gives dataset, batches, order (its samplers are seeded anew for every pass) and
            ``collate_fn``. Plain, or prepared by accelerate; then batches come on its device. Do not prepare the
            DualDataLoader itself when there are several processes.
        general_loader: the same. The workers are those of the loader that has more of them.
        mixing_ratio: in 0..1.
        mode: see above.
        seed: of sources, orders and workers.

    Raises:
        ValueError: options out of range, or loaders whose batches cannot be named by index (an IterableDataset,
            ``batch_size=None``, no batches at all).
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
        streams = Stream("identity", identity_loader, seed), Stream("general", general_loader, seed)
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
        """The epoch the next batch belongs to."""
        return self.batch_sampler.epoch

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``; where a state was loaded and that is its epoch, stay at the loaded step."""
        if epoch != self.epoch:
            self._step = self._resume_at = 0
        self.batch_sampler.set_epoch(epoch)

    def sources(self, epoch: int | None = None) -> list[str]:
        """The source of every step of an epoch (None: the current one)."""
        if self.schedule.mode == "joint":
            return ["joint"] * len(self)
        return [SOURCES[int(general)] for general in self.schedule.sources(self.epoch if epoch is None else epoch)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The batches of the epoch, from the loaded step on after :meth:`load_state_dict`, otherwise from its start.

        When the last batch has been given out, the loader stands at the next epoch.
        """
        epoch, start, self._resume_at = self.epoch, self._resume_at, 0
        self._step = start
        self.generator.manual_seed(derive_seed(self.schedule.seed, "workers", epoch))
        with self.batch_sampler.starting_at(start):
            batches = super().__iter__()
        return self._count(batches, epoch, start)

    def _count(self, batches: Iterator[dict[str, Any]], epoch: int, step: int) -> Iterator[dict[str, Any]]:
        """Keep count of what the consumer was given; workers are ahead of it."""
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
        """Where the loader stands: behind the last batch it gave out. JSON-serialisable."""
        return {**self._settings(), "epoch": self.epoch, "step": self._step, **self._positions(self.epoch, self._step)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on behind the batch after which ``state`` was taken.

        Raises:
            ValueError: the state comes from a loader of other lengths, mode, mixing_ratio or seed.
        """
        for name, value in self._settings().items():
            if state.get(name) != value:
                raise ValueError(
                    f"the state has {name}={state.get(name)!r}, this loader {value!r}; resume with the same data, "
                    "batch sizes, number of processes, mode, mixing_ratio and seed."
                )
        epoch, step = state["epoch"], state["step"]
        if not (epoch >= 0 and 0 <= step < len(self)):
            raise ValueError(f"the state has epoch={epoch}, step={step}; an epoch has {len(self)} steps, from 0.")
        positions = self._positions(epoch, step)
        if any(state.get(name) != value for name, value in positions.items()):
            raise ValueError(
                f"the state is not one of this version: at epoch {epoch}, step {step} it should have {positions}."
            )
        self.batch_sampler.set_epoch(epoch)
        self._step = self._resume_at = step

    def _settings(self) -> dict[str, Any]:
        counts = {f"{stream.name}_batches": len(stream) for stream in self._streams}
        counts |= {f"{stream.name}_samples": len(stream.dataset) for stream in self._streams}
        schedule = self.schedule
        return {"seed": schedule.seed, "mode": schedule.mode, "mixing_ratio": schedule.mixing_ratio, **counts}

    def _positions(self, epoch: int, step: int) -> dict[str, dict[str, int]]:
        """Pass and batch of the pass each stream reads next."""
        positions = zip(self._streams, self.schedule.positions(epoch, step), strict=True)
        found = {stream.name: divmod(position, len(stream)) for stream, position in positions}
        return {name: {"pass": number, "batch": batch} for name, (number, batch) in found.items()}


class DualBatchSampler(Sampler):
    """The batches of an epoch, each a list of keys ``(source, index)`` (0 identity, 1 general)."""

    def __init__(self, schedule: MixingSchedule, streams: tuple[Stream, Stream]) -> None:
        self.schedule = schedule
        self.streams = streams
        self.epoch = 0
        self._start = 0

    def __len__(self) -> int:
        return len(self.schedule)

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next iteration."""
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"epoch={epoch!r} must be an integer >= 0.")
        self.epoch = epoch

    @contextmanager
    def starting_at(self, step: int) -> Iterator[None]:
        """Let iterations made within begin at ``step``; DataLoader makes two when it has workers."""
        self._start = step
        try:
            yield
        finally:
            self._start = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # Not a generator itself: epoch and start are taken now, not when a worker asks for the first batch.
        return self._batches(self.epoch, self._start)

    def _batches(self, epoch: int, start: int) -> Iterator[list[tuple[int, int]]]:
        positions = self.schedule.positions(epoch, start)
        identity, general = (stream.batches_from(at) for stream, at in zip(self.streams, positions, strict=True))
        joint = self.schedule.mode == "joint"
        for is_general in self.schedule.sources(epoch)[start:]:
            keys = [] if is_general and not joint else [(IDENTITY, index) for index in next(identity)]
            yield keys + ([(GENERAL, index) for index in next(general)] if is_general else [])


class _TwoDatasets(Dataset):
    """Samples by key ``(source, index)``; groups of one source are fetched together."""

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
    """Collates a batch the way its source does and says in the batch which source that is."""

    def __init__(self, collate_fns: list[Callable]) -> None:
        self.collate_fns = collate_fns

    def __call__(self, groups: list[tuple[int, list[Any]]]) -> dict[str, Any]:
        joint = len(groups) > 1
        samples = [sample for _, group in groups for sample in group]
        batch = self.collate_fns[IDENTITY if joint else groups[0][0]](samples)
        if not isinstance(batch, Mapping):
            raise ValueError(f"collate_fn returned {type(batch).__name__}; it must return a dict, as Collator does.")
        counts = torch.tensor([len(group) for _, group in groups])
        return {
            **batch,
            "source": "joint" if joint else SOURCES[groups[0][0]],
            "sample_source": torch.tensor([source for source, _ in groups]).repeat_interleave(counts),
        }
