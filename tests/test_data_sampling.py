"""Curriculum sampling and grouping by length."""

import json
from collections import Counter
from dataclasses import replace
from random import Random

import datasets
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from transformers import Trainer, TrainerCallback, TrainingArguments

from idavlm.data import (
    CurriculumSampler,
    CurriculumStage,
    LengthGroupedSampler,
    RecordDataset,
    group_by_length,
    parse_sample,
    token_counts,
)
from tests.test_data_schema import TRAINING

LENGTHS = Random(1).choices(range(1, 50), k=1000)
TASKS = ("matching", "location", "qa_single", None)


def padding(indices, batch_size):
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    return sum(max(LENGTHS[i] for i in batch) - LENGTHS[i] for batch in batches for i in batch)


# Grouping by length --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 5, 128, 130, 1000])
def test_every_sample_stays_within_its_window(count):
    indices = Random(2).sample(range(1000), count)
    grouped = group_by_length(indices, LENGTHS, 16, window=4, seed=3)
    for start in range(0, count, 64):
        assert sorted(grouped[start : start + 64]) == sorted(indices[start : start + 64])


def test_grouping_reduces_padding():
    indices = Random(2).sample(range(1000), 1000)
    grouped = group_by_length(indices, LENGTHS, 16, seed=3)
    assert padding(grouped, 16) < padding(indices, 16) / 4


def test_batches_are_shuffled_and_depend_on_the_seed_only():
    indices = list(range(128))
    grouped = group_by_length(indices, LENGTHS, 16, seed=3)
    assert grouped == group_by_length(indices, LENGTHS, 16, seed=3)
    assert grouped != group_by_length(indices, LENGTHS, 16, seed=4)
    longest = [max(LENGTHS[i] for i in grouped[start : start + 16]) for start in range(0, 128, 16)]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_impossible_sizes():
    with pytest.raises(ValueError, match="batch_size=0"):
        group_by_length([1], LENGTHS, 0)
    with pytest.raises(ValueError, match="window=0"):
        group_by_length([1], LENGTHS, 1, window=0)


def test_an_epoch_grouped_by_length_is_a_function_of_seed_and_epoch():
    sampler = LengthGroupedSampler(LENGTHS, batch_size=16, seed=3)
    first, again = list(sampler), list(sampler)
    assert first == again, "whatever torch's global generator did in between"
    assert sorted(first) == list(range(1000))
    shuffled = Random(0).sample(range(1000), 1000)
    assert padding(first, 16) < padding(shuffled, 16) / 4
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(LengthGroupedSampler(LENGTHS, batch_size=16, seed=4)) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_small_data_sets_have_other_batches_in_each_epoch():
    sampler = LengthGroupedSampler(list(range(16)), batch_size=2)
    batches = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        batches.append({frozenset(order[start : start + 2]) for start in range(0, 16, 2)})
    assert batches[0] != batches[1]


def test_token_counts_of_every_kind_of_data_set(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({**TRAINING, "id": str(n)}) + "\n" for n in range(3)))

    class Counting:
        def encode(self, sample):
            raise AssertionError("lengths are known without encoding")

        def num_tokens(self, sample):
            return 10 + int(sample.id)

    data = RecordDataset(tmp_path / "train.jsonl", encode=Counting().encode)
    assert token_counts(data) == [10, 11, 12]
    assert token_counts(Subset(data, [2, 2, 0])) == [12, 12, 10]
    assert token_counts(ConcatDataset([data, Subset(data, [1])])) == [10, 11, 12, 11]
    assert token_counts([{"input_ids": torch.zeros(n)} for n in (4, 2)]) == [4, 2]
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "size": [7, 3]})
    assert token_counts(table, "size") == [7, 3]
    with pytest.raises(ValueError, match=r"lengths of the samples of Dataset are not known.*a column 'length'"):
        token_counts(table)
    with pytest.raises(ValueError, match="is not the method of a processor that counts tokens"):
        token_counts(RecordDataset(tmp_path / "train.jsonl", encode=len))
    with pytest.raises(ValueError, match="lengths of the samples of Dataset are not known"):
        token_counts(Dataset())


# Curriculum ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples():
    sample = parse_sample(TRAINING)
    return [replace(sample, id=str(number), task=TASKS[number % 4]) for number in range(400)]


STAGES = [CurriculumStage(20, {"location": 1.0}), CurriculumStage(100, {"location": 0.3, "*": 0.7})]


def test_stages_and_weights(samples):
    indices = CurriculumSampler(samples, STAGES, batch_size=16).indices
    assert len(indices) == 120 * 16
    assert {samples[index].task for index in indices[: 20 * 16]} == {"location"}
    tasks = Counter(samples[index].task for index in indices[20 * 16 :])
    assert set(tasks) == set(TASKS)
    assert tasks["location"] / 1600 == pytest.approx(0.3 + 0.7 / 4, abs=0.04)
    assert tasks["matching"] / 1600 == pytest.approx(0.7 / 4, abs=0.04)


