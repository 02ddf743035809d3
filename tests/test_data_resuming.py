"""DualDataLoader: resumption at any batch, several ranks, accelerate and transformers.Trainer."""

import json
from collections import Counter

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, prepare_data_loader
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import Trainer, TrainerCallback, TrainingArguments

from idavlm.data import DualDataLoader
from tests.test_data_mixing import MODES, dual, listed, loaders


@MODES
@pytest.mark.parametrize(("workers", "kills"), [(0, range(0, 36, 3)), (2, [5, 17])])
def test_resumed_anywhere_the_remaining_batches_are_the_same(mode, workers, kills):
    """Three epochs. The state of the interrupted run is serialised as JSON and loaded into a new loader."""
    whole = dual(mode=mode)
    expected = [batch for _ in range(3) for batch in listed(whole)]
    for kill in kills:
        kill = min(kill, len(expected) - 1)
        killed, done = dual(mode=mode, workers=workers), []
        state = json.dumps(killed.state_dict())
        while len(done) < kill:
            for batch in killed:
                done += listed([batch])
                state = json.dumps(killed.state_dict())
                if len(done) == kill:
                    break
        torch.manual_seed(kill)
        resumed = dual(mode=mode, workers=workers)
        resumed.load_state_dict(json.loads(state))
        assert resumed.state_dict() == json.loads(state)
        while len(done) < len(expected):
            done += listed(resumed)
        assert done == expected


def test_persistent_workers_resume_too():
    expected = dual()
    expected = [batch for _ in range(2) for batch in listed(expected)]
    loader = dual(workers=1, persistent_workers=True)
    done = [*listed(loader), *listed([next(iter(loader))])]
    loader.load_state_dict(loader.state_dict())
    assert done + listed(loader) == expected


def test_resuming_reads_no_skipped_sample():
    first = dual()
    iterator = iter(first)
    for _ in range(9):
        next(iterator)
    resumed = dual()
    resumed.load_state_dict(first.state_dict())
    rest = list(resumed)
    read = sum(len(data.read) for data in resumed.dataset.datasets)
    assert len(rest) == len(first) - 9
    assert read == sum(len(batch["x"]) for batch in rest)


def test_the_state_contains_pass_and_batch_of_each_stream():
    loader = dual(mode="joint")
    list(loader)
    iterator = iter(loader)
    next(iterator), next(iterator)
    state = loader.state_dict()
    assert (state["epoch"], state["step"]) == (1, 2)
    assert state["identity"] == {"pass": 1, "batch": 2}
    assert state["general"] == {"pass": 2, "batch": 3}, "13 batches, five per pass"


def test_an_abandoned_epoch_starts_again():
    loader = dual()
    first = listed(loader)
    loader.set_epoch(0)
    next(iter(loader))
    assert listed(loader) == first


def test_set_epoch_keeps_a_loaded_step_of_that_epoch():
    """transformers.Trainer calls set_epoch before every epoch."""
    source = dual()
    list(source)
    iterator = iter(source)
    next(iterator)
    state = source.state_dict()
    rest = listed(iterator)
    loader = dual()
    loader.load_state_dict(state)
    loader.set_epoch(1)
    assert listed(loader) == rest
    loader.load_state_dict(state)
    loader.set_epoch(2)
    assert len(list(loader)) == len(loader)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 6}, "seed"),
        ({"mode": "joint"}, "mode"),
        ({"mixing_ratio": 0.4}, "mixing_ratio"),
        ({"identity": 30}, "identity_batches"),
        ({"general": 30}, "general_batches"),
        ({"identity": 21}, "identity_samples"),
        ({"batch_size": 3}, "identity_batches"),
    ],
)
def test_a_state_of_another_loader_is_refused(change, name):
    with pytest.raises(ValueError, match=rf"the state has {name}=.*, this loader has"):
        dual(**change).load_state_dict(dual().state_dict())


def test_an_inconsistent_state_is_refused():
    state = dual().state_dict()
    with pytest.raises(ValueError, match=r"step=99; an epoch has steps 0\.\.13"):
        dual().load_state_dict({**state, "step": 99})
    with pytest.raises(ValueError, match="written by another version"):
        dual().load_state_dict({**state, "step": 4})
    with pytest.raises(ValueError, match="the state has seed=None"):
        dual().load_state_dict({})


