"""transformers' Trainer with two sources of data and learning rates per module."""

import json
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import ProgressCallback, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from idavlm.data import DualDataLoader
from idavlm.data.schema import SOURCES
from idavlm.experimental.muon import MuonAdamW, linear_weights
from idavlm.training.arguments import MODULES, IDTrainingArguments
from idavlm.training.callbacks import SourceProgress
from idavlm.utils import IGNORE_INDEX

TEXT = ("input_ids", "attention_mask", "labels", "token_identity_index", "name_mask")


class IDTrainer(Trainer):
    """Trains on identity data and, where given, general data.

    Hooks of ``transformers.Trainer`` only: the loop, checkpoints, accelerate, DeepSpeed and PEFT are its own. Log
    entries have ``loss_identity``, ``loss_general`` (language loss of each source since the last entry, unweighted) and
    ``identity_map_loss``. A run that was killed and is resumed goes on with the very batches it would have seen.

    Args:
        model: an :class:`idavlm.IDAVLMForConditionalGeneration` or a model with modules of its names.
        args: arguments.
        train_dataset: identity samples, encoded.
        general_dataset: general samples, encoded.
        task_evaluation: called with the model at every evaluation; gives numbers by name, logged as ``eval_<name>``.
        kwargs: further arguments of ``Trainer``; ``data_collator`` is the processor's ``collate``.
    """

    def __init__(
        self,
        model: nn.Module,
        args: IDTrainingArguments,
        *,
        train_dataset: Dataset | None = None,
        general_dataset: Dataset | None = None,
        task_evaluation: Callable[[nn.Module], dict[str, float]] | None = None,
        **kwargs,
    ):
        self.general_dataset = general_dataset
        self.task_evaluation = task_evaluation
        self._evaluating = False
        self._sums: dict[str, Tensor | float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process would cut a batch between a row and its images; start one process a "
                "GPU with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES."
            )
        slots = getattr(getattr(model, "id_former", None), "identity_embedding", None)
        if args.teacher_forcing_steps and slots is None and not getattr(model.config, "names_as_marks", False):
            raise ValueError(
                f"teacher_forcing_steps={args.teacher_forcing_steps} needs an ID-Former with max_identities, or "
                "names_as_marks, which mark image tokens; leave it 0."
            )
        if args.workflow is not None:
            model.train_workflow(args.workflow)
        for name in args.freeze:
            _module(model, "freeze", name)
        for name, parameter in model.named_parameters():
            if _module_of(name) in args.freeze:
                parameter.requires_grad_(False)
        if task_evaluation is not None and kwargs.get("eval_dataset") is None:
            kwargs["eval_dataset"] = []  # the Trainer wants one wherever it is to evaluate
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        # Losses are means of their batch, weighted by source: accumulated batches count alike.
        self.model_accepts_loss_kwargs = False
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(SourceProgress())

    def get_train_dataloader(self):
        """A loader of identity data, or of both."""
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
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As ``Trainer.train``; ``True`` takes the newest checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of a batch, weighted by its source."""
        inputs = dict(inputs)
        sources = inputs.pop("source", None)
        sample_source = inputs.pop("sample_source", None)
        source = _one_source(sources)
        if self.args.workflow is not None:
            inputs["workflow"] = self.args.workflow
        if model.training and source == "identity" and self.state.global_step < self.args.identity_warmup_steps:
            return self._identity_loss(model, inputs, return_outputs)
        if model.training and self.state.global_step < self.args.teacher_forcing_steps:
            inputs["teacher_forcing"] = True
        labels = None if source is not None else inputs.pop("labels")  # mixed: its losses are made here, from logits
        outputs = model(**inputs)
        if source is not None:
            losses = {source: outputs["language_loss"]}
        else:
            if sample_source is None:  # one data set with samples of both sources
                sample_source = torch.tensor([SOURCES.index(name) for name in sources])
            sample_source = sample_source.to(outputs["logits"].device)
            losses = language_loss_by_source(outputs["logits"], labels, sample_source)
        loss = sum(self.args.loss_weights[name] * value for name, value in losses.items())
        if outputs.get("auxiliary_loss") is not None:
            # Only identity samples have boxes of known persons.
            loss = loss + self.args.loss_weights["identity"] * outputs["auxiliary_loss"]
        if model.training:
            for name, value in losses.items():
                self._note(f"loss_{name}", value)
            if outputs.get("identity_map_loss") is not None and "identity" in losses:
                self._note("identity_map_loss", outputs["identity_map_loss"])
        return (loss, outputs) if return_outputs else loss

    def _identity_loss(self, model, inputs, return_outputs: bool):
        """What the boxes of a batch teach, without its text."""
        outputs = model(**{name: value for name, value in inputs.items() if name not in TEXT})
        if outputs.get("auxiliary_loss") is None:
            raise ValueError(
                f"identity_warmup_steps={self.args.identity_warmup_steps} needs a model with an ID-Former, and boxes."
            )
        self._note("identity_map_loss", outputs["identity_map_loss"])
        loss = self.args.loss_weights["identity"] * outputs["auxiliary_loss"]
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._counts:
            for name in ("loss_identity", "loss_general", "identity_map_loss"):
                count = self._counts.pop(name, 0)
                if count:
                    mean = self.accelerator.reduce(self._sums.pop(name) / count, reduction="mean")
                    logs[name] = round(mean.item(), 6)
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Losses on ``eval_dataset`` and the numbers of ``task_evaluation``."""
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics = {}
        outermost, self._evaluating = not self._evaluating, True  # several data sets are evaluated one by one
        try:
            if given is not None and (not hasattr(given, "__len__") or len(given)):
                metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._evaluating = not outermost
        if self.task_evaluation is not None and outermost:
            was_training = self.model.training
            self.model.eval()
            model = self.accelerator.unwrap_model(self.model)
            with nullcontext() if self.args.workflow is None else model.workflow(self.args.workflow):
                scores = self.task_evaluation(model)
            self.model.train(was_training)
            scores = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
            self.log(dict(scores))
            if not metrics:
                self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, scores)
            metrics.update(scores)
        return metrics

    def create_optimizer(self, model=None):
        """One group per learning rate, with and without weight decay, by Muon or not."""
        rates, by_muon = self.args.module_learning_rates, self.args.muon_modules
        if self.optimizer is not None or not (rates or by_muon):
            return super().create_optimizer(model) if model is not None else super().create_optimizer()
        trained = self.model if model is None else model
        for name in rates:
            _module(trained, "module_learning_rates", name)
        matrices = linear_weights(trained, [_module(trained, "muon_modules", name) for name in by_muon])
        decayed = set(self.get_decay_parameter_names(trained))
        groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                rate = rates.get(_module_of(name), self.args.learning_rate)
                muon = id(parameter) in matrices and _module_of(name) in by_muon
                groups[rate, name in decayed, muon].append(parameter)
        optimizer_cls, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
        if not isinstance(optimizer_cls, type) or {"params", "model", "optimizer_dict"} & options.keys():
            raise ValueError(
                f"optim={self.args.optim!r} groups the parameters itself; it does not go with module_learning_rates. "
                "Use an optimiser such as adamw_torch."
            )
        parts = [
            {"params": parameters, "lr": rate, "weight_decay": self.args.weight_decay if decay else 0.0}
            | ({"muon": muon} if by_muon else {})
            for (rate, decay, muon), parameters in groups.items()
        ]
        self.optimizer = MuonAdamW(parts, **options) if by_muon else optimizer_cls(parts, **options)
        return self.optimizer

    def _note(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value.detach()
        self._counts[name] += 1


def language_loss_by_source(logits: Tensor, labels: Tensor, sample_source: Tensor) -> dict[str, Tensor]:
    """Mean next-token cross-entropy of each source of a batch that mixes them.

    Args:
        logits: ``[B, T, vocabulary]``.
        labels: ``[B, T]``, -100 where nothing counts.
        sample_source: ``[B]``, 0 identity, 1 general.
    """
    targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    loss = F.cross_entropy(
        logits.float().transpose(1, 2), targets.to(logits.device), ignore_index=IGNORE_INDEX, reduction="none"
    )
    counted = targets.to(loss.device) != IGNORE_INDEX
    means = {}
    for number, name in enumerate(SOURCES):
        rows = sample_source == number
        if rows.any():
            means[name] = loss[rows].sum() / counted[rows].sum().clamp(min=1)
    return means


def last_complete_checkpoint(output_dir: str | Path) -> str:
    """The newest checkpoint whose state, written last, is whole: a killed run may leave a broken one behind.

    Raises:
        ValueError: there is none.
    """
    found = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            json.loads((folder / "trainer_state.json").read_text())
            found[int(folder.name.rsplit("-", 1)[1])] = folder
        except (OSError, ValueError):
            continue
    if not found:
        raise ValueError(f"output_dir={str(output_dir)!r} holds no complete checkpoint to resume from.")
    return str(found[max(found)])


def _one_source(sources: str | list[str] | None) -> str | None:
    """The source of a batch, None where it is mixed; a batch that does not say is identity data."""
    if sources is None:
        return "identity"
    if isinstance(sources, str):
        return None if sources == "joint" else sources
    return sources[0] if len(set(sources)) == 1 else None


def _module_of(parameter: str) -> str | None:
    """The innermost module of our names that a parameter lies in."""
    return next((part for part in reversed(parameter.split(".")) if part in MODULES), None)


def _module(model: nn.Module, argument: str, name: str) -> nn.Module:
    found = [module for path, module in model.named_modules() if path.rsplit(".", 1)[-1] == name]
    if not found:
        raise ValueError(f"{argument} names {name!r}, which {type(model).__name__} does not have.")
    return found[0]
