"""Model, processor and data sets of a training run, from its configuration."""

import inspect
import random
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)

from idavlm._compat import auto_image_processor, keep_new_names
from idavlm.data import RecordDataset, chat_templates
from idavlm.models import (
    IDAVLMConfig,
    IDAVLMForConditionalGeneration,
    IDAVLMProcessor,
    IdentityProcessor,
    attach_id_former,
    import_id_former,
    load_id_former,
)
from idavlm.models.modeling import CONFIG_OPTIONS
from idavlm.training.config import DataArguments, ModelArguments, RecordFile, TrainConfig
from idavlm.training.lora import LoRAArguments, add_lora
from idavlm.training.quantization import QuantizationArguments, quantization_config
from idavlm.utils import check_choice

IMAGE_TOKEN = "<image>"
"""Placeholder that is added to the tokenizer of a language model."""


class TrainingRun(NamedTuple):
    """What :func:`build` returns. ``datasets`` has the keys train, general, eval and task, where they are set."""

    model: PreTrainedModel
    processor: IDAVLMProcessor | IdentityProcessor
    datasets: dict[str, Dataset]


def build(config: TrainConfig, *, empty: bool = False) -> TrainingRun:
    """Build what :class:`idavlm.IDTrainer` needs.

    Args:
        config: the configuration.
        empty: build the model on the meta device, without reading or allocating weights.

    Raises:
        ValueError: names that cannot be loaded together, or options that do not fit the model.
    """
    arguments = config.model
    is_own = arguments.model is None or AutoConfig.from_pretrained(arguments.model).model_type == "idavlm"
    _check_kind(arguments, is_own)
    if arguments.model_options.get("id_former_class") is not None:
        import_id_former(arguments.model_options["id_former_class"])  # of the configuration, not of a checkpoint
    processor = _build_processor(arguments, is_own)
    with torch.device("meta") if empty else nullcontext():
        if arguments.model is None:
            model = _join_parts(arguments, processor, empty=empty)
        elif is_own:
            model = _load_own(arguments, empty=empty)
        else:
            model = _load_transformers(arguments, empty=empty)
        if arguments.lora:
            parts = {part: LoRAArguments(**(options or {})) for part, options in arguments.lora.items()}
            model = add_lora(model, parts)
    return TrainingRun(model, processor, _build_datasets(config.data, processor))


def _check_kind(arguments: ModelArguments, is_own: bool) -> None:
    """Check that the options fit the kind of the model: of idavlm, or of transformers."""
    kind = "a model of idavlm" if is_own else "a model of transformers"
    only_own = {"connector": None, "model_options": {}, "inner_adaptors": None}
    for name in ("attach_id_former", "id_former") if is_own else only_own:
        value = getattr(arguments, name)
        if value != only_own.get(name):
            other = "connector='id_former'" if is_own else "attach_id_former, or convert the model with idavlm convert"
            raise ValueError(f"{name}={value!r} does not apply to model={arguments.model!r}, {kind}; use {other}.")


# --- Processors ------------------------------------------------------------------------------------------------------


def _build_processor(arguments: ModelArguments, is_own: bool) -> IDAVLMProcessor | IdentityProcessor:
    options = dict(arguments.processor_options)
    template = _chat_template(arguments.chat_template)
    source = arguments.processor or arguments.model
    if not is_own:
        processor = IdentityProcessor.from_pretrained(source, identity_inputs=arguments.attaches, **options)
        for name in options:  # AutoProcessor ignores what it does not know
            if not hasattr(processor.image_processor, name):
                check_choice("processor_options", name, _options_of(IdentityProcessor))
    elif source is not None:
        processor = IDAVLMProcessor.from_pretrained(source)
        for name, value in options.items():
            check_choice("processor_options", name, _options_of(IDAVLMProcessor))
            setattr(processor, name, value)
    else:
        image_processor = auto_image_processor().from_pretrained(arguments.vision_tower)
        tokenizer = AutoTokenizer.from_pretrained(arguments.language_model)
        token = options.get("image_token", IMAGE_TOKEN)
        tokenizer.add_tokens([token], special_tokens=True)  # keeps a token that is there
        _set_pad_token(tokenizer)
        return IDAVLMProcessor(image_processor, tokenizer, chat_template=template, **options)
    _set_pad_token(processor.tokenizer)
    if template is not None:
        processor.chat_template = template
    return processor


