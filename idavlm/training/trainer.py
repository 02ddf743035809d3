"""transformers' Trainer with two data sources, training stages and per-module learning rates."""

import json
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import ProcessorMixin, ProgressCallback, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from idavlm.data import DualDataLoader
from idavlm.data.schema import SOURCES
from idavlm.modules import train_workflow, use_workflow
from idavlm.training.arguments import IDTrainingArguments
from idavlm.training.callbacks import SourceProgress
from idavlm.utils import IGNORE_INDEX
from idavlm.utils.parameter_groups import module_of, parameter_groups, require_module

TEXT_FIELDS = ("input_ids", "attention_mask", "labels", "token_identity_index", "name_mask")
"""Batch fields of the language model, which identity pretraining does not run."""

MAX_BATCHES_WITHOUT_BOXES = 10
"""Identity pretraining stops if this many batches at its start have no boxes."""


class IDTrainer(Trainer):
    """Trains on identity data and, optionally, on general data.

    The training loop, checkpoints, accelerate, DeepSpeed and PEFT are those of ``transformers.Trainer``; this class
    overrides its hooks only. A run that was killed and is resumed reads the batches that it would have read otherwise.

    Log entries have ``loss_identity`` and ``loss_general``, the mean language loss of each source since the last entry
    without loss weights, and ``identity_map_loss``. Any transformers model can be trained: where the outputs have no
    ``language_loss``, their ``loss`` is used.

    Args:
        model: an :class:`idavlm.IDAVLMForConditionalGeneration` or any other transformers model.
        args: training arguments.
        train_dataset: encoded identity samples.
        general_dataset: encoded general samples.
        data_collator: makes a batch of encoded samples; ``processing_class.collate`` by default.
        processing_class: the processor. It is saved in every checkpoint and by ``save_model``, so that these can be
            loaded for evaluation. It need not be passed if ``data_collator`` is a processor's ``collate``.
        task_evaluation: function of the model that returns scores by name. It is called at every evaluation; the
            scores are logged as ``eval_<name>``.
        kwargs: further arguments of ``transformers.Trainer``.

    Raises:
        ValueError: the model lacks what ``args`` asks for, or an argument cannot take effect.
    """

    def __init__(
        self,
        model: nn.Module,
        args: IDTrainingArguments,
        *,
        train_dataset: Dataset | None = None,
        general_dataset: Dataset | None = None,
        data_collator: Callable[[list], dict[str, Any]] | None = None,
        processing_class=None,
        task_evaluation: Callable[[nn.Module], dict[str, float]] | None = None,
        **kwargs,
    ):
        _check_stage(model, args, general_dataset)
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process would split a batch between a sample and its images. Start one "
                "process per GPU with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
        if args.module_learning_rates and kwargs.get("optimizers", (None, None))[0] is not None:
            raise ValueError(
                "module_learning_rates has no effect on an optimizer that is passed; set the rates of its groups."
            )
        self.general_dataset = general_dataset
        self.task_evaluation = task_evaluation
        self._is_evaluating = False
        self._losses: dict[str, list[Tensor]] = defaultdict(list)
        self._pretraining_batches = self._pretraining_boxes = 0
        _freeze(model, args)
        if data_collator is None:
            data_collator = getattr(processing_class, "collate", None)
        elif processing_class is None and isinstance(getattr(data_collator, "__self__", None), ProcessorMixin):
            processing_class = data_collator.__self__
        if task_evaluation is not None and kwargs.get("eval_dataset") is None:
            kwargs["eval_dataset"] = []  # the Trainer requires a data set if eval_strategy is set
        super().__init__(model, args, data_collator, train_dataset, processing_class=processing_class, **kwargs)
        # compute_loss returns the mean of a batch, weighted by source, so accumulated batches have equal weight.
        self.model_accepts_loss_kwargs = False
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(SourceProgress())

    def get_train_dataloader(self):
        """The loader of the identity data, or of identity and general data."""
        identity_loader = super().get_train_dataloader()
        if self.general_dataset is None:
            return identity_loader
        identity_dataset, self.train_dataset = self.train_dataset, self.general_dataset
        try:
            general_loader = super().get_train_dataloader()
        finally:
            self.train_dataset = identity_dataset
        return DualDataLoader(
            identity_loader,
            general_loader,
            mixing_ratio=self.args.mixing_ratio,
            mode=self.args.mixing_mode,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """``Trainer.train``; ``resume_from_checkpoint=True`` resumes from :func:`last_complete_checkpoint`."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def create_optimizer(self, model=None):
        """The optimizer of ``args.optim``, with one parameter group per learning rate and weight decay."""
        if self.optimizer is not None or not self.args.module_learning_rates:
            return super().create_optimizer(model)
        trained_model = self.model if model is None else model
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, trained_model)
        if not isinstance(optimizer_class, type) or {"params", "model", "optimizer_dict"} & options.keys():
            raise ValueError(
                f"optim={self.args.optim!r} makes its own parameter groups and cannot be combined with "
                "module_learning_rates; use an optimizer such as 'adamw_torch'."
            )
        groups = parameter_groups(
            trained_model,
            learning_rate=self.args.learning_rate,
            module_learning_rates=self.args.module_learning_rates,
            weight_decay=self.args.weight_decay,
            decayed=self.get_decay_parameter_names(trained_model),
        )
        self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch in the current stage, weighted by source."""
        batch = dict(inputs)
        sources, sample_source = batch.pop("source", "identity"), batch.pop("sample_source", None)
        if self.args.stage == "identity_pretraining":
            loss, outputs = self._identity_pretraining_loss(model, batch)
        else:
            with self._workflow(model):
                loss, outputs = self._instruction_tuning_loss(model, batch, sources, sample_source)
        return (loss, outputs) if return_outputs else loss

    def _identity_pretraining_loss(self, model, batch: dict[str, Any]) -> tuple[Tensor, dict]:
        """The losses of the identity attention."""
        if batch.get("boxes") is None:
            raise ValueError("stage='identity_pretraining' needs boxes, but the batch has no field 'boxes'.")
        if model.training:
            self._pretraining_batches += 1
            self._pretraining_boxes += len(batch["boxes"])
            if not self._pretraining_boxes and self._pretraining_batches >= MAX_BATCHES_WITHOUT_BOXES:
                raise ValueError(
                    f"stage='identity_pretraining' needs boxes, but the first {MAX_BATCHES_WITHOUT_BOXES} batches have "
                    "none; add 'boxes' to the records of train_dataset."
                )
        outputs = model(**{name: value for name, value in batch.items() if name not in TEXT_FIELDS})
        if outputs.get("auxiliary_loss") is None:
            raise ValueError("stage='identity_pretraining' needs 'auxiliary_loss', which the model did not return.")
        if model.training:
            self._losses["identity_map_loss"].append(outputs["identity_map_loss"].detach())
        return self.args.loss_weights["identity"] * outputs["auxiliary_loss"], outputs

    def _instruction_tuning_loss(
        self, model, batch: dict[str, Any], sources: str | list[str], sample_source: Tensor | None
    ) -> tuple[Tensor, dict]:
        """The language loss of each source, and the losses of the identity attention where the batch has boxes."""
        if model.training and self.state.global_step < self.args.teacher_forcing_steps:
            batch["teacher_forcing"] = True
        distinct = {sources} if isinstance(sources, str) else set(sources)
        if len(distinct) > 1 or "joint" in distinct:
            labels = batch.pop("labels")  # without labels the model returns logits
            outputs = model(**batch)
            if sample_source is None:
                sample_source = torch.tensor([SOURCES.index(name) for name in sources])
            losses = language_loss_by_source(outputs["logits"], labels, sample_source.to(outputs["logits"].device))
            auxiliary_loss = outputs.get("auxiliary_loss")
        else:
            outputs = model(**batch)
            auxiliary_loss, language_loss = outputs.get("auxiliary_loss"), outputs.get("language_loss")
            if language_loss is None:  # a model that does not return its losses separately
                auxiliary_loss, language_loss = None, outputs.get("loss")
            if language_loss is None:
                raise ValueError("the model returned neither 'language_loss' nor 'loss'; does the batch have 'labels'?")
            losses = {distinct.pop(): language_loss}
        loss = sum(self.args.loss_weights[name] * value for name, value in losses.items())
        if auxiliary_loss is not None:
            # Only identity samples have boxes of identities with references.
            loss = loss + self.args.loss_weights["identity"] * auxiliary_loss
        if model.training:
            for name, value in losses.items():
                self._losses[f"loss_{name}"].append(value.detach())
            if "identity" in losses and outputs.get("identity_map_loss") is not None:
                self._losses["identity_map_loss"].append(outputs["identity_map_loss"].detach())
        return loss, outputs

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """``Trainer.log``, with the mean of each recorded loss since the last entry of the training loss."""
        if "loss" in logs:
            for name in ("loss_identity", "loss_general", "identity_map_loss"):
                losses = self._losses.pop(name, None)
                if losses:
                    mean = self.accelerator.reduce(sum(losses) / len(losses), reduction="mean")
                    logs[name] = round(mean.item(), 6)
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Losses on ``eval_dataset``, and the scores of ``task_evaluation``."""
        if self._is_evaluating:  # Trainer.evaluate calls itself for each of several data sets
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics = {}
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is not None and (not hasattr(dataset, "__len__") or len(dataset)):
            self._is_evaluating = True
            try:
                metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            finally:
                self._is_evaluating = False
        if self.task_evaluation is None:
            return metrics
        was_training = self.model.training
        self.model.eval()
        model = self.accelerator.unwrap_model(self.model)
        with self._workflow(model):
            scores = self.task_evaluation(model)
        self.model.train(was_training)
        scores = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(dict(scores))
        if not metrics:
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, scores)
        return metrics | scores

    def _workflow(self, model: nn.Module) -> AbstractContextManager:
        return nullcontext() if self.args.workflow is None else use_workflow(model, self.args.workflow)


def language_loss_by_source(logits: Tensor, labels: Tensor, sample_source: Tensor) -> dict[str, Tensor]:
    """Mean next-token cross-entropy of each source in a batch that mixes them.

    Args:
        logits: ``[B, T, vocabulary]``.
        labels: ``[B, T]``, -100 at tokens that have no loss.
        sample_source: ``[B]``, 0 for identity samples and 1 for general samples.

    Returns:
        The loss of each source that the batch has samples of.
    """
    targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].to(logits.device)
    loss = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
    is_labelled = targets != IGNORE_INDEX
    losses = {}
    for index, source in enumerate(SOURCES):
        rows = sample_source == index
        if rows.any():
            losses[source] = loss[rows].sum() / is_labelled[rows].sum().clamp(min=1)
    return losses


def last_complete_checkpoint(output_dir: str | Path) -> str:
    """The newest checkpoint in ``output_dir`` that was written completely.

    A run that is killed while it writes a checkpoint leaves an incomplete checkpoint. The Trainer writes
    ``trainer_state.json`` last, so a checkpoint is complete if that file can be read.

    Raises:
        ValueError: there is no complete checkpoint.
    """
    complete = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            json.loads((folder / "trainer_state.json").read_text())
            complete[int(folder.name.rsplit("-", 1)[1])] = folder
        except (OSError, ValueError):
            continue
    if not complete:
        raise ValueError(f"output_dir={str(output_dir)!r} holds no complete checkpoint to resume from.")
    return str(complete[max(complete)])


def _check_stage(model: nn.Module, args: IDTrainingArguments, general_dataset: Dataset | None) -> None:
    """Check that model and data have what the stage needs."""
    named = model.named_modules()
    id_former = next((module for path, module in named if path.rpartition(".")[-1] == "id_former"), None)
    if args.stage == "identity_pretraining":
        if id_former is None:
            raise ValueError(
                f"stage='identity_pretraining' trains an ID-Former, which {type(model).__name__} does not have."
            )
        if general_dataset is not None:
            raise ValueError(
                "general_dataset has no effect with stage='identity_pretraining', which trains on boxes of identities; "
                "leave it out."
            )
    if args.teacher_forcing_steps and getattr(id_former, "identity_embedding_type", None) is None:
        raise ValueError(
            f"teacher_forcing_steps={args.teacher_forcing_steps} needs an ID-Former with identity_embedding, which "
            f"{type(model).__name__} does not have; set it to 0."
        )


def _freeze(model: nn.Module, args: IDTrainingArguments) -> None:
    """Freeze the modules of ``args.freeze`` and the inner adaptors of all workflows but ``args.workflow``."""
    if args.workflow is not None:
        train_workflow(model, args.workflow)
    for module in args.freeze:
        require_module(model, "freeze", module)
    for name, parameter in model.named_parameters():
        if module_of(name) in args.freeze:
            parameter.requires_grad_(False)
