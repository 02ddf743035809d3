"""The configuration of ``idavlm train``: dataclasses, read from a YAML file and overrides of the command line."""

import copy
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from idavlm._compat import with_present_names
from idavlm.data.mixing import check_mixing_options
from idavlm.data.readers import READERS
from idavlm.models.model_parts import PARTS
from idavlm.training.arguments import IDTrainingArguments
from idavlm.training.config_file import OptionFile
from idavlm.training.lora import LoRAArguments
from idavlm.training.quantization import QuantizationArguments
from idavlm.utils import check_choice, check_positive
from idavlm.utils.checks import check_type

RECORDS = ("train_data", "general_data", "eval_data", "task_data")
"""Keys whose values are files of records."""

MIXING = ("mixing_mode", "mixing_ratio")
"""Keys of :class:`idavlm.IDTrainingArguments` that a data recipe may have, too."""


@dataclass
class ModelArguments:
    """The model that is trained: a checkpoint, or parts that are joined.

    Attributes:
        model: folder or hub name of a checkpoint of idavlm, or of an image-text model of transformers.
        vision_tower, language_model: names of the parts, in place of ``model``.
        connector: what joins the parts, see :class:`idavlm.IDAVLMConfig`; ``"id_former"`` by default. For a checkpoint
            of idavlm with a resampler, ``"id_former"`` puts the resampler into a new ID-Former.
        model_options: arguments of :class:`idavlm.IDAVLMConfig` and of the connector.
        inner_adaptors: arguments of :func:`idavlm.add_inner_adaptors`, for a model of idavlm that has none.
        attach_id_former: arguments of :func:`idavlm.attach_id_former`, for a model of transformers; ``{}`` for the
            defaults.
        id_former: folder of :func:`idavlm.save_id_former`, which is attached to a model of transformers.
        freeze_model: with an attached ID-Former, whether the parameters of the model are frozen.
        processor: folder of the processor; by default that of the model.
        processor_options: options of :class:`idavlm.IDAVLMProcessor` or :class:`idavlm.IdentityProcessor`, for example
            ``{"max_length": 2048}``: a longer sample is an error, or left out with ``on_error: skip``, and never cut.
        chat_template: name of a template in ``idavlm.data.chat_templates``; by default that of the tokenizer.
        dtype: type in which the weights are loaded. With ``float32`` and ``bf16: true``, small updates are not lost.
        attn_implementation: attention of the model, as in ``from_pretrained``.
        lora: fields of :class:`idavlm.training.LoRAArguments` for each part, for example
            ``{"language_model": {"r": 16}}``.
        quantization: fields of :class:`idavlm.training.QuantizationArguments`, for example
            ``{"parts": ["language_model"]}``; None for weights that are not quantised.
    """

    model: str | None = None
    vision_tower: str | None = None
    language_model: str | None = None
    connector: str | None = None
    model_options: dict = field(default_factory=dict)
    inner_adaptors: dict | None = None
    attach_id_former: dict | None = None
    id_former: str | None = None
    freeze_model: bool = True
    processor: str | None = None
    processor_options: dict = field(default_factory=dict)
    chat_template: str | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None
    lora: dict = field(default_factory=dict)
    quantization: dict | None = None

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        parts = {"vision_tower": self.vision_tower, "language_model": self.language_model}
        given = [name for name, value in parts.items() if value is not None]
        if self.model is not None and given:
            raise ValueError(f"model={self.model!r} is a whole model; leave out {' and '.join(given)}.")
        if self.model is None and len(given) < 2:
            raise ValueError("model is not set; pass model=..., or vision_tower=... and language_model=...")
        if self.attach_id_former is not None and self.id_former is not None:
            raise ValueError(
                f"id_former={self.id_former!r} is attached with its own options; leave out attach_id_former."
            )
        if not self.attaches and not self.freeze_model:
            raise ValueError("freeze_model=False has no effect without attach_id_former or id_former; leave it out.")
        if self.lora and self.model is None:
            raise ValueError(
                "lora needs model=..., a checkpoint that the adapter can name. Train the new connector of the parts "
                "first, and pass the output_dir of that run."
            )
        if self.attaches and self.model is None:
            raise ValueError("an ID-Former is attached to a whole model; pass model=... in place of parts.")

    @property
    def attaches(self) -> bool:
        """Whether an ID-Former is attached to a model of transformers."""
        return self.attach_id_former is not None or self.id_former is not None