def test_the_order_depends_on_the_arguments_only(samples):
    sampler = CurriculumSampler(samples, STAGES, batch_size=16, seed=1)
    torch.manual_seed(5)
    again = CurriculumSampler(samples, STAGES, batch_size=16, seed=1)
    assert list(sampler) == list(sampler) == list(again)
    assert list(CurriculumSampler(samples, STAGES, batch_size=16, seed=2)) != list(sampler)


def test_the_order_never_changes_between_versions():
    """The results in the documentation were trained with this order."""
    sample = parse_sample(TRAINING)
    samples = [replace(sample, task=("matching", "location")[number % 2]) for number in range(50)]
    stages = [CurriculumStage(2, {"location": 1.0}), CurriculumStage(2, {"location": 0.3, "*": 0.7})]
    found = CurriculumSampler(samples, stages, batch_size=3, seed=7, lengths=range(50)).indices
    rng, location = Random(7), range(1, 50, 2)
    shares = [1.0] * 6 + [0.3] * 6
    drawn = sorted(rng.choice(location if rng.random() < share else range(50)) for share in shares)
    batches = [drawn[start : start + 3] for start in range(0, 12, 3)]
    rng.shuffle(batches)
    assert found == [index for batch in batches for index in batch]


def test_conditions(samples):
    few = [replace(sample, identities=sample.identities[: 1 + number % 2]) for number, sample in enumerate(samples)]
    stages = [
        CurriculumStage(5, {"*": 1}, condition=lambda sample: len(sample.identities) == 1),
        CurriculumStage(5, {"location": 1}, condition=lambda sample: len(sample.identities) == 2),
    ]
    indices = CurriculumSampler(few, stages, batch_size=8).indices
    assert {len(few[index].identities) for index in indices[:40]} == {1}
    assert {(few[index].task, len(few[index].identities)) for index in indices[40:]} == {("location", 2)}


def test_lengths_group_the_batches_and_keep_the_stages_within_the_window(samples):
    lengths = LENGTHS[:400]
    sampler = CurriculumSampler(samples, STAGES, batch_size=16, lengths=lengths, window=4)
    ungrouped = CurriculumSampler(samples, STAGES, batch_size=16)
    assert Counter(sampler) == Counter(ungrouped)
    assert padding(list(sampler), 16) < padding(list(ungrouped), 16) / 2
    assert {samples[index].task for index in sampler.indices[: 20 * 16]} == {"location"}, "20 is a multiple of 4"


def test_a_data_set_and_a_data_loader(tmp_path):
    import json

    lines = [json.dumps({**TRAINING, "id": i, "type": TASKS[i % 3]}) for i in range(30)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    data = RecordDataset(tmp_path / "train.jsonl", encode=lambda sample: {"id": sample.id, "task": sample.task})
    sampler = CurriculumSampler(data, [CurriculumStage(3, {"location": 1})], batch_size=4)
    batches = list(DataLoader(data, batch_size=4, sampler=sampler, collate_fn=list))
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert [int(sample["id"]) for batch in batches for sample in batch] == sampler.indices
    assert {sample["task"] for batch in batches for sample in batch} == {"location"}


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        ([], {}, "stages is empty"),
        ([CurriculumStage(1, {"caption_multi": 1})], {}, "names 'caption_multi', but no sample has this task"),
        ([CurriculumStage(1, {"*": 1}, condition=lambda _: False)], {}, "that meets the condition of the stage"),
        (STAGES, {"batch_size": 0}, "batch_size=0"),
        (STAGES, {"lengths": [1]}, "lengths has 1 entries for 400 samples"),
    ],
)
def test_faults_of_a_curriculum_are_named(samples, stages, options, message):
    with pytest.raises(ValueError, match=message):
        CurriculumSampler(samples, stages, **{"batch_size": 4, **options})


def test_faults_of_a_stage_are_named():
    with pytest.raises(ValueError, match="steps=0"):
        CurriculumStage(0, {"*": 1})
    for weights in ({}, {"*": 0}, {"*": -1}, {"*": float("nan")}):
        with pytest.raises(ValueError, match="must have at least one positive weight"):
            CurriculumStage(1, weights)


class Recorder(torch.nn.Module):
    """A model with one weight that records its inputs."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, x):
        self.seen.append(x.tolist())
        return {"loss": ((self.weight - x.float().mean()) ** 2).sum()}


def test_the_trainer_reads_the_order_and_resumes_within_it(tmp_path, samples):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop |= state.global_step == 4

    sampler = CurriculumSampler(samples, [CurriculumStage(10, {"location": 0.5, "*": 0.5})], batch_size=4)
    data = Subset([{"x": torch.tensor(number)} for number in range(400)], sampler.indices)

    def train(folder, callbacks=(), **options):
        arguments = TrainingArguments(
            tmp_path / folder,
            max_steps=10,
            per_device_train_batch_size=4,
            train_sampling_strategy="sequential",
            save_steps=1,
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(Recorder(), arguments, train_dataset=data, callbacks=list(callbacks))
        trainer.train(**options)
        return trainer.model

    whole = train("whole")
    assert [index for batch in whole.seen for index in batch] == sampler.indices
    stopped = train("stopped", [Stop()])
    resumed = train("stopped", resume_from_checkpoint=True)
    assert stopped.seen + resumed.seen == whole.seen
    assert torch.equal(resumed.weight, whole.weight)
