"""What a training run would do: configuration, parameters, rendered samples, and memory."""

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from idavlm.training.arguments import IDTrainingArguments
from idavlm.training.build import TrainingRun
from idavlm.training.config import TrainConfig
from idavlm.training.memory import (
    ADAM_STATE,
    Strategy,
    activation_memory,
    language_model_memory,
    layers_of,
    state_memory,
)
from idavlm.training.quantization import QuantizationArguments
from idavlm.training.trainer import freeze_modules
from idavlm.utils import IGNORE_INDEX, markdown_table
from idavlm.utils.parameter_groups import module_of

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4_BYTES = 0.516
"""4 bit, 8 bit per block of 64 parameters, and 32 bit per 256 of these."""
OPTIMIZER_BYTES = {
    "sgd": 0,
    "adafactor": 0,
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "paged_adamw_8bit": 2,
    "lion_32bit": 4,
}
"""Bytes of optimizer state per trained parameter; AdamW's for all others."""


def describe_run(config: TrainConfig, run: TrainingRun) -> str:
    """Describe a run whose model may be empty: what ``idavlm train --dry-run`` prints.

    Raises:
        ValueError: ``freeze`` or ``workflow`` does not fit the model, or a sample cannot be encoded.
    """
    freeze_modules(run.model, config.training)
    parts = ["## Configuration", config.to_yaml() + _steps(config, run)]
    parts += ["## Parameters", parameter_table(run.model, config.training)]
    for name, dataset in run.datasets.items():
        parts.append(f"## {name}: {len(dataset)} records")
        if name != "task":
            parts.append(rendered_sample(dataset, run.processor))
    encoded = run.datasets["train"][0]
    parts += ["## Memory of one process", memory_table(run.model, config, encoded)]
    return "\n\n".join(parts)


def _steps(config: TrainConfig, run: TrainingRun) -> str:
    """Global batch and number of steps."""
    args = config.training
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    per_epoch = math.ceil(len(run.datasets["train"]) / batch)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    return f"# global batch of {batch} samples, {per_epoch} steps per epoch of the training data, {steps} steps"


def parameter_table(model: nn.Module, args: IDTrainingArguments) -> str:
    """Number of parameters of each module, how many are trained, and their learning rate."""
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        count = counts.setdefault(module_of(name) or "other", [0, 0])
        count[0] += parameter.numel()
        count[1] += parameter.numel() if parameter.requires_grad else 0
    rows = []
    for module, (all_, trained) in counts.items():
        rate = args.module_learning_rates.get(module, args.learning_rate)
        rows.append([module, f"{all_:,}", f"{trained:,}", f"{rate:g}" if trained else "frozen"])
    totals = [sum(column) for column in zip(*counts.values(), strict=True)]
    rows.append(["total", *(f"{total:,}" for total in totals), ""])
    return markdown_table(["module", "parameters", "trained", "learning rate"], rows)


def rendered_sample(dataset: Dataset, processor) -> str:
    """The first sample as the model reads it: text with and without labels. Repeated image tokens are counted."""
    encoded = dataset[0]
    lines = [f"sample {encoded['id']!r} ({encoded['source']}), {len(encoded['input_ids'])} tokens"]
    for is_label, text in _segments(encoded, processor.tokenizer):
        lines.append(f"{'  label |' if is_label else '        |'} {text!r}")
    return "\n".join(lines)


