"""Arguments of :class:`IDTrainer`: those of transformers, and a few of identity training."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from idavlm.data.schema import SOURCES
from idavlm.utils import check_choice

MODULES = ("vision_tower", "connector", "id_former", "inner_adaptor", "language_model")
_DICTIONARIES = ("loss_weights", "module_learning_rates")


@dataclass
class IDTrainingArguments(TrainingArguments):
    """``transformers.TrainingArguments`` and

    Attributes:
        mixing_ratio: how often a general batch comes, see :class:`idavlm.data.DualDataLoader`.
        mixing_mode: ``"extra"``, ``"interleave"`` or ``"joint"``, see there.
        loss_weights: factor of the whole loss of a source, ``{"identity": 1.0, "general": 1.0}`` where not given. It
            acts on the gradients, not on the logged numbers.
        module_learning_rates: learning rate of single modules, e.g. ``{"vision_tower": 1e-5}``; ``learning_rate``
            for the others. Modules are ``vision_tower``, ``connector``, ``id_former``, ``inner_adaptor``,
            ``language_model``; a parameter belongs to the innermost, those of inner adaptors not to ``language_model``.
        freeze: modules that are not trained.
        workflow: the workflow of inner adaptors that is trained and evaluated; the adaptors of all others are frozen.
            ``"text"`` trains what stands before the language model, as the base model reads it.
        identity_warmup_steps: for so many steps identity batches teach the identity attention alone, by their boxes;
            the language model is not run on them. For models from scratch: it could learn nothing from images yet.
        teacher_forcing_steps: for so many steps image tokens are marked by the boxes, not by what the identity
            attention finds (``max_identities``): the language model learns to read marks that are right first.
        muon_modules: modules whose linear layers are trained by Muon (:class:`idavlm.training.MuonAdamW`), all else by
            AdamW at the same rate. For models from scratch: small ones learn to read images in far fewer steps.
    """

    # Parsed from JSON on a command line, as transformers does with its own dictionaries.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, *_DICTIONARIES]  # noqa: RUF012

    mixing_ratio: float = field(default=0.1, metadata={"help": "How often a general batch comes."})
    mixing_mode: str = field(default="extra", metadata={"help": "extra, interleave or joint."})
    loss_weights: dict | str | None = field(default=None, metadata={"help": 'JSON, {"identity": 1, "general": 1}.'})
    module_learning_rates: dict | str | None = field(default=None, metadata={"help": 'JSON, {"vision_tower": 1e-5}.'})
    freeze: list[str] = field(default_factory=list, metadata={"help": "Modules that are not trained."})
    identity_warmup_steps: int = field(default=0, metadata={"help": "Steps that teach the identity attention alone."})
    teacher_forcing_steps: int = field(default=0, metadata={"help": "Steps that mark image tokens by the boxes."})
    workflow: str | None = field(default=None, metadata={"help": "Workflow of inner adaptors to train."})
    muon_modules: list[str] = field(default_factory=list, metadata={"help": "Modules trained by Muon."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Batches are passed on whole."})

    def __post_init__(self):
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop roles and boxes from the batches; leave it False.")
        for name in ("identity_warmup_steps", "teacher_forcing_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0.")
        if self.identity_warmup_steps and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True  # the language model's have no gradient then
        for source in self.loss_weights or {}:
            check_choice("loss_weights", source, SOURCES)
        self.loss_weights = dict.fromkeys(SOURCES, 1.0) | (self.loss_weights or {})
        for source, weight in self.loss_weights.items():
            if weight < 0:
                raise ValueError(f"loss_weights[{source!r}]={weight} must be at least 0.")
        self.module_learning_rates = dict(self.module_learning_rates or {})
        for module in self.module_learning_rates:
            check_choice("module_learning_rates", module, MODULES)
        for module in self.muon_modules:
            check_choice("muon_modules", module, MODULES)
        if self.muon_modules and not str(self.optim).rsplit(".", 1)[-1].lower().startswith("adamw_torch"):
            raise ValueError(f"muon_modules goes with AdamW for all else; optim={self.optim!r} is not adamw_torch.")
        for module in self.freeze:
            check_choice("freeze", module, MODULES)
            if module in self.module_learning_rates:
                raise ValueError(f"freeze holds {module!r}, which module_learning_rates trains; choose one.")
