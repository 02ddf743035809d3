"""DualDataLoader: the source of every step and the order of samples."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
)

from idavlm.data import DualDataLoader
from idavlm.data.mixing import MixingSchedule, derive_seed


class Numbers(Dataset):
    """Sample ``i`` is ``first + i``. Records the indices that were read in this process."""

    def __init__(self, size: int, first: int = 0):
        self.size, self.first, self.read = size, first, []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.read.append(index)
        return self.first + index


def collate(samples):
    return {"x": torch.tensor(samples)}


def loaders(identity=22, general=9, *, batch_size=2, workers=0, **options):
    def build(size, first):
        settings = {"shuffle": True, "collate_fn": collate, "num_workers": workers, **options}
        return DataLoader(Numbers(size, first), batch_size, **settings)

    return build(identity, 0), build(general, 1000)


def dual(*args, mode="extra", mixing_ratio=0.3, seed=5, **options):
    return DualDataLoader(*loaders(*args, **options), mode=mode, mixing_ratio=mixing_ratio, seed=seed)


def listed(batches):
    return [(batch["source"], batch["x"].tolist(), batch["sample_source"].tolist()) for batch in batches]


MODES = pytest.mark.parametrize("mode", ["extra", "interleave", "joint"])


# Sources -------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(["extra", "interleave", "joint"]),
    ratio=st.floats(0, 0.95),
    batches=st.integers(1, 60),
    seed=st.integers(-5, 2**70),
    epoch=st.integers(0, 9),
)
def test_every_epoch_has_the_same_length_and_one_identity_pass(mode, ratio, batches, seed, epoch):
    schedule = MixingSchedule(mode, ratio, seed, batches)
    sources = schedule.sources(epoch)
    assert len(sources) == len(schedule)
    assert sources.sum() == schedule.general_steps
    assert schedule.positions(epoch, len(schedule)) == schedule.positions(epoch + 1, 0)
    assert schedule.positions(epoch, 0) == (epoch * batches, epoch * schedule.general_steps)
    if mode == "extra":
        assert not sources[0], "a general batch comes after an identity batch"
        assert not (sources[1:] & sources[:-1]).any(), "one extra batch at most"
        assert abs(schedule.general_steps - ratio * batches) <= (0.5 if schedule.general_steps > 1 else 1)
    if mode == "interleave":
        assert abs(schedule.general_steps - ratio * len(schedule)) <= 1


def test_the_sources_never_change_between_versions():
    """A change of these values would break the resumption of every existing checkpoint."""
    found = "".join("IG"[int(x)] for x in MixingSchedule("interleave", 0.3, 7, 14).sources(2))
    assert derive_seed(3, "source", 1) == 1790970515442904271
    assert found == "GGGIIIIIIGIIIIIIGGII"


def test_the_share_of_general_steps_and_their_places():
    schedule = MixingSchedule("extra", 0.1, 0, 1000)
    epochs = [schedule.sources(epoch) for epoch in range(50)]
    assert len(schedule) == 1100
    assert len({epoch.tobytes() for epoch in epochs}) == 50, "drawn again for every epoch"
    follows = torch.stack([torch.from_numpy(epoch[:500]).float() for epoch in epochs]).mean(0)
    assert follows.mean().item() == pytest.approx(100 / 1100, abs=0.02)
    assert MixingSchedule("extra", 0.01, 0, 5).general_steps == 1, "at least one"
    assert MixingSchedule("extra", 0.0, 0, 5).general_steps == 0
    assert MixingSchedule("extra", 1, 0, 3).sources(0).tolist() == [False, True] * 3


def test_sources_and_orders_do_not_depend_on_global_randomness():
    torch.manual_seed(1)
    first = listed(dual())
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert listed(dual()) == first
    assert torch.equal(torch.get_rng_state(), before), "the global state is not changed"
    assert listed(dual(seed=6)) != first


def test_workers_neither_change_the_batches_nor_the_global_generator():
    torch.manual_seed(2)
    before = torch.get_rng_state()
    with_workers = dual(workers=2)
    assert listed(with_workers) == listed(dual())
    assert torch.equal(torch.get_rng_state(), before)


# Samples ----------------------------------------------------------------------------------------------------------


@MODES
def test_an_epoch_reads_every_identity_sample_once(mode):
    loader = dual(mode=mode)
    for _ in range(3):
        batches = list(loader)
        assert len(batches) == len(loader)
        identity = [x for batch in batches for x in batch["x"].tolist() if x < 1000]
        assert sorted(identity) == list(range(22))
        for batch in batches:
            assert batch["sample_source"].dtype == torch.int64
            assert batch["sample_source"].tolist() == [int(x >= 1000) for x in batch["x"].tolist()]
            assert batch["source"] == (
                "joint" if mode == "joint" else ["identity", "general"][batch["sample_source"][0]]
            )
    assert loader.epoch == 3


def test_lengths():
    assert len(dual(mode="extra")) == 11 + 3
    assert len(dual(mode="interleave")) == 11 + 5
    assert len(dual(mode="joint")) == 11


def test_every_pass_of_each_stream_is_reshuffled():
    loader = dual(mode="joint")
    passes = [[x for batch in loader for x in batch["x"].tolist() if x < 1000] for _ in range(4)]
    assert len({tuple(order) for order in passes}) == 4
    loader = dual(mode="joint")
    general = [x for _ in range(4) for batch in loader for x in batch["x"].tolist() if x >= 1000]
    passes = [general[i : i + 9] for i in range(0, 36, 9)]
    assert all(sorted(order) == list(range(1000, 1009)) for order in passes), "each pass complete"
    assert len({tuple(order) for order in passes}) == 4


def test_the_general_stream_continues_across_epochs():
    loader = dual(general=40, mode="extra")
    seen = [x for _ in range(6) for batch in loader for x in batch["x"].tolist() if x >= 1000]
    assert len(seen) == 36
    assert len(set(seen)) == 36, "18 of 20 batches, none read twice"


def test_unshuffled_loaders_stay_in_order():
    batches = list(dual(mode="joint", shuffle=False))
    assert [x for batch in batches for x in batch["x"].tolist() if x < 1000] == list(range(22))


def test_the_same_loader_twice():
    loader, _ = loaders()
    batches = list(DualDataLoader(loader, loader, mode="joint"))
    assert sorted(x for batch in batches for x in batch["x"][:2].tolist()) == list(range(22))


@pytest.mark.parametrize(
    "sampler",
    [
        lambda data: RandomSampler(data, replacement=True, num_samples=12),
        lambda data: RandomSampler(data, generator=torch.Generator()),
        lambda data: WeightedRandomSampler([1.0] * len(data), 12),
        lambda data: DistributedSampler(data, num_replicas=2, rank=1),
    ],
)
def test_any_sampler_that_draws_from_torch_is_pure(sampler):
    def build():
        data = Numbers(22)
        identity = DataLoader(data, 2, sampler=sampler(data), collate_fn=collate)
        return DualDataLoader(identity, loaders()[1], mode="joint", seed=3)

    loader = build()
    first, second = listed(loader), listed(loader)
    assert first != second
    torch.rand(3)
    other = build()
    other.set_epoch(1)
    assert listed(other) == second


def test_datasets_that_fetch_several_at_once():
    class Fetching(Numbers):
        def __getitems__(self, indices):
            self.read.append(tuple(indices))
            return [self.first + index for index in indices]

    data = Fetching(6)
    identity = DataLoader(data, 3, collate_fn=collate)
    list(DualDataLoader(identity, loaders()[1], mixing_ratio=0.0))
    assert data.read == [(0, 1, 2), (3, 4, 5)]


# Errors --------------------------------------------------------------------------------------------------------------


class Endless(IterableDataset):
    def __iter__(self):
        yield 1


class Changing:
    """A batch sampler with a different length in every pass."""

    def __init__(self):
        self.calls = 0

    def __len__(self):
        return 2

    def __iter__(self):
        self.calls += 1
        return iter([[0]] * (1 + self.calls))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixing_ratio": 1.5}, r"mixing_ratio=1.5 must be in 0..1"),
        ({"mixing_ratio": float("nan")}, r"mixing_ratio=nan must be in 0..1"),
        ({"mixing_ratio": 1.0, "mode": "interleave"}, "leaves no identity step"),
        ({"mode": "both"}, "mode='both' is not known; choose one of 'extra'"),
        ({"seed": 0.5}, "seed=0.5 must be an integer"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        dual(**options)


def test_wrong_loaders_are_named():
    identity, general = loaders()
    with pytest.raises(ValueError, match="general_loader reads an IterableDataset"):
        DualDataLoader(identity, DataLoader(Endless()))
    with pytest.raises(ValueError, match="identity_loader has no batch_sampler"):
        DualDataLoader(DataLoader(Numbers(3), batch_size=None), general)
    with pytest.raises(ValueError, match=r"identity_loader has no batches \(3 samples\); lower batch_size"):
        DualDataLoader(DataLoader(Numbers(3), batch_size=4, drop_last=True), general)
    with pytest.raises(ValueError, match="collate_fn returned list; it must return a dict"):
        list(DualDataLoader(DataLoader(Numbers(3), collate_fn=lambda samples: samples), general))
    changing = DualDataLoader(DataLoader(Numbers(3), batch_sampler=Changing(), collate_fn=collate), general)
    list(changing)
    with pytest.raises(ValueError, match="has 3 batches in pass 1 but its length is 2"):
        list(changing)
    with pytest.raises(ValueError, match="epoch=-1 must be"):
        dual().set_epoch(-1)