def memory_table(model: nn.Module, config: TrainConfig, encoded: dict[str, Any]) -> str:
    """Estimate of the memory of one process, for micro-batches of samples such as ``encoded``."""
    args, strategy = config.training, strategy_of(config, model)
    batch = args.per_device_train_batch_size
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    unknown = ""
    found = state_memory(trained, frozen, _largest_layer(model), strategy)
    length = len(encoded["input_ids"])
    text = model.config.get_text_config()
    # Models of idavlm compute the logits of labelled tokens only.
    num_labels = int((encoded["labels"] != IGNORE_INDEX).sum())
    num_logits = num_labels if model.config.model_type == "idavlm" else length
    found["activations and logits of the language model"] = language_model_memory(
        layers_of(text), batch * length, batch * num_logits, text.vocab_size, strategy
    )
    if any(p.requires_grad for name, p in model.named_parameters() if module_of(name) == "vision_tower"):
        vision = model.config.vision_config
        try:
            patches = _num_patches(encoded, vision)
            found["activations of the vision tower"] = activation_memory(layers_of(vision), batch * patches, strategy)
        except ValueError as error:  # a ResNet, for example
            unknown = f" Without the activations of the vision tower: {error}"
    rows = [[name, f"{size / 2**30:.3g}"] for name, size in found.items() if size]
    rows.append(["total", f"{sum(found.values()) / 2**30:.3g}"])
    return (
        f"Number of processes: {strategy.num_ranks}. A micro-batch has {batch} samples of {length} tokens, as the "
        f"first one; longer samples need more.{unknown}\n\n{markdown_table(['', 'GiB'], rows)}"
    )


def strategy_of(config: TrainConfig, model: nn.Module) -> Strategy:
    """How the training arguments split a run, and what it keeps in memory."""
    args, weight_bytes = config.training, BYTES[config.model.dtype]
    stage, has_master_weights = 0, False
    if args.fsdp:
        stage = 3
    if args.deepspeed:
        stage = args.hf_deepspeed_config.get_value("zero_optimization.stage", 0)
        if args.bf16 or args.fp16:  # DeepSpeed converts the model
            weight_bytes, has_master_weights = 2, True
    return Strategy(
        num_ranks=args.world_size,
        stage=stage,
        weight_bytes=weight_bytes,
        frozen_bytes=_mean_frozen_bytes(model, config.model.quantization, weight_bytes),
        compute_bytes=2 if args.bf16 or args.fp16 else weight_bytes,
        has_master_weights=has_master_weights,
        optimizer_bytes=OPTIMIZER_BYTES.get(args.optim.value, ADAM_STATE),
        checkpointing=bool(args.gradient_checkpointing),
    )


def _mean_frozen_bytes(model: nn.Module, quantization: dict | None, weight_bytes: float) -> float:
    """Mean bytes of a frozen parameter, where the linear layers of some parts are quantised, but no head."""
    parts = QuantizationArguments(**quantization).parts if quantization else []
    head = model.get_output_embeddings()
    sizes = {True: 0, False: 0}
    for path, module in model.named_modules():
        is_quantized = isinstance(module, nn.Linear) and module is not head and module_of(f"{path}.weight") in parts
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                sizes[is_quantized and name == "weight"] += parameter.numel()
    total = sum(sizes.values())
    return weight_bytes if not total else (sizes[True] * NF4_BYTES + sizes[False] * weight_bytes) / total


def _largest_layer(model: nn.Module) -> int:
    """Parameters of the largest module of a list of layers."""
    sizes = [
        sum(parameter.numel() for parameter in layer.parameters())
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        for layer in module
    ]
    return max(sizes, default=0)


def _num_patches(encoded: dict[str, Any], vision_config) -> int:
    """Patches of the images of a sample."""
    pixels = encoded["pixel_values"]
    if pixels.dim() == 2:  # one row per patch
        return len(pixels)
    if not isinstance(getattr(vision_config, "patch_size", None), int):
        raise ValueError(f"{type(vision_config).__name__} names no patch_size.")
    height, width = pixels.shape[-2:]
    return pixels.shape[:-3].numel() * height * width // vision_config.patch_size**2


def _segments(encoded: dict[str, Any], tokenizer) -> Iterator[tuple[bool, str]]:
    """Runs of tokens with and without labels, as text."""
    tokens = zip(encoded["input_ids"].tolist(), (encoded["labels"] != IGNORE_INDEX).tolist(), strict=True)
    for is_label, run in groupby(tokens, key=lambda token: token[1]):
        text = ""
        for token, repeats in groupby(run, key=lambda entry: entry[0]):
            count = len(list(repeats))
            ids = [token] if count > 3 else [token] * count  # only image tokens are repeated that often
            text += tokenizer.decode(ids) + (f"*{count} " if count > 3 else "")
        yield is_label, text