@dataclass
class RecordFile:
    """A file of records, as in :class:`idavlm.RecordDataset`.

    Attributes:
        path: JSON Lines file, JSON list, parquet file, or folder of parquet files.
        image_root: folder that image paths are relative to; by default ``images`` next to the file.
        reader: format of the records, a key of ``idavlm.data.READERS``.
        on_error: ``"raise"``, or ``"skip"`` to leave out invalid records.
        unused_fields: ``"raise"``, or ``"warn"`` to ignore fields that the reader does not use.
        allow_urls: whether images may be URLs.
        max_records: number of records that are used; None for all.
        seed: seed of the random choice of ``max_records`` records; None for those at the start of the file.
    """

    path: str
    image_root: str | None = None
    reader: str = "idavlm"
    on_error: str = "raise"
    unused_fields: str = "raise"
    allow_urls: bool = False
    max_records: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_choice("reader", self.reader, READERS)
        check_choice("on_error", self.on_error, ("raise", "skip"))
        check_choice("unused_fields", self.unused_fields, ("raise", "warn"))
        check_positive(max_records=self.max_records)
        if self.seed is not None and self.max_records is None:
            raise ValueError(f"seed={self.seed} has no effect without max_records; leave it out.")


@dataclass
class DataArguments:
    """The data of a training run.

    A value of ``train_data``, ``general_data``, ``eval_data`` and ``task_data`` is the path of a file, a mapping with
    the fields of :class:`RecordFile`, or a list of these, whose records are joined.

    Attributes:
        train_data: identity records, or all records if there is one source.
        general_data: records of general data, mixed in by ``mixing_ratio`` and ``mixing_mode``.
        eval_data: records with answers; their losses are logged at every evaluation.
        task_data: evaluation records (with ``type``). At every evaluation the model answers them; the main score of
            each task is logged as ``eval_<task>``.
        task_batch_size: number of records that are answered at once.
        max_new_tokens: maximum length of an answer.
        num_logged_samples: number of answers with images that are logged to the tracker at every evaluation.
    """

    train_data: str | dict | list = ""
    general_data: str | dict | list | None = None
    eval_data: str | dict | list | None = None
    task_data: str | dict | list | None = None
    task_batch_size: int = 16
    max_new_tokens: int = 64
    num_logged_samples: int = 8

    def __post_init__(self) -> None:
        for name in ("train_data", "general_data", "eval_data", "task_data"):
            setattr(self, name, _record_files(name, getattr(self, name)))
        if not self.train_data:
            raise ValueError("train_data is not set; pass train_data=FILE.")
        check_positive(task_batch_size=self.task_batch_size, max_new_tokens=self.max_new_tokens)
        if self.num_logged_samples < 0:
            raise ValueError(f"num_logged_samples={self.num_logged_samples} must be at least 0.")


RECIPE_KEYS = (*(field.name for field in fields(DataArguments)), *MIXING)
"""Keys of a data recipe."""


@dataclass(frozen=True)
class TrainConfig:
    """The configuration of a training run.

    Attributes:
        model, data, training: the dataclasses.
        values: what was set, by the file or by an override; everything else has its default.
    """

    model: ModelArguments
    data: DataArguments
    training: IDTrainingArguments
    values: dict[str, Any]

    def to_yaml(self) -> str:
        """:attr:`values` as a file that :func:`read_config` reads."""
        return yaml.safe_dump(self.values, sort_keys=False, allow_unicode=True)


