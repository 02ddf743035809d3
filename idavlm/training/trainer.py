"""transformers' Trainer with two data sources, training stages and per-module learning rates."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import ProcessorMixin, ProgressCallback, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import is_peft_available, logging

from idavlm._compat import keep_4bit_layout, optimizer_state_may_lack_parameters, quantized_base_may_train
from idavlm.data import DualDataLoader, LengthGroupedSampler, PackingCollator, token_counts
from idavlm.models.attach import image_features_with_identities, save_id_former
from idavlm.models.packed_attention import packed_positions, packed_rows
from idavlm.modules import train_workflow, use_workflow
from idavlm.training.arguments import IDTrainingArguments
from idavlm.training.callbacks import SourceProgress
from idavlm.training.checkpoints import (
    begin_checkpoint,
    check_adapter_weights,
    check_checkpoint,
    check_same_options,
    check_same_run,
    check_saved_by_adapter,
    data_settings,
    group_options,
    last_complete_checkpoint,
    load_weights,
    read_run_state,
)
from idavlm.training.checks import (
    check_general_data,
    check_inherited,
    check_loader,
    check_mixing,
    check_packing,
    check_pretraining_batch,
    check_stage,
    check_trains,
    has_contrastive_loss,
)
from idavlm.training.distributed import check_engine, check_optimizer, set_wrap_classes
from idavlm.training.frozen_tower import use_image_features
from idavlm.training.lora import check_adapter, save_beside_adapter
from idavlm.training.losses import (
    LossAverages,
    LossCounts,
    count_losses,
    language_loss_by_source,
    sum_counts,
    token_sources,
    without_repeated,
)
from idavlm.training.non_finite import NonFiniteGuard, TrainingStep
from idavlm.training.throughput import Throughput
from idavlm.utils.parameter_groups import module_of, parameter_groups, require_module

logger = logging.get_logger(__name__)

TEXT_FIELDS = ("input_ids", "attention_mask", "labels", "token_identity_index", "name_mask")
"""Batch fields of the language model, which identity pretraining does not run."""

AUXILIARY_OUTPUTS = (
    "language_loss",
    "identity_map_loss",
    "contrastive_loss",
    "auxiliary_loss",
    "image_hidden_states",
    "identity_maps",
    "hidden_states",
    "attentions",
    "cache",
    "past_key_values",
)
"""Outputs of the model that are not predictions for ``compute_metrics``."""

MAX_STEPS_WITHOUT_BOXES = 10
"""Identity pretraining stops if this many steps at its start have no boxes."""


class IDTrainer(Trainer):
    """Trains on identity data and, optionally, on general data.

    The training loop, checkpoints, accelerate, DeepSpeed and PEFT are those of ``transformers.Trainer``; this class
    overrides its hooks only. A run that was killed and is resumed reads the batches that it would have read otherwise.

    The loss of a source is the mean cross-entropy over its labelled tokens in the global batch: all micro-batches of an
    optimizer step on all processes. What is minimised is the sum over the sources, times ``loss_weights``, plus the
    auxiliary loss of the model, which is a mean over the supervised scenes of the global batch, times the weight of
    "identity". The split of the global batch into micro-batches and over processes does not change it, except for the
    contrastive loss, which compares the identities of one micro-batch on all processes (``gather_references``). The
    losses of an evaluation are means over the whole data set.

    Log entries have ``loss_identity`` and ``loss_general``, the language loss of each source since the last entry
    without loss weights, ``identity_map_loss``, and samples, tokens and images per second. Any transformers model can
    be trained: where the outputs have no ``language_loss``, their ``loss`` is used, and taken as a mean over labelled
    tokens. Checkpoints of a model with an attached ID-Former also have the files of :func:`idavlm.save_id_former`.

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
        kwargs: further arguments of ``transformers.Trainer``, except ``model_init`` and ``compute_loss_func``.

    Raises:
        ValueError: the model lacks what ``args`` asks for, or an argument cannot take effect.
        NonFiniteLossError: in ``train``, if a loss or a gradient is NaN or infinite.
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
        check_inherited(model, args, kwargs)
        check_stage(model, args, general_dataset)
        check_mixing(args, train_dataset, general_dataset)
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
        self._train_losses, self._eval_losses = LossAverages(), LossAverages()
        self._step = TrainingStep()
        self._throughput = Throughput()
        self._non_finite = NonFiniteGuard(args.non_finite_loss, args.output_dir)
        self._steps_without_boxes = 0
        self._supervised_scenes = self._scenes_before = 0  # since the start of the run; when training was resumed
        self._has_trained = False
        self._settings: dict[str, Any] = {}
        freeze_modules(model, args)
        check_general_data(model, general_dataset)
        if data_collator is None:
            data_collator = getattr(processing_class, "collate", None)
        elif processing_class is None and isinstance(getattr(data_collator, "__self__", None), ProcessorMixin):
            processing_class = data_collator.__self__
        if task_evaluation is not None and kwargs.get("eval_dataset") is None:
            kwargs["eval_dataset"] = []  # the Trainer requires a data set if eval_strategy is set
        keep_4bit_layout(model)
        with quantized_base_may_train(model):
            super().__init__(model, args, data_collator, train_dataset, processing_class=processing_class, **kwargs)
        check_engine(args, self.accelerator)
        check_optimizer(self.optimizer, self.accelerator)
        set_wrap_classes(self.accelerator, model)
        self._gathers_references = args.gather_references and has_contrastive_loss(model)
        inner_model = _without_wrappers(self.accelerator, model)
        if args.packing:
            check_packing(inner_model, args, self.processing_class)
        if args.image_features is not None:
            evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
            datasets = [train_dataset, general_dataset, *(dataset for dataset in evaluated if dataset)]
            use_image_features(inner_model, self.processing_class, args, datasets)
        if args.non_finite_loss == "skip" and self.is_deepspeed_enabled:
            raise ValueError(
                "non_finite_loss='skip' has no effect with DeepSpeed, which updates the weights right after the "
                "backward pass; use 'stop'."
            )
        # compute_loss returns the share of a micro-batch in the loss of the global batch. With this, and with the
        # counts that get_batch_samples returns, the Trainer does not divide it by the number of micro-batches.
        self.model_accepts_loss_kwargs = True
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

    def _get_dataloader(self, *args, is_training: bool = False, **kwargs):
        """``Trainer._get_dataloader``; batches of training are packed if ``args.packing`` is set."""
        collator = self.data_collator
        if is_training and self.args.packing:
            tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
            self.data_collator = PackingCollator(
                collator, pad_token_id=tokenizer.pad_token_id, max_length=self.args.max_length
            )
        try:
            loader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = collator
        check_loader(loader)
        return loader

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        return LengthGroupedSampler(
            token_counts(dataset, self.args.length_column_name),
            batch_size=self.args.train_batch_size * self.args.gradient_accumulation_steps,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )

    def _get_eval_sampler(self, eval_dataset):
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(eval_dataset, "__len__"):
            return super()._get_eval_sampler(eval_dataset)
        return None if self.args.world_size > 1 else SequentialSampler(eval_dataset)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """``Trainer.train``; ``resume_from_checkpoint=True`` resumes from :func:`last_complete_checkpoint`.

        Resuming a finished run loads its checkpoint and trains nothing.

        Raises:
            ValueError: the checkpoint is not complete, it is from a run with other data or other options that determine
                the order of the data, or its weights do not fit the model.
            NonFiniteLossError: a loss or a gradient is NaN or infinite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        self._settings = data_settings(self.args, self.train_dataset, self.general_dataset)
        self._scenes_before = 0
        if _is_peft_model(self.model):
            check_saved_by_adapter(self.model)
            check_adapter(self.model)
        if resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint)
            if not self.args.ignore_data_skip:
                check_same_run(resume_from_checkpoint, self._settings)
            self._scenes_before = read_run_state(resume_from_checkpoint)["supervised_scenes"]
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if not self._has_trained:
            logger.warning(f"The run was finished (step {self.state.global_step}); nothing was trained.")
        return result

    def _inner_training_loop(self, *args, **kwargs):
        """The training loop. With ``auto_find_batch_size`` it may begin several times."""
        self._train_losses, self._throughput = LossAverages(), Throughput()
        self._non_finite = NonFiniteGuard(self.args.non_finite_loss, self.args.output_dir)
        self._supervised_scenes, self._steps_without_boxes = self._scenes_before, 0
        self._has_trained = False
        return super()._inner_training_loop(*args, **kwargs)

    def create_optimizer(self, model=None):
        """The optimizer of ``args.optim``, with one parameter group per learning rate and weight decay."""
        if self.optimizer is not None or not self.args.module_learning_rates:
            return super().create_optimizer(model)
        trained_model = self.model if model is None else model
        optimizer_class, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
            self.args, trained_model
        )
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

    # --- Loss of the global batch -----------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, and in place of the number of items the counts of the global batch."""
        self._throughput.start()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = count_losses(batches)
        for batch, count in zip(batches, counts, strict=True):
            batch["loss_counts"] = count
        total = sum_counts(counts, self.accelerator)
        self._step = TrainingStep(batches)
        self._throughput.add(batches)
        self._has_trained = True
        if batches:
            self._check_supervision(total)
        return batches, total

    def _get_num_items_in_batch(self, batch_samples, device):
        return None  # get_batch_samples counts tokens by source, and an evaluation needs no counts beforehand

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._step.random_states is None:  # not in get_batch_samples: a resumed run restores the states after it
            self._non_finite.begin(self._step, self.model)
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Of a step that is skipped, the Trainer's own sum must not become NaN.
        return torch.where(loss.isfinite(), loss, torch.zeros_like(loss))

    def _prepare_input(self, data):
        """Boxes keep their precision, which DeepSpeed would reduce to that of the model."""
        if not isinstance(data, Mapping) or data.get("boxes") is None:
            return super()._prepare_input(data)
        boxes = data["boxes"].to(self.args.device)
        return super()._prepare_input({**data, "boxes": None}) | {"boxes": boxes}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The share of a micro-batch in the loss of the global batch.

        Without ``num_items_in_batch``, the counts that :meth:`get_batch_samples` returns, the micro-batch is the whole
        batch.
        """
        batch = dict(inputs)
        counts = batch.pop("loss_counts", None) or count_losses([batch])[0]
        is_share = isinstance(num_items_in_batch, LossCounts)
        total = num_items_in_batch if is_share else counts
        sample_ids = batch.pop("sample_ids", [])
        if self.args.stage == "identity_pretraining":
            check_pretraining_batch(batch, sample_ids)
        sources, sample_source = batch.pop("source", "identity"), batch.pop("sample_source", None)
        if model.training and self._gathers_references and self.accelerator.num_processes > 1:
            batch["gather_references"] = True
        if self.args.stage == "identity_pretraining":
            losses, outputs = {}, self._identity_pretraining_outputs(model, batch)
        else:
            with self._workflow(model):
                losses, outputs = self._language_losses(model, batch, sources, sample_source, counts)
        weights, auxiliary_loss = self.args.loss_weights, outputs.get("auxiliary_loss")
        terms = [weights[source] * total.share_of_tokens(source, counts) * loss for source, loss in losses.items()]
        if auxiliary_loss is not None:
            # Only identity samples have boxes of identities with references.
            terms.append(weights["identity"] * total.share_of_scenes(counts) * auxiliary_loss)
        loss = sum(terms)
        if model.training:
            check_trains(loss, sample_ids)
        if is_share:
            # Data parallelism averages gradients over processes, but the shares of all processes are to be summed.
            loss = loss * self.accelerator.num_processes
        entries = [
            (f"loss_{source}", loss_of_source, counts.tokens[source]) for source, loss_of_source in losses.items()
        ]
        for name in ("identity_map_loss", "auxiliary_loss"):
            if outputs.get(name) is not None:
                entries.append((name, outputs[name], counts.scenes))
        if model.training:
            self._step.losses.append(loss.detach())
            self._step.entries += entries
            if self.is_deepspeed_enabled:  # it updates the weights right after the backward pass
                self._non_finite.is_finite(self._step, self.state.global_step + 1, None, self.accelerator)
        else:
            self._eval_losses.add(entries)
        return (loss, outputs) if return_outputs else loss

    def _identity_pretraining_outputs(self, model, batch: dict[str, Any]) -> Mapping[str, Any]:
        outputs = model(**{name: value for name, value in batch.items() if name not in TEXT_FIELDS})
        if outputs.get("auxiliary_loss") is None:
            raise ValueError("stage='identity_pretraining' needs 'auxiliary_loss', which the model did not return.")
        return outputs

    def _language_losses(
        self,
        model,
        batch: dict[str, Any],
        sources: str | list[str],
        sample_source: Tensor | None,
        counts: LossCounts,
    ) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        """The mean language loss of each source of a batch, and the outputs of the model."""
        if model.training and self.state.global_step < self.args.teacher_forcing_steps:
            batch["teacher_forcing"] = True
        distinct = {sources} if isinstance(sources, str) else set(sources)
        is_mixed = len(distinct) > 1 or "joint" in distinct
        if is_mixed and batch.get("labels") is None:
            raise ValueError("a batch of two sources needs 'labels', from which the loss of each source is computed.")
        if is_mixed or not any(counts.tokens.values()):  # the model's own mean over no tokens would be NaN
            labels = batch.pop("labels")  # without labels the model returns logits
            outputs = self._forward(model, batch)
            token_source = token_sources({**batch, "source": sources, "sample_source": sample_source}, labels)
            return language_loss_by_source(outputs["logits"], labels, token_source), outputs
        outputs = self._forward(model, batch)
        language_loss = outputs.get("language_loss")
        if language_loss is None:  # a model that does not return its losses separately
            language_loss, outputs = outputs.get("loss"), _without_auxiliary_loss(outputs)
        if language_loss is None:
            raise ValueError("the model returned neither 'language_loss' nor 'loss'; does the batch have 'labels'?")
        return {distinct.pop(): language_loss}, outputs

    def _forward(self, model, batch: dict[str, Any]) -> Mapping[str, Any]:
        """Run the model. A model of transformers gets the positions and the mask of packed rows from outside."""
        token_sample_index = batch.get("token_sample_index")
        if token_sample_index is None:
            return model(**batch)
        unwrapped = _without_wrappers(self.accelerator, model)
        if "token_sample_index" in inspect.signature(unwrapped.forward).parameters:
            return model(**batch)
        batch = {name: value for name, value in batch.items() if name != "token_sample_index"}
        batch["position_ids"] = packed_positions(unwrapped, token_sample_index, batch)
        with packed_rows(unwrapped, token_sample_index, batch) as of_rows:
            return model(**batch, **of_rows)

    def _check_supervision(self, total: LossCounts) -> None:
        """Check that the global batch of a step trains something."""
        step, is_pretraining = self.state.global_step, self.args.stage == "identity_pretraining"
        if not is_pretraining:
            if not any(total.tokens.values()) and not total.scenes:
                raise ValueError(
                    f"step {step + 1} has neither labelled tokens nor boxes, so it would train nothing; its records "
                    f"are {self._step.sample_ids()}."
                )
            return
        self._supervised_scenes += total.scenes
        self._steps_without_boxes += not total.scenes
        if not self._supervised_scenes and step + 1 >= MAX_STEPS_WITHOUT_BOXES:
            raise ValueError(
                f"stage='identity_pretraining' needs boxes, but the first {MAX_STEPS_WITHOUT_BOXES} steps have none; "
                "add 'boxes' of identities with references to the records of train_dataset."
            )

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """``Trainer.log``, with the mean of each loss since the last entry of the training loss."""
        if "loss" in logs:
            means = self._train_losses.compute(self.accelerator)
            means.pop("auxiliary_loss", None)
            logs.update({name: round(mean, 6) for name, mean in means.items()})
            counts = {"skipped_steps": self._non_finite.skipped, "steps_without_boxes": self._steps_without_boxes}
            logs.update({name: count for name, count in counts.items() if count})
            logs.update(self._throughput.compute(self.accelerator))
            self._train_losses = LossAverages()
            self._non_finite.skipped = self._steps_without_boxes = 0
        if not self._has_trained:  # a finished run that was resumed: the Trainer's mean over no steps is 0
            logs.pop("train_loss", None)
        super().log(logs, *args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self._throughput.stop()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # --- Losses that are not finite ---------------------------------------------------------------------------------

    def _get_grad_norm(self, model, grad_norm=None):
        """The gradient norm, which ends a step: None if the step is left out because it is not finite."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        uses_scaler = self.accelerator.scaler is not None  # it finds its scale by overflows of the gradient
        checked_norm = None if uses_scaler else grad_norm
        number = self.state.global_step + 1
        if self._non_finite.is_finite(self._step, number, checked_norm, self.accelerator):
            self._train_losses.add(self._step.entries)
            return grad_norm
        if not uses_scaler:  # a scaler leaves out the step itself, and needs the gradients for it
            model.zero_grad()
        return None

    # --- Checkpoints ------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            begin_checkpoint(folder, self.args, self._settings, supervised_scenes=self._supervised_scenes)
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """``Trainer.save_model``, with what the weights of the model alone do not describe."""
        super().save_model(output_dir, _internal_call)
        is_partitioned = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()  # then all processes gather
        if not (self.args.should_save or is_partitioned):
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        if _is_peft_model(self.model):
            save_beside_adapter(self.model, folder)
        elif any(image_features_with_identities(module) is not None for module in self.model.modules()):
            save_id_former(self.model, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Load weights by the names under which ``save_pretrained`` wrote them. All of them must be there."""
        model = self.model if model is None else model
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif _is_peft_model(model):
            check_adapter_weights(model, resume_from_checkpoint, loaded=False)
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            check_adapter_weights(model, resume_from_checkpoint, loaded=True)
        else:
            load_weights(self.accelerator.unwrap_model(model, keep_torch_compile=False), resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Load the states, which overwrite learning rates and weight decays. These must not have changed."""
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        options = group_options(self.optimizer)
        with optimizer_state_may_lack_parameters() if self.is_fsdp_enabled else nullcontext():
            super()._load_optimizer_and_scheduler(checkpoint)
        check_same_options(checkpoint, group_options(self.optimizer), options)

    def _load_best_model(self):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _run_epoch(self, *args, **kwargs):
        """Train for an epoch, unless the run was finished when it was resumed."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)
        if self.args.stage == "identity_pretraining" and not self._supervised_scenes:
            raise ValueError(
                f"stage='identity_pretraining' needs boxes, but the {self.state.global_step} steps until now have "
                "none; add 'boxes' of identities with references to the records of train_dataset."
            )

    # --- Evaluation -------------------------------------------------------------------------------------------------

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

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """``Trainer.evaluation_loop``, with losses that are means over the whole data set."""
        self._eval_losses = LossAverages()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._eval_losses.compute(self.accelerator)
        weights = {"loss_identity": "identity", "loss_general": "general", "auxiliary_loss": "identity"}
        if means:
            loss = sum(self.args.loss_weights[source] * means.get(name, 0.0) for name, source in weights.items())
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        else:  # nothing has a label
            output.metrics.pop(f"{metric_key_prefix}_loss", None)
        means.pop("auxiliary_loss", None)
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """``Trainer.prediction_step``; the predictions are the logits."""
        ignore_keys = [*(ignore_keys or ()), *AUXILIARY_OUTPUTS]
        inputs = without_repeated(inputs, self.accelerator)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _workflow(self, model: nn.Module) -> AbstractContextManager:
        return nullcontext() if self.args.workflow is None else use_workflow(model, self.args.workflow)


def _without_wrappers(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model inside the wrappers of accelerate and PEFT."""
    model = accelerator.unwrap_model(model)
    return model.get_base_model() if _is_peft_model(model) else model


def _is_peft_model(model: nn.Module) -> bool:
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def _without_auxiliary_loss(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs of a model whose ``loss`` has its auxiliary loss in it."""
    return {name: value for name, value in outputs.items() if name != "auxiliary_loss"}


def freeze_modules(model: nn.Module, args: IDTrainingArguments) -> None:
    """Freeze the modules of ``args.freeze`` and the inner adaptors of all workflows but ``args.workflow``."""
    if args.workflow is not None:
        train_workflow(model, args.workflow)
    for module in args.freeze:
        require_module(model, "freeze", module)
    for name, parameter in model.named_parameters():
        if module_of(name) in args.freeze:
            parameter.requires_grad_(False)
