"""Losses that are NaN or infinite stop training, or are left out and counted."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from idavlm.models import IDAVLMForConditionalGeneration
from idavlm.training import IDTrainer, IDTrainingArguments, NonFiniteLossError
from idavlm.training.non_finite import MAX_SKIPPED_STEPS
from tests.distributed_run import OneNaN, read
from tests.interrupted_run import write_data
from tests.small_models import small_model, small_processor


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def trainer_of(tmp_path, dataset, model=None, trainer=None, **options) -> IDTrainer:
    processor = small_processor()
    defaults = {"max_steps": 4, "save_steps": 1, "logging_steps": 1, "train_sampling_strategy": "sequential"}
    defaults |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 1}
    arguments = IDTrainingArguments(str(tmp_path), **(defaults | options))
    processing = {"processing_class": processor} if model is None or isinstance(model, PreTrainedModel) else {}
    model = small_model(processor) if model is None else model
    return IDTrainer(model, arguments, train_dataset=dataset, **processing, **(trainer or {}))


def test_a_loss_that_is_not_finite_stops_training(data, tmp_path):
    """The third and fourth record form the second step; the fourth has the image of NaN."""
    model = small_model(small_processor())
    model.language_model.config.attention_dropout = 0.1
    trainer = trainer_of(tmp_path, OneNaN(read(data, "train"), 3), model, gradient_accumulation_steps=2)
    with pytest.raises(
        NonFiniteLossError, match=r"the loss of step 2 is NaN or infinite\. Records of the batch: 3\."
    ) as e:
        trainer.train()
    assert (e.value.step, e.value.sample_ids) == (2, ["3"])
    assert str(e.value.path) in str(e.value)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1"]
    saved = IDAVLMForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-1").state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items()), "weights are kept"

    facts = json.loads((e.value.path / "step.json").read_text())
    assert facts["step"] == 2
    assert [batch["sample_ids"] for batch in facts["batches"]] == [["2"], ["3"]]
    assert [math.isfinite(float(loss)) for loss in facts["losses"]] == [True, False]
    torch.set_rng_state(load_file(e.value.path / "rng_state.safetensors")["cpu"])
    batches = [load_file(e.value.path / f"batch_{number}.safetensors") for number in range(2)]
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    outputs = [model.train()(**batch) for batch in batches]
    share = counts[0] / sum(counts)
    assert (share * outputs[0].language_loss + outputs[0].auxiliary_loss / 2).item() == pytest.approx(
        float(facts["losses"][0]), rel=1e-6
    )
    assert outputs[1].loss.isnan()


class Infinite(nn.Module):
    """A loss of 0 whose gradient is infinite, and a loss that overflows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        if x[0] == 1.0:
            return {"loss": self.weight[0].sqrt()}
        return {"loss": torch.exp(self.weight[1] + x.mean())}


@pytest.mark.parametrize(("value", "what"), [(1.0, "gradient"), (1000.0, "loss")])
def test_infinite_gradients_and_losses_stop_training(tmp_path, value, what):
    trainer = trainer_of(tmp_path, [{"x": 0.0}, {"x": value}], Infinite(), learning_rate=0.0)
    with pytest.raises(
        NonFiniteLossError, match=f"the {what} of step 2 is NaN or inf.*: unknown, because the data set"
    ):
        trainer.train()
    assert trainer.model.weight.isfinite().all()


def test_steps_with_such_losses_are_left_out_and_counted(data, tmp_path):
    samples = list(OneNaN(read(data, "train"), 1))[:4]
    trainer = trainer_of(tmp_path, samples, non_finite_loss="skip", logging_steps=2)
    trainer.train()
    model = trainer.model.state_dict()
    assert all(tensor.isfinite().all() for tensor in model.values())
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert first["skipped_steps"] == 1
    assert "skipped_steps" not in second
    assert math.isfinite(first["loss"])
    assert "grad_norm" not in first
    alone = trainer_of(tmp_path / "alone", samples[:1], max_steps=1)
    alone.train()
    assert first["loss_identity"] == alone.state.log_history[0]["loss_identity"], "the mean of the other step"


def test_a_step_that_is_left_out_changes_nothing(data, tmp_path):
    """Neither a weight nor a statistic of a batch norm."""
    seen = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    dataset = OneNaN(read(data, "train"), 2)  # in the second micro-batch of the second step
    options = {"non_finite_loss": "skip", "gradient_accumulation_steps": 2, "max_steps": 3, "learning_rate": 1e-2}
    trainer_of(tmp_path, dataset, trainer={"callbacks": [Keep()]}, **options).train()
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in seen[0].items())
    assert not all(torch.equal(tensor, seen[2][name]) for name, tensor in seen[1].items())


def test_too_many_steps_in_a_row_stop_training(tmp_path):
    samples = [{"x": 0.0}, *[{"x": float("nan")}] * (MAX_SKIPPED_STEPS + 1)]
    trainer = trainer_of(tmp_path, samples, Infinite(), max_steps=20, save_strategy="no", non_finite_loss="skip")
    with pytest.raises(NonFiniteLossError, match=f"for the {MAX_SKIPPED_STEPS}th time in a row") as e:
        trainer.train()
    assert e.value.step == 1 + MAX_SKIPPED_STEPS
    spread = [sample for number in range(12) for sample in ({"x": 0.0}, {"x": float("nan")})]
    trainer_of(tmp_path, spread, Infinite(), max_steps=24, save_strategy="no", non_finite_loss="skip").train()


def test_a_loss_of_an_evaluation_that_is_not_finite_is_shown(data, tmp_path):
    dataset = OneNaN(read(data, "train"), 1)
    metrics = trainer_of(tmp_path, None, trainer={"eval_dataset": dataset}).evaluate()
    assert math.isnan(metrics["eval_loss"])
    assert math.isnan(metrics["eval_loss_identity"])
