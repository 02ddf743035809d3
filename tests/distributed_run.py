"""Two processes train and evaluate on the CPU: ``python -m tests.distributed_run DATA FOLDER``, once per process.

The environment variables RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as torchrun does. Every
process writes what it has seen to FOLDER/<rank>.pt.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import ConcatDataset, Dataset
from transformers import TrainerCallback

from idavlm.data import RecordDataset
from idavlm.models import IDAVLMForConditionalGeneration
from idavlm.training import IDTrainer, IDTrainingArguments, NonFiniteLossError
from tests.small_models import small_model, small_processor

WEIGHTS = {"identity": 0.5, "general": 3.0}


def exact_loss(logits, labels=None, *, shift_labels, vocab_size, **_):
    """transformers' causal language model loss without its conversion to float32."""
    return F.cross_entropy(logits.reshape(-1, vocab_size), shift_labels.reshape(-1), ignore_index=-100)


def exact_model(processor, **options) -> IDAVLMForConditionalGeneration:
    """A model in float64 whose loss has float64, too. The statistics of its batch norms do not depend on the batch."""
    model = small_model(processor, **options).double()
    model.loss_function = exact_loss
    model.vision_tower.requires_grad_(False)
    return model


def read(data: Path, name: str) -> RecordDataset:
    return RecordDataset(data / f"{name}.jsonl", data / "images", encode=small_processor().encode)


class Gradients(TrainerCallback):
    """Keeps the gradient of every step."""

    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


class OneNaN(Dataset):
    """A data set with an image of NaN."""

    def __init__(self, dataset, index: int):
        self.dataset, self.index = dataset, index

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        sample = self.dataset[index]
        return sample | {"pixel_values": sample["pixel_values"] * float("nan")} if index == self.index else sample


def build(folder: Path, dataset, *, batch_size: int, accumulation: int, model=None, trainer=None, **options):
    """A trainer that reads ``dataset`` in its order and changes no weight, and the gradients that it sees."""
    processor = small_processor()
    gradients = Gradients()
    defaults: dict[str, Any] = {"max_steps": 1, "loss_weights": WEIGHTS, "train_sampling_strategy": "sequential"}
    defaults |= {"logging_steps": 1}
    arguments = IDTrainingArguments(
        str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=0.0,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **(defaults | options),
    )
    model = exact_model(processor) if model is None else model
    options = {"train_dataset": dataset, "processing_class": processor, "callbacks": [gradients], **(trainer or {})}
    return IDTrainer(model, arguments, **options), gradients


def runs(data: Path, folder: Path, *, batch_size: int, accumulation: int) -> dict[str, Any]:
    """Two steps of eight samples and an evaluation of seven; then a step with a loss that is not finite."""
    identity, general = read(data, "train"), read(data, "general")
    # Batches of two: the first process sees both sources in turn, the second one identities only in the first step.
    order = [general[0], general[1], identity[0], identity[1], identity[2], general[2], identity[3], identity[4]]
    order += [identity[5], identity[6], general[3], general[4], identity[7], identity[8], identity[9], general[0]]
    split = {"batch_size": batch_size, "accumulation": accumulation}
    trainer, gradients = build(folder, order, max_steps=2, trainer={"eval_dataset": order[:7]}, **split)
    trainer.train()
    metrics = trainer.evaluate()
    seen = {"gradients": gradients.steps, "eval": {k: v for k, v in metrics.items() if "loss" in k}}
    seen["logs"] = [
        {name: value for name, value in entry.items() if name.startswith(("loss", "identity"))}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    dataset = OneNaN(ConcatDataset([identity, general]), 2)
    trainer, _ = build(folder / "nan", dataset, **split)
    try:
        trainer.train()
    except NonFiniteLossError as error:
        seen["error"] = (error.step, error.sample_ids)
    return seen


def main() -> None:
    torch.set_num_threads(1)
    data, folder = map(Path, sys.argv[1:])
    seen = runs(data, folder, batch_size=2, accumulation=2)
    torch.save(seen, folder / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