def _set_pad_token(tokenizer) -> None:
    """Padding has no effect: it is masked, and has no labels. Some tokenizers name no token for it."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def _chat_template(name: str | None) -> str | None:
    if name is None:
        return None
    templates = {key: value for key, value in vars(chat_templates).items() if key.isupper() and "{%" in str(value)}
    check_choice("chat_template", name, templates)
    return templates[name]


def _options_of(processor_class: type) -> list[str]:
    parts = ("self", "processor", "image_processor", "tokenizer", "kwargs", "identity_inputs")
    return [name for name in inspect.signature(processor_class.__init__).parameters if name not in parts]


# --- Models ----------------------------------------------------------------------------------------------------------


def _join_parts(arguments: ModelArguments, processor: IDAVLMProcessor, *, empty: bool) -> PreTrainedModel:
    """Join a vision tower and a language model by a new connector."""
    options = dict(arguments.model_options)
    if arguments.inner_adaptors is not None:
        options["inner_adaptors"] = arguments.inner_adaptors
    vision_tower = _load(AutoModel, arguments.vision_tower, arguments, "vision_tower", empty=empty)
    language_model = _load(AutoModelForCausalLM, arguments.language_model, arguments, "language_model", empty=empty)
    if len(processor.tokenizer) > language_model.get_input_embeddings().num_embeddings:
        # mean_resizing reads the weights, which an empty model does not have.
        language_model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=not empty)
    return IDAVLMForConditionalGeneration.from_parts(
        vision_tower, language_model, processor=processor, connector=arguments.connector or "id_former", **options
    )


def _load_own(arguments: ModelArguments, *, empty: bool) -> PreTrainedModel:
    """Load a checkpoint of idavlm. A resampler can become that of a new ID-Former; inner adaptors can be added."""
    config = IDAVLMConfig.from_pretrained(arguments.model)
    values = config.to_dict()
    of_config = {name: value for name, value in arguments.model_options.items() if name in CONFIG_OPTIONS}
    of_connector = {name: value for name, value in arguments.model_options.items() if name not in CONFIG_OPTIONS}
    key_mapping = None
    if arguments.connector not in (None, config.connector):
        if (config.connector, arguments.connector) != ("resampler", "id_former"):
            raise ValueError(
                f"connector={arguments.connector!r}, but {arguments.model} has connector={config.connector!r}, whose "
                "weights do not fit; leave connector out. Only a resampler can become an 'id_former'."
            )
        of_config["connector"] = "id_former"
        key_mapping = {r"^connector\.": "id_former.resampler."}
    if arguments.inner_adaptors is not None:
        if config.inner_adaptors is not None:
            raise ValueError(
                f"inner_adaptors={arguments.inner_adaptors!r}, but {arguments.model} has inner adaptors; leave it out."
            )
        of_config["inner_adaptors"] = arguments.inner_adaptors
    of_config["connector_config"] = {**config.connector_config, **of_connector}
    config = IDAVLMConfig.from_dict({**values, **of_config})
    if empty:
        return IDAVLMForConditionalGeneration(config)
    model = _load(
        IDAVLMForConditionalGeneration, arguments.model, arguments, "model", config=config, key_mapping=key_mapping
    )
    if key_mapping is not None:
        keep_new_names(model, key_mapping)
    return model


def _load_transformers(arguments: ModelArguments, *, empty: bool) -> PreTrainedModel:
    """Load an image-text model of transformers, and attach an ID-Former if it is asked for."""
    model = _load(AutoModelForImageTextToText, arguments.model, arguments, "model", empty=empty)
    if arguments.id_former is not None:
        return load_id_former(model, arguments.id_former, freeze_model=arguments.freeze_model)
    if arguments.attach_id_former is not None:
        options = dict(arguments.attach_id_former)
        if isinstance(options.get("dtype"), str):
            options["dtype"] = getattr(torch, options["dtype"])
        return attach_id_former(model, freeze_model=arguments.freeze_model, **options)
    return model


def _load(
    model_class, name: str, arguments: ModelArguments, part: str, *, empty: bool = False, **options: Any
) -> PreTrainedModel:
    """``model_class.from_pretrained(name)``, or an empty model of its configuration."""
    dtype = getattr(torch, arguments.dtype)
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    if empty:
        return model_class.from_config(AutoConfig.from_pretrained(name), dtype=dtype, **options)
    if arguments.quantization is not None:
        quantization = QuantizationArguments(**arguments.quantization)
        if part == "model":
            config = options.get("config") or AutoConfig.from_pretrained(name)
            options["quantization_config"] = quantization_config(quantization, config)
        elif part in quantization.parts:
            options["quantization_config"] = quantization_config(quantization)
    options = {key: value for key, value in options.items() if value is not None}
    return model_class.from_pretrained(name, dtype=dtype, **options)


# --- Data ------------------------------------------------------------------------------------------------------------


def _build_datasets(data: DataArguments, processor) -> dict[str, Dataset]:
    datasets = {}
    for name in ("train", "general", "eval"):
        files = getattr(data, f"{name}_data")
        if files:
            datasets[name] = _join([_records(file, processor.encode) for file in files])
    if data.task_data:
        datasets["task"] = _join([_records(file, None) for file in data.task_data])
    return datasets


def _records(file: RecordFile, encode) -> Dataset:
    dataset = RecordDataset(
        file.path,
        file.image_root,
        encode=encode,
        on_error=file.on_error,
        reader=file.reader,
        unused_fields=file.unused_fields,
        allow_urls=file.allow_urls,
    )
    if file.max_records is None or file.max_records >= len(dataset):
        return dataset
    if file.seed is None:
        return Subset(dataset, range(file.max_records))
    chosen = random.Random(file.seed).sample(range(len(dataset)), file.max_records)
    return Subset(dataset, sorted(chosen))


def _join(datasets: Sequence[Dataset]) -> Dataset:
    return datasets[0] if len(datasets) == 1 else ConcatDataset(datasets)
