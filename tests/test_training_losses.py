"""The loss of IDTrainer is a fact of the global batch, however it is split, and of the whole evaluation set."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from idavlm.data import RecordDataset
from idavlm.models.supervision import count_supervised_scenes
from tests.distributed_run import WEIGHTS, build, exact_model, read, runs
from tests.interrupted_run import write_data
from tests.small_models import record, small_processor


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def without_boxes(data: Path) -> RecordDataset:
    """Identity records without boxes. Their answers have different lengths."""
    answers = ["Kate is reading.", "Tom is waving. Kate is reading.", "Tom.", "Where is Kate? What is Tom doing?"]
    records = []
    for number, answer in enumerate(answers):
        entry = record(number) | {"boxes": [], "id": f"w{number}"}
        scene = [{"type": "image", "image": "scene.png"}, {"type": "text", "text": "\nWhat is Kate doing?"}]
        entry["messages"] = [{"role": "user", "content": scene}, {"role": "assistant", "content": answer}]
        records.append(entry)
    (data / "without_boxes.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in records))
    return read(data, "without_boxes")


def sources(data: Path, kind: str):
    """Eight samples in an order in which micro-batches of two have one source or both."""
    identity, general = read(data, "train"), read(data, "general")
    if kind == "without boxes":
        identity = without_boxes(data)
        return [identity[0], identity[1], general[0], identity[2], general[1], general[2], identity[3], general[3]]
    if kind == "some boxes":
        other = without_boxes(data)
        return [identity[0], other[0], general[0], general[1], other[1], other[2], identity[1], identity[2]]
    return [identity[0], identity[1], general[0], identity[2], general[1], general[2], identity[3], general[3]]


def reference(model, samples, weights=WEIGHTS) -> dict[str, torch.Tensor]:
    """The losses by their definition, from samples one by one."""
    processor = small_processor()
    sums, tokens, maps, scenes = {}, {}, 0.0, 0
    for sample in samples:
        batch = processor.collate([sample])
        source, labels = batch.pop("source")[0], batch.pop("labels")
        batch.pop("sample_ids")
        outputs = model(**batch)
        loss = F.cross_entropy(outputs.logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
        sums[source] = sums.get(source, 0) + loss
        tokens[source] = tokens.get(source, 0) + int((labels[0, 1:] != -100).sum())
        count = count_supervised_scenes(batch)
        maps, scenes = maps + outputs.identity_map_loss * count, scenes + count
    losses = {f"loss_{source}": value / tokens[source] for source, value in sums.items()}
    losses["loss"] = sum(weights[source] * losses[f"loss_{source}"] for source in sums)
    if scenes:
        losses["identity_map_loss"] = maps / scenes
        losses["loss"] = losses["loss"] + weights["identity"] * maps / scenes
    return losses


def gradients_of(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(found, expected):
    assert found.keys() == expected.keys()
    assert max(gradient.abs().max() for gradient in expected.values()) > 0.01
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (4, 2), (2, 4), (1, 8)])
@pytest.mark.parametrize("kind", ["boxes", "some boxes", "without boxes"])
def test_the_gradient_does_not_depend_on_the_split_of_a_batch(data, tmp_path, kind, batch_size, accumulation):
    samples = sources(data, kind)
    trainer, seen = build(tmp_path, samples, batch_size=batch_size, accumulation=accumulation)
    trainer.train()
    model = exact_model(small_processor()).train()
    expected = reference(model, samples)
    (found,) = seen.steps
    assert_equal_gradients(found, gradients_of(model, expected["loss"]))
    (logged,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ("identity_map_loss" in logged) == (kind != "without boxes")
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value.item(), rel=1e-6), name


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_the_gradient_of_joint_batches_does_not_depend_on_the_split(data, tmp_path, batch_size, accumulation):
    identity, general = read(data, "train"), read(data, "general")
    split = {"batch_size": batch_size, "accumulation": accumulation, "mixing_mode": "joint"}
    trainer, seen = build(tmp_path, identity, trainer={"general_dataset": general}, **split)
    trainer.train()
    model = exact_model(small_processor()).train()
    samples = [dataset[index] for dataset in (identity, general) for index in range(4)]
    assert_equal_gradients(seen.steps[0], gradients_of(model, reference(model, samples)["loss"]))


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_the_gradient_of_identity_pretraining_does_not_depend_on_the_split(data, tmp_path, batch_size, accumulation):
    identity, other = read(data, "train"), without_boxes(data)
    samples = [other[0], identity[0], identity[1], identity[2]]
    split = {"batch_size": batch_size, "accumulation": accumulation, "stage": "identity_pretraining"}
    trainer, seen = build(tmp_path, samples, **split)
    trainer.train()
    model = exact_model(small_processor()).train()
    losses = reference(model, samples)
    expected = gradients_of(model, WEIGHTS["identity"] * losses["identity_map_loss"])
    assert_equal_gradients(seen.steps[0], expected)


def test_logged_losses_are_means_over_tokens_since_the_last_entry(data, tmp_path):
    samples = sources(data, "some boxes")
    trainer, _ = build(tmp_path, samples, batch_size=2, accumulation=1, max_steps=4, logging_steps=4)
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    expected = reference(exact_model(small_processor()).train(), samples)
    for name in ("loss_identity", "loss_general", "identity_map_loss"):
        assert logged[name] == pytest.approx(expected[name].item(), abs=1e-6), name


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_losses_of_an_evaluation_do_not_depend_on_its_batch_size(data, tmp_path, batch_size):
    samples = sources(data, "some boxes")
    options = {"per_device_eval_batch_size": batch_size, "batch_size": 1, "accumulation": 1}
    trainer, _ = build(tmp_path, None, trainer={"eval_dataset": samples}, **options)
    metrics = trainer.evaluate()
    expected = reference(exact_model(small_processor()), samples)
    assert len(expected) == 4
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-10), name
    assert trainer.state.log_history[-1]["eval_loss"] == metrics["eval_loss"]


def test_the_best_checkpoint_is_chosen_by_the_loss_of_a_source(data, tmp_path):
    samples = sources(data, "boxes")
    trainer, _ = build(
        tmp_path,
        samples,
        batch_size=2,
        accumulation=1,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_loss_general",
        trainer={"eval_dataset": {"a": samples[:2], "b": samples}},
    )
    metrics = trainer.evaluate()
    assert "eval_a_loss_general" not in metrics
    assert metrics["eval_b_loss_general"] > 0
    trainer.eval_dataset = samples
    trainer.train()
    assert trainer.state.best_metric == metrics["eval_b_loss_general"]


def test_an_evaluation_without_labels_has_no_loss(data, tmp_path):
    sample = read(data, "train")[0]
    sample = sample | {"labels": torch.full_like(sample["labels"], -100), "boxes": sample["boxes"][:0]}
    sample |= {name: sample[name][:0] for name in ("box_image", "box_identity")}
    trainer, _ = build(tmp_path, [sample], batch_size=1, accumulation=1, trainer={"eval_dataset": [sample]})
    assert not [name for name in trainer.evaluate() if "loss" in name]
    with pytest.raises(ValueError, match=r"step 1 has neither labelled tokens nor boxes.* are \['0'\]"):
        trainer.train()


def test_metrics_are_computed_from_logits(data, tmp_path):
    """Evaluation batches have different lengths; the Trainer pads them."""
    samples, seen = sources(data, "boxes"), []
    trainer, _ = build(
        tmp_path,
        None,
        batch_size=1,
        accumulation=1,
        per_device_eval_batch_size=3,
        trainer={"eval_dataset": samples, "compute_metrics": lambda found: seen.append(found) or {"one": 1.0}},
    )
    assert trainer.evaluate()["eval_one"] == 1.0
    longest = max(len(sample["input_ids"]) for sample in samples)
    vocabulary = trainer.model.config.text_config.vocab_size
    assert seen[0].predictions.shape == (8, longest, vocabulary)
    assert seen[0].label_ids.shape == (8, longest)


def test_two_processes_are_equal_to_one(data, tmp_path):
    """Gradients, logged losses, an evaluation whose last batch is filled up, and a loss that is NaN in one process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed_run", str(data), str(tmp_path)],
            cwd=Path(__file__).parent.parent,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        expected = runs(data, tmp_path / "one", batch_size=8, accumulation=1)
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    for rank in range(2):
        seen = torch.load(tmp_path / f"{rank}.pt")
        assert len(seen["gradients"]) == 2
        for found, gradients in zip(seen["gradients"], expected["gradients"], strict=True):
            assert_equal_gradients({name.removeprefix("module."): g for name, g in found.items()}, gradients)
        assert seen["eval"] == pytest.approx(expected["eval"], rel=1e-10)
        for found, logged in zip(seen["logs"], expected["logs"], strict=True):
            assert found == pytest.approx(logged, abs=2e-6)
        step, sample_ids = seen["error"]
        assert step == expected["error"][0] == 1
        assert sample_ids == ["2", "3"], "the micro-batch of the second process; both processes name it"
        assert len(expected["error"][1]) == 8
        assert (tmp_path / "nan" / "non_finite_step-1" / f"process-{rank}" / "step.json").exists()
