"""The trainer: weights of sources act on gradients, modules have their own rates, killed runs go on bit for bit."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from idavlm.data import RecordDataset
from idavlm.training import IDTrainer, IDTrainingArguments, last_complete_checkpoint
from idavlm.training.trainer import language_loss_by_source
from tests.interrupted_run import STEPS, build_trainer, write_data
from tests.small_models import small_model, small_processor


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def losses(folder: Path) -> dict[int, dict]:
    """By step; the last word counts, as a resumed run says some steps again."""
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines}


@pytest.mark.usefixtures("_one_thread")
def test_killed_and_resumed_runs_are_bit_equal_to_an_uninterrupted_one(data, tmp_path):
    build_trainer(data, tmp_path / "whole").train()
    whole = losses(tmp_path / "whole")
    assert set(whole) == set(range(1, STEPS + 1))
    assert {"loss_identity", "loss_general"} <= {name for line in whole.values() for name in line}

    kills = [(6, "step"), (9, "step"), (12, "save")]  # between checkpoints, right after one, while writing one
    processes = []
    for step, where in kills:
        folder = tmp_path / f"{where}-{step}"
        folder.mkdir()
        command = [sys.executable, "-m", "tests.interrupted_run", str(data), str(folder), str(step), where]
        processes.append((folder, subprocess.Popen(command, cwd=Path(__file__).parent.parent)))
    for folder, process in processes:
        assert process.wait(timeout=300) == -signal.SIGKILL
        before = losses(folder)
        assert 0 < len(before) < STEPS
        if folder.name.startswith("save"):
            assert (folder / "checkpoint-12").exists()
            assert last_complete_checkpoint(folder).endswith("checkpoint-8")
        resumed = build_trainer(data, folder)
        resumed.train(resume_from_checkpoint=True)
        assert losses(folder) == whole
        assert resumed.state.global_step == STEPS


@pytest.mark.usefixtures("_one_thread")
def test_runs_with_workers_and_accumulation_go_on_as_well(data, tmp_path):
    options = {"num_workers": 1, "gradient_accumulation_steps": 2}
    build_trainer(data, tmp_path / "whole", **options).train()
    checkpoint = tmp_path / "whole" / "checkpoint-8"
    resumed = build_trainer(data, tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "again") == {step: whole[step] for step in range(9, STEPS + 1)}


def arguments(tmp_path, **options) -> IDTrainingArguments:
    defaults = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 2}
    return IDTrainingArguments(**(defaults | options))


def gradients(data, tmp_path, source: str, **options) -> dict[str, torch.Tensor]:
    processor = small_processor()
    trainer = IDTrainer(small_model(processor), arguments(tmp_path, **options), data_collator=processor.collate)
    records = RecordDataset(data / f"{'train' if source == 'identity' else 'general'}.jsonl", encode=processor.encode)
    batch = processor.collate([records[0], records[1]])
    trainer.compute_loss(trainer.model.train(), batch).backward()
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("source", ["identity", "general"])
def test_loss_weights_act_on_the_gradients(data, tmp_path, source):
    plain = gradients(data, tmp_path, source)
    weighted = gradients(data, tmp_path, source, loss_weights={source: 0.25})
    other = {"identity": "general", "general": "identity"}[source]
    untouched = gradients(data, tmp_path, source, loss_weights={other: 0.25})
    assert any(gradient.abs().max() > 1e-3 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(weighted[name], 0.25 * gradient)
        torch.testing.assert_close(untouched[name], gradient)


def test_mixed_batches_are_weighted_by_sample(data, tmp_path):
    processor = small_processor()
    model = small_model(processor)
    identity = RecordDataset(data / "train.jsonl", encode=processor.encode)
    general = RecordDataset(data / "general.jsonl", encode=processor.encode)
    mixed = processor.collate([identity[0], general[0], identity[1]]) | {"sample_source": torch.tensor([0, 1, 0])}
    trainer = IDTrainer(model, arguments(tmp_path, loss_weights={"identity": 0.5, "general": 3.0}))
    loss, outputs = trainer.compute_loss(model, dict(mixed), return_outputs=True)
    alone = [
        model(**{k: v for k, v in processor.collate(rows).items() if k != "source"})
        for rows in ([identity[0], identity[1]], [general[0]])
    ]
    expected = 0.5 * alone[0].loss + 3 * alone[1].language_loss
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    means = language_loss_by_source(outputs.logits, mixed["labels"], mixed["sample_source"])
    torch.testing.assert_close(means["general"], alone[1].language_loss, rtol=1e-4, atol=1e-5)


def test_freezing_and_rates_of_modules(data, tmp_path):
    processor = small_processor()
    records = RecordDataset(data / "train.jsonl", encode=processor.encode)
    model = small_model(processor)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    options = {"freeze": ["vision_tower"], "module_learning_rates": {"id_former": 0.0}, "learning_rate": 1e-2}
    trainer = IDTrainer(model, arguments(tmp_path, **options), train_dataset=records, data_collator=processor.collate)
    trainer.train()
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == name.startswith("language_model"), name


def test_teacher_forcing_ends_after_its_steps(data, tmp_path):
    processor = small_processor()
    model, seen = small_model(processor, max_identities=2), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("teacher_forcing", False)), with_kwargs=True
    )
    records = RecordDataset(data / "train.jsonl", encode=processor.encode)
    options = arguments(tmp_path, max_steps=3, teacher_forcing_steps=2)
    IDTrainer(model, options, train_dataset=records, data_collator=processor.collate).train()
    assert seen == [True, True, False]
    with pytest.raises(ValueError, match="teacher_forcing_steps=2 needs an ID-Former with max_identities"):
        IDTrainer(small_model(processor), options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_forcing_steps": -1}, "teacher_forcing_steps=-1 must be"),
        ({"loss_weights": {"scene": 1.0}}, "loss_weights='scene'"),
        ({"loss_weights": {"general": -1.0}}, r"loss_weights\['general'\]=-1.0"),
        ({"freeze": ["tower"]}, "freeze='tower'"),
        ({"freeze": ["id_former"], "module_learning_rates": {"id_former": 1.0}}, "freeze holds 'id_former'"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True"),
    ],
)
def test_arguments_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_errors_of_the_trainer(tmp_path):
    with pytest.raises(ValueError, match="freeze names 'connector'"):
        IDTrainer(small_model(small_processor()), arguments(tmp_path, freeze=["connector"]))
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        last_complete_checkpoint(tmp_path)


def test_evaluation_during_training(data, tmp_path):
    processor = small_processor()
    records = RecordDataset(data / "train.jsonl", encode=processor.encode)
    trainer = IDTrainer(
        small_model(processor),
        arguments(tmp_path, eval_strategy="steps", eval_steps=1, logging_steps=1, per_device_train_batch_size=2),
        train_dataset=records,
        eval_dataset=records,
        data_collator=processor.collate,
        task_evaluation=lambda model: {"matching": float(model.training)},
    )
    trainer.train()
    seen = [entry for entry in trainer.state.log_history if "eval_matching" in entry]
    assert [entry["eval_matching"] for entry in seen] == [0.0, 0.0]
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
