"""A small training run on both sources that kills itself: ``python -m tests.interrupted_run DATA FOLDER STEP WHERE``.

It writes the exact losses of every step to FOLDER/losses.jsonl. WHERE is ``step`` (at the end of a step) or ``save``
(while a checkpoint is written).
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback, set_seed

from idavlm.data import RecordDataset
from idavlm.experimental.muon import muon_adamw
from idavlm.training import IDTrainer, IDTrainingArguments
from tests.small_models import IMAGES, draw_images, record, small_model, small_processor

STEPS, SAVE_EVERY = 14, 4


def write_data(folder: Path) -> None:
    """Ten identity records and five general ones."""
    draw_images(folder / "images", IMAGES)
    names = [("Kate", "Tom"), ("Tom",), ("Tom", "Kate"), ("Kate",)]
    identity = [record(number, people=names[number % 4]) for number in range(10)]
    general = [
        {
            "id": f"g{number}",
            "source": "general",
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": IMAGES[number % 4]}]},
                {"role": "assistant", "content": f"Image {number}: Tom."},
            ],
        }
        for number in range(5)
    ]
    for name, records in (("train", identity), ("general", general)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in records))


class Exact(TrainerCallback):
    """Writes the losses of every step without rounding."""

    def __init__(self, path: Path):
        self.path = path

    def on_log(self, args, state, control, logs=None, **kwargs):
        losses = {name: value for name, value in logs.items() if "loss" in name and name != "train_loss"}
        if losses and state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **losses}) + "\n")


class Watched(IDTrainer):
    """Has the file ``evaluating`` in its folder while it evaluates."""

    def evaluate(self, *args, **kwargs):
        marker = Path(self.args.output_dir) / "evaluating"
        if self.is_world_process_zero():
            marker.touch()
        metrics = super().evaluate(*args, **kwargs)
        if self.is_world_process_zero():
            marker.unlink(missing_ok=True)
        return metrics


class Kill(TrainerCallback):
    """Sends SIGKILL at the end of a step: nothing is flushed, closed or caught."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def build_trainer(
    data: Path, folder: Path, *, tower: str = "resnet", num_workers: int = 0, general: bool = True, **options
) -> IDTrainer:
    processor = small_processor()
    set_seed(3)
    model = small_model(processor, tower=tower, detach_references=False)
    model.language_model.config.attention_dropout = 0.1  # the state of the random generators must be restored, too
    arguments = IDTrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        warmup_steps=2,
        logging_steps=1,
        save_steps=SAVE_EVERY,
        mixing_ratio=0.4 if general else 0.1,
        dataloader_num_workers=num_workers,
        disable_tqdm=True,
        report_to=[],
        use_cpu=True,
        seed=3,
        **options,
    )
    identity = RecordDataset(data / "train.jsonl", encode=processor.encode)
    return Watched(
        model,
        arguments,
        train_dataset=identity,
        eval_dataset=identity if arguments.eval_strategy != "no" else None,
        general_dataset=RecordDataset(data / "general.jsonl", encode=processor.encode) if general else None,
        processing_class=processor,
        optimizers=(muon_adamw(model, learning_rate=1e-3), None),
        callbacks=[Exact(folder / "losses.jsonl")],
    )


def main() -> None:
    torch.set_num_threads(1)
    data, folder, step, where = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    trainer = build_trainer(data, folder)
    if where == "step":
        trainer.add_callback(Kill(step))
    else:
        # While a checkpoint is written: it has the weights, but not the state.
        save = trainer._save_optimizer_and_scheduler

        def killed_while_saving(output_dir):
            if trainer.state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            save(output_dir)

        trainer._save_optimizer_and_scheduler = killed_while_saving
    trainer.train()


if __name__ == "__main__":
    main()