# With accelerate and the Trainer -------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("skipped", [1, 6])
def test_skip_first_batches_as_the_trainer_does(mode, skipped):
    expected = dual(mode=mode)
    expected.set_epoch(2)
    expected = listed(expected)[skipped:]
    loader = dual(mode=mode)
    rest = skip_first_batches(loader, skipped)
    rest.batch_sampler.batch_sampler.set_epoch(2)
    assert listed(rest) == expected
    assert sum(len(data.read) for data in loader.dataset.datasets) == sum(len(x) for _, x, _ in expected)


def prepared(rank, world, *, seedable):
    return [
        prepare_data_loader(
            loader,
            num_processes=world,
            process_index=rank,
            put_on_device=True,
            device=torch.device("cpu"),
            rng_types=["generator"],
            use_seedable_sampler=seedable,
        )
        for loader in loaders(identity=23)
    ]


@pytest.fixture
def _single_process():
    Accelerator(cpu=True)
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.mark.usefixtures("_single_process")
@MODES
@pytest.mark.parametrize("seedable", [False, True])
def test_ranks_read_the_same_source_and_their_own_samples(mode, seedable):
    ranks = []
    for rank in range(2):
        torch.manual_seed(7 + rank)
        identity, general = prepared(rank, 2, seedable=seedable)
        assert isinstance(identity, DataLoaderShard)
        assert isinstance(identity.batch_sampler, BatchSamplerShard)
        loader = DualDataLoader(identity, general, mode=mode, mixing_ratio=0.3, seed=5)
        ranks.append([listed(loader) for _ in range(3)])
    for epochs in zip(*ranks, strict=True):
        first, second = epochs
        assert len(first) == len(second)
        assert [x[0] for x in first] == [x[0] for x in second]
        seen = Counter(x for batches in epochs for _, xs, _ in batches for x in xs if x < 1000)
        assert set(seen) == set(range(23)), "both ranks together read all samples (the last batches are padded)"
    assert ranks[0][0] != ranks[0][1], "reshuffled"


@pytest.mark.usefixtures("_single_process")
@pytest.mark.parametrize("seedable", [False, True])
def test_prepared_loaders_resume(seedable):
    torch.manual_seed(1)
    loader = DualDataLoader(*prepared(0, 1, seedable=seedable), mixing_ratio=0.3)
    iterator = iter(loader)
    next(iterator), next(iterator)
    state = loader.state_dict()
    rest = [*listed(iterator), *listed(loader)]
    torch.manual_seed(2)
    resumed = DualDataLoader(*prepared(0, 1, seedable=seedable), mixing_ratio=0.3)
    resumed.load_state_dict(state)
    assert [*listed(resumed), *listed(resumed)] == rest


class Recorder(torch.nn.Module):
    """A model with one weight that records its inputs."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, x, source, sample_source):
        self.seen.append((source, x.tolist(), sample_source.tolist()))
        return {"loss": ((self.weight - x.float().mean() / 1000) ** 2).sum()}


@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (1, 2)])
def test_the_trainer_resumes_without_a_hook(tmp_path, workers, accumulation):
    """Three epochs of 14 batches, interrupted within an epoch and at its end."""

    class OurTrainer(Trainer):
        def get_train_dataloader(self):
            return dual(workers=workers)

    class Stop(TrainerCallback):
        def __init__(self, at):
            self.at = at

        def on_step_end(self, args, state, control, **_):
            control.should_training_stop |= state.global_step == self.at

    def train(folder, stop=None, **options):
        settings = TrainingArguments(
            tmp_path / folder,
            num_train_epochs=3,
            gradient_accumulation_steps=accumulation,
            save_steps=1,
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        )
        trainer = OurTrainer(Recorder(), settings, train_dataset=[0], callbacks=[Stop(stop)])
        trainer.train(**options)
        return trainer.model

    whole = train("whole")
    assert len(whole.seen) == 42
    for stop in (8 // accumulation, 14 // accumulation):
        killed = train(f"at{stop}", stop)
        torch.manual_seed(stop)
        resumed = train(f"at{stop}", resume_from_checkpoint=True)
        assert killed.seen + resumed.seen == whole.seen
        assert torch.equal(resumed.weight, whole.weight)
