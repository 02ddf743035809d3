"""Callbacks of a training run: the progress bar, and generated samples in the tracker."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

LABELS = {"loss_identity": "identity", "loss_general": "general", "identity_map_loss": "identity map"}
"""Label in the progress bar of each log entry that is shown."""

IMAGE_TRACKERS = ("tensorboard", "wandb", "trackio")
"""Names in ``report_to`` of the trackers to which :class:`SampleLogger` logs images."""


class SourceProgress(ProgressCallback):
    """A progress bar that shows the loss of each source and the name of the output folder.

    It replaces transformers' ``ProgressCallback``, which prints every log entry as a dictionary.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(Path(args.output_dir).name)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or logs is None:
            return
        losses = {label: f"{logs[name]:.3f}" for name, label in LABELS.items() if name in logs}
        if losses:
            self.training_bar.set_postfix(losses)
        scores = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        if scores:
            values = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
            self.training_bar.write(f"{self.training_bar.desc}step {state.global_step}: {values}")


@dataclass(frozen=True)
class LoggedSample:
    """A generated answer for the tracker: its name there, an image, and a text."""

    name: str
    image: Image.Image
    text: str


class SampleLogger(TrainerCallback):
    """Logs generated samples after every evaluation to the tracker of ``report_to`` that is running.

    It uses the writers of transformers' own callbacks for TensorBoard, W&B and trackio, and starts none.

    Args:
        take_samples: returns the samples of the last evaluation once, and [] until the next one.
        callbacks: the callbacks of the trainer (``trainer.callback_handler.callbacks``).

    Raises:
        ValueError: none of the callbacks takes images.
    """

    def __init__(self, take_samples: Callable[[], Iterable[LoggedSample]], callbacks: Iterable[Any]):
        self.take_samples = take_samples
        writers = {
            TensorBoardCallback: _to_tensorboard,
            WandbCallback: _to_wandb,
            TrackioCallback: _to_trackio,
        }
        self.writers = [
            (callback, write) for callback in callbacks for kind, write in writers.items() if isinstance(callback, kind)
        ]
        if not self.writers:
            raise ValueError(
                f"no tracker takes images; set report_to to one of {', '.join(IMAGE_TRACKERS)}, or log no samples."
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not any(name.startswith("eval_") for name in logs or {}):
            return
        samples = list(self.take_samples())
        if state.is_world_process_zero:
            for callback, write in self.writers:
                for sample in samples:
                    write(callback, sample, state.global_step)


def _to_tensorboard(callback: TensorBoardCallback, sample: LoggedSample, step: int) -> None:
    callback.tb_writer.add_image(sample.name, np.asarray(sample.image.convert("RGB")), step, dataformats="HWC")
    callback.tb_writer.add_text(sample.name, sample.text, step)
    callback.tb_writer.flush()


def _to_wandb(callback: WandbCallback, sample: LoggedSample, step: int) -> None:
    image = callback._wandb.Image(sample.image, caption=sample.text)
    callback._wandb.log({sample.name: image, "train/global_step": step})


def _to_trackio(callback: TrackioCallback, sample: LoggedSample, step: int) -> None:
    image = callback._trackio.Image(sample.image, caption=sample.text)
    callback._trackio.log({sample.name: image, "train/global_step": step})
