"""Training arguments: those of transformers and those of identity-aware training."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from idavlm.data.mixing import check_mixing_options
from idavlm.data.schema import SOURCES
from idavlm.utils import check_choice, check_positive
from idavlm.utils.parameter_groups import MODULES

STAGES = ("instruction_tuning", "identity_pretraining")
ON_NON_FINITE_LOSS = ("stop", "skip")


@dataclass
class IDTrainingArguments(TrainingArguments):
    """``transformers.TrainingArguments`` with the arguments of identity-aware training.

    Modules are named ``"vision_tower"``, ``"connector"``, ``"id_former"``, ``"inner_adaptor"``,
    ``"image_index_embedding"`` and ``"language_model"``. A parameter belongs to the innermost of these modules. All
    parameters of inner adaptors belong to ``"inner_adaptor"``, including the modules that a workflow copies.

    Attributes:
        stage: ``"instruction_tuning"`` trains on the text of the batches, and on their boxes where they have any.
            ``"identity_pretraining"`` trains the vision tower and the identity attention of the ID-Former from boxes;
            the language model is not run. Use it first when a model is trained from scratch.
        mixing_ratio: share of general batches, see :class:`idavlm.DualDataLoader`.
        mixing_mode: ``"extra"``, ``"interleave"`` or ``"joint"``, see :class:`idavlm.DualDataLoader`.
        loss_weights: factor of the loss of each source. The default is ``{"identity": 1.0, "general": 1.0}``. The
            weights scale the gradients, not the logged losses of the sources.
        module_learning_rates: learning rates of single modules, e.g. ``{"vision_tower": 1e-5}``. All other modules
            are trained with ``learning_rate``.
        freeze: modules that are not trained.
        workflow: the inner-adaptor workflow that is trained and evaluated; the adaptors of all other workflows are
            frozen. ``"text"`` runs the language model without inner adaptors and trains the modules before it.
        teacher_forcing_steps: number of steps at the start of training in which image tokens get the identity
            embeddings of the ground-truth boxes instead of those that the identity attention predicts. It needs an
            ID-Former with ``identity_embedding``.
        packing: put the samples of a training batch into a few rows without padding between them, see
            :class:`idavlm.data.PackingCollator`. Losses and gradients stay the same.
        max_length: largest number of tokens of a packed row; by default all samples of a batch are in one row, which
            is what flash attention needs. With other attention set it to the length of a few samples.
        image_features: folder for the features of a frozen vision tower. They are written at the first use and read in
            place of images, see :class:`idavlm.models.ImageFeatures`.
        gather_references: compute the contrastive loss over the references of all processes, as CLIP compares with the
            texts of all processes. Then two processes with one batch each have the loss of one process with both. False
            saves communication and memory; each process then compares with the references of its own batch.
        non_finite_loss: what happens if a loss or a gradient is NaN or infinite. ``"stop"`` raises
            :class:`NonFiniteLossError` before the optimizer uses it. ``"skip"`` leaves out the step, logs the number of
            steps left out since the last entry as ``skipped_steps``, and stops after ten in a row.

    Some arguments of ``TrainingArguments`` would have no effect on the losses and batches of :class:`IDTrainer`, or a
    wrong one. They raise an error: ``label_smoothing_factor``, ``use_liger_kernel``,
    ``average_tokens_across_devices=False``, ``logging_nan_inf_filter=True``, ``label_names``,
    ``remove_unused_columns=True``, ``accelerator_config={"dispatch_batches": True}``, and context or sequence
    parallelism.

    Raises:
        ValueError: an argument is out of range, or contradicts another one.
    """

    # transformers parses these from JSON on the command line.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "loss_weights", "module_learning_rates"]  # noqa: RUF012

    stage: str = field(default="instruction_tuning", metadata={"help": "What is trained.", "choices": list(STAGES)})
    mixing_ratio: float = field(default=0.1, metadata={"help": "Share of general batches."})
    mixing_mode: str = field(
        default="extra", metadata={"help": "How general batches are mixed in: extra, interleave or joint."}
    )
    loss_weights: dict | str | None = field(
        default=None, metadata={"help": 'Loss factor of each source as JSON, e.g. {"identity": 1, "general": 1}.'}
    )
    module_learning_rates: dict | str | None = field(
        default=None, metadata={"help": 'Learning rates of single modules as JSON, e.g. {"vision_tower": 1e-5}.'}
    )
    freeze: list[str] = field(default_factory=list, metadata={"help": "Modules that are not trained."})
    workflow: str | None = field(default=None, metadata={"help": "Inner-adaptor workflow that is trained."})
    teacher_forcing_steps: int = field(
        default=0, metadata={"help": "Steps in which image tokens get the identity embeddings of the boxes."}
    )
    packing: bool = field(default=False, metadata={"help": "Pack the samples of a batch into rows without padding."})
    max_length: int | None = field(default=None, metadata={"help": "Largest number of tokens of a packed row."})
    image_features: str | None = field(
        default=None, metadata={"help": "Folder for features of the frozen vision tower, read in place of images."}
    )
    gather_references: bool = field(
        default=True, metadata={"help": "Compute the contrastive loss over the references of all processes."}
    )
    non_finite_loss: str = field(
        default="stop",
        metadata={"help": "What happens if a loss is NaN or infinite.", "choices": list(ON_NON_FINITE_LOSS)},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Must stay False; see non_finite_loss."})

    def __post_init__(self):
        super().__post_init__()
        if self.ddp_find_unused_parameters is None:
            # Some parameters get no gradient on any process: poolers and layers after vision_feature_layer; in identity
            # pretraining the language model. With gradient checkpointing, transformers would not look for them.
            self.ddp_find_unused_parameters = True
        self._check_inherited()
        self._check_stage()
        check_mixing_options(mixing_mode=self.mixing_mode, mixing_ratio=self.mixing_ratio)
        check_choice("non_finite_loss", self.non_finite_loss, ON_NON_FINITE_LOSS)
        check_positive(max_length=self.max_length)
        if self.max_length is not None and not self.packing:
            raise ValueError(
                f"max_length={self.max_length} is the length of packed rows and has no effect without packing; set "
                "packing=True, or limit the length of samples by max_length of the processor."
            )
        for source in self.loss_weights or {}:
            check_choice("loss_weights", source, SOURCES)
        self.loss_weights = dict.fromkeys(SOURCES, 1.0) | (self.loss_weights or {})
        for source, weight in self.loss_weights.items():
            if weight < 0:
                raise ValueError(f"loss_weights[{source!r}]={weight} must be at least 0.")
        self.module_learning_rates = dict(self.module_learning_rates or {})
        for module in self.module_learning_rates:
            check_choice("module_learning_rates", module, MODULES)
        for module in self.freeze:
            check_choice("freeze", module, MODULES)
            if module in self.module_learning_rates:
                raise ValueError(
                    f"freeze holds {module!r}, but module_learning_rates sets a rate for it; remove one of them."
                )

    def _check_inherited(self) -> None:
        """Refuse arguments of transformers that the losses and batches of :class:`IDTrainer` do not follow."""
        parallelism = self.parallelism_config
        refused = {
            "remove_unused_columns": (
                self.remove_unused_columns,
                "removes image roles and boxes from the batches; use False.",
            ),
            "label_smoothing_factor": (
                self.label_smoothing_factor != 0,
                "has no effect on the losses per source, which the model computes; set it to 0.",
            ),
            "use_liger_kernel": (
                self.use_liger_kernel,
                "has no effect on a model of several parts; call liger_kernel's function for the language model before "
                "the trainer is built.",
            ),
            "average_tokens_across_devices": (
                not self.average_tokens_across_devices,
                "has no effect: the loss is a mean over the global batch; leave it True.",
            ),
            "logging_nan_inf_filter": (
                self.logging_nan_inf_filter,
                "hides losses that are NaN or infinite; leave it False, and set non_finite_loss.",
            ),
            "label_names": (
                self.label_names not in (None, ["labels"]),
                "has no effect: the labels of a batch are its field 'labels'; leave it out.",
            ),
            "accelerator_config.dispatch_batches": (
                self.accelerator_config.dispatch_batches,
                "splits a batch between a sample and its images; use False.",
            ),
            "parallelism_config": (
                any(getattr(parallelism, name, 1) > 1 for name in ("cp_size", "sp_size")),
                "with context or sequence parallelism separates tokens from their labels; use data parallelism, FSDP "
                "or DeepSpeed.",
            ),
        }
        for name, (is_set, reason) in refused.items():
            if is_set:
                first, _, second = name.partition(".")
                value = getattr(self, first)
                raise ValueError(f"{name}={getattr(value, second) if second else value!r} {reason}")

    def _check_stage(self) -> None:
        check_choice("stage", self.stage, STAGES)
        if self.teacher_forcing_steps < 0:
            raise ValueError(f"teacher_forcing_steps={self.teacher_forcing_steps} must be at least 0.")
        if self.stage != "identity_pretraining":
            return
        if self.teacher_forcing_steps:
            raise ValueError(
                f"teacher_forcing_steps={self.teacher_forcing_steps} has no effect with stage='identity_pretraining', "
                "which does not use the image tokens; set it to 0."
            )
        if self.packing:
            raise ValueError(
                "packing=True has no effect with stage='identity_pretraining', which does not run the language model; "
                "leave it out."
            )
        if self.workflow is not None:
            raise ValueError(
                f"workflow={self.workflow!r} has no effect with stage='identity_pretraining', which does not run the "
                "language model; leave it out."
            )
        if self.neftune_noise_alpha is not None:
            raise ValueError(
                f"neftune_noise_alpha={self.neftune_noise_alpha} has no effect with stage='identity_pretraining', "
                "which does not run the language model; leave it out."
            )