def read_config(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """Read the configuration of a training run.

    Args:
        path: YAML file. Its keys are the fields of :class:`ModelArguments`, :class:`DataArguments` and
            :class:`idavlm.IDTrainingArguments`. The key ``data`` names another YAML file, a data recipe, with the
            fields of :class:`DataArguments` and :data:`MIXING`; its path is relative to the folder of this file. Keys
            that are set here replace those of the recipe.
        overrides: ``key=value`` of the command line, for example ``learning_rate=1e-5`` or
            ``lora.language_model.r=8``. Values are YAML.

    Raises:
        ValueError: an unknown key, with the nearest known one; a value of the wrong type; values that do not fit each
            other. The message names the file and the line, or the override.
        OSError: the file cannot be read.
    """
    file = OptionFile(path, overrides)
    groups = (ModelArguments, DataArguments, IDTrainingArguments)
    hints = {name: hint for group in groups for name, hint in typing.get_type_hints(group).items()}
    hints["resume_from_checkpoint"] |= bool
    names = [field.name for group in groups for field in fields(group) if field.init]
    file.include("data", RECIPE_KEYS)
    file.check_keys([*names, "data"])
    file.check_placeholders()
    for name, value in file.values.items():
        _check_value(f"{file.where(name)}: {name}", value, hints[name])
    _check_nested(file)
    try:
        return TrainConfig(
            *HfArgumentParser(groups).parse_dict(with_present_names(copy.deepcopy(file.values))), file.values
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"{_where_named(file, str(error))}: {error}") from error


def read_data_recipe(path: str | Path) -> DataArguments:
    """Read a data recipe: a YAML file with the fields of :class:`DataArguments` and, optionally, :data:`MIXING`.

    Raises:
        ValueError: an unknown key, or a value that is not valid; with file and line.
        OSError: the file cannot be read.
    """
    file = OptionFile(path)
    file.check_keys(RECIPE_KEYS)
    file.check_placeholders()
    hints = typing.get_type_hints(IDTrainingArguments) | typing.get_type_hints(DataArguments)
    for name, value in file.values.items():
        _check_value(f"{file.where(name)}: {name}", value, hints[name])
    try:
        check_mixing_options(**{name: value for name, value in file.values.items() if name in MIXING})
        return DataArguments(**{name: value for name, value in file.values.items() if name not in MIXING})
    except ValueError as error:
        raise ValueError(f"{_where_named(file, str(error))}: {error}") from error


def _record_files(name: str, value: str | dict | Sequence | None) -> list[RecordFile]:
    """The files that the value of a key names."""
    if value in (None, ""):
        return []
    files = []
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, RecordFile):
            files.append(entry)
            continue
        options = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(options, dict):
            raise ValueError(f"{name}: {entry!r} is neither a path nor a mapping with 'path'.")
        known = typing.get_type_hints(RecordFile)
        for key, option in options.items():
            if key not in known:
                nearest = get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
                raise ValueError(f"{name}: unknown key {key!r}; did you mean {nearest!r}?")
            check_type(f"{name}: {key}", option, known[key])
        if "path" not in options:
            raise ValueError(f"{name}: {entry!r} has no 'path'.")
        try:
            files.append(RecordFile(**options))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return files


def _check_value(name: str, value: Any, hint: Any) -> None:
    """Check the type of a value, and the choices of an enumeration."""
    check_type(name, value, hint)
    enums = [part for part in (hint, *typing.get_args(hint)) if isinstance(part, type) and issubclass(part, Enum)]
    for enum in enums:
        if isinstance(value, str):
            check_choice(name, value, [member.value for member in enum])


def _check_nested(file: OptionFile) -> None:
    """Check the options of ``lora``, part by part, and of ``quantization``."""
    for part, options in (file.values.get("lora") or {}).items():
        file.check_keys(PARTS, "lora")
        if options is not None:
            check_type(f"{file.where('lora', part)}: lora.{part}", options, dict)
            _check_options(file, LoRAArguments, "lora", part)
    if file.values.get("quantization"):
        _check_options(file, QuantizationArguments, "quantization")


def _check_options(file: OptionFile, arguments: type, *outer: str) -> None:
    """Check names and types of the options at ``outer``, which are fields of ``arguments``."""
    file.check_keys([field.name for field in fields(arguments)], *outer)
    options, hints = file.values, typing.get_type_hints(arguments)
    for key in outer:
        options = options[key]
    for name, value in options.items():
        check_type(f"{file.where(*outer, name)}: {'.'.join((*outer, name))}", value, hints[name])


def _where_named(file: OptionFile, message: str) -> str:
    """The place of the first key that an error message names; the file if it names none."""
    found = {message.find(name): name for name in file.values if name in message}
    return file.where(found[min(found)]) if found else str(file.path)
