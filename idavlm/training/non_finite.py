"""Losses and gradients that are not finite are found before the optimizer uses them, and saved to be computed again."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

MAX_SKIPPED_STEPS = 10
"""Training stops if this many steps in a row have a loss or a gradient that is not finite."""


class NonFiniteLossError(RuntimeError):
    """A loss or a gradient is NaN or infinite. Training stops before the optimizer uses it.

    Attributes:
        step: the global step, counted from 1.
        sample_ids: ids of the records of the micro-batches whose loss is not finite; of all micro-batches of the step
            if only the gradient is not finite. Empty if the data set has no ids.
        path: folder with the micro-batches of this process, see :func:`save_step`.
    """

    def __init__(self, message: str, *, step: int, sample_ids: list[str], path: Path) -> None:
        super().__init__(message)
        self.step = step
        self.sample_ids = sample_ids
        self.path = path


@dataclass
class TrainingStep:
    """The micro-batches of an optimizer step on this process, and what they returned.

    Attributes:
        batches: the micro-batches.
        random_states: states of torch's random generators before the first micro-batch.
        losses: loss of each micro-batch.
        entries: name, mean and weight of the losses to log.
    """

    batches: Sequence[Mapping[str, Any]] = ()
    random_states: dict[str, Tensor] | None = None
    losses: list[Tensor] = field(default_factory=list)
    entries: list[tuple[str, Tensor, float]] = field(default_factory=list)

    def sample_ids(self, numbers: Sequence[int] | None = None) -> list[str]:
        """Ids of the records of some micro-batches, or of all."""
        batches = self.batches if numbers is None else [self.batches[number] for number in numbers]
        return [str(sample_id) for batch in batches for sample_id in batch.get("sample_ids", ())]


class NonFiniteGuard:
    """Stops training at the first step whose losses or gradient are not finite, or leaves out such steps.

    The model is then as before the step, with the statistics of its batch norms.

    Args:
        action: ``"stop"`` or ``"skip"``, see :class:`IDTrainingArguments`.
        output_dir: folder in which steps are saved.

    Attributes:
        skipped: number of steps left out since it was last reset.
    """

    def __init__(self, action: str, output_dir: str | Path) -> None:
        self.action = action
        self.output_dir = Path(output_dir)
        self.skipped = self._in_a_row = 0
        self._buffers: list[Tensor] | None = None
        self._kept: list[Tensor] = []

    def begin(self, step: TrainingStep, model: nn.Module) -> None:
        """Keep what the first micro-batch of a step will change: random states, and the buffers of the model."""
        step.random_states = random_states()
        if self._buffers is None:
            self._buffers = [
                buffer
                for module in model.modules()
                for name, buffer in module.named_buffers(recurse=False)
                if name not in module._non_persistent_buffers_set
            ]
            self._kept = [torch.empty_like(buffer) for buffer in self._buffers]
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    def is_finite(self, step: TrainingStep, number: int, grad_norm: Any, accelerator: Accelerator) -> bool:
        """Whether the losses and the gradient of a step are finite on all processes. This waits for the device once.

        Args:
            step: the step.
            number: the global step, counted from 1.
            grad_norm: norm of the gradient; None if it is not known, or need not be finite.
            accelerator: of the trainer.

        Raises:
            NonFiniteLossError: on all processes, if they are not finite and the step is not to be left out.
        """
        values = list(step.losses)
        if grad_norm is not None:
            grad_norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
            values.append(torch.as_tensor(grad_norm))
        finite = torch.stack([value.float().to(accelerator.device) for value in values]).isfinite().all()
        if accelerator.num_processes > 1:
            finite = accelerator.reduce((~finite).float(), reduction="sum") == 0
        if finite:
            self._in_a_row = 0
            return True
        for buffer, kept in zip(self._buffers or (), self._kept, strict=True):
            buffer.copy_(kept)
        self.skipped += 1
        self._in_a_row += 1
        if self.action == "stop" or self._in_a_row >= MAX_SKIPPED_STEPS:
            self._stop(step, number, accelerator)
        logger.warning(f"step {number} is left out: its loss or gradient is not finite.")
        return False

    def _stop(self, step: TrainingStep, number: int, accelerator: Accelerator) -> None:
        losses = [loss.item() for loss in step.losses]
        affected = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
        folder = self.output_dir / f"non_finite_step-{number}" / f"process-{accelerator.process_index}"
        save_step(folder, step, {"step": number, "losses": [str(loss) for loss in losses]})
        found = [(bool(affected), step.sample_ids(affected or None))]
        if accelerator.num_processes > 1:  # the processes with such losses, or else all
            found = gather_object(found)
        groups = [ids for is_affected, ids in found if is_affected] or [ids for _, ids in found]
        sample_ids = [sample_id for ids in groups for sample_id in ids]
        what = "the loss" if any(is_affected for is_affected, _ in found) else "the gradient"
        in_a_row = f", for the {self._in_a_row}th time in a row" if self._in_a_row > 1 else ""
        raise NonFiniteLossError(
            f"{what} of step {number} is NaN or infinite{in_a_row}. Records of the batch: "
            f"{', '.join(sample_ids) or 'unknown, because the data set has no ids'}. The model is as before the "
            f"step. The batch is saved in {folder}. Check these records and the learning rate, or set "
            "non_finite_loss='skip' to leave out such steps.",
            step=number,
            sample_ids=sample_ids,
            path=folder,
        )


def random_states() -> dict[str, Tensor]:
    """States of torch's random generators on the CPU and on the current GPU."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def save_step(folder: Path, step: TrainingStep, facts: Mapping[str, Any]) -> None:
    """Save the micro-batches of a step, so that their losses can be computed again.

    ``batch_<number>.safetensors`` has the tensors of a micro-batch, ``rng_state.safetensors`` the states of torch's
    generators before the first one, and ``step.json`` the ``facts`` and the other fields of the batches.
    """
    folder.mkdir(parents=True, exist_ok=True)
    others = []
    for number, batch in enumerate(step.batches):
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
        save_file(tensors, folder / f"batch_{number}.safetensors")
        others.append({name: value for name, value in batch.items() if isinstance(value, (str, list, int, float))})
    save_file(step.random_states or random_states(), folder / "rng_state.safetensors")
    (folder / "step.json").write_text(json.dumps({**facts, "batches": others}, indent=1, default=str) + "\n")
