"""Partitioned training: the layers that FSDP makes its units of, and set-ups that do not work."""

import os
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator, DistributedType
from torch import nn
from torch.optim import Optimizer

from idavlm.modules import IDFormer, Resampler, ResidualIDFormer
from idavlm.training.arguments import IDTrainingArguments

ENTERED_BY_METHODS = (IDFormer, ResidualIDFormer, Resampler)
"""Modules that other modules enter by other methods than ``forward``, where FSDP gathers no parameters."""

FORWARD_METHODS = ("generate", "encode_images")
"""Methods of whole models for which FSDP gathers the parameters of the rest, besides ``forward``."""


def fsdp_wrap_classes(model: nn.Module) -> list[str]:
    """Names of the classes of the layers that FSDP makes its units of, sorted.

    These are the layers of the language model, of its inner adaptors and of the vision tower: the modules in the
    outermost lists of layers. An ID-Former and a resampler are no units, because other methods than ``forward`` call
    their parts; they belong to the unit of the whole model. ``IDTrainer`` passes the names on to accelerate.

    Raises:
        ValueError: the model has no list of layers.
    """
    return sorted({type(layer).__name__ for layer in _layers(model)})


def fully_shard_model(model: nn.Module, **options: Any) -> nn.Module:
    """Shard a model with FSDP2, in place: one unit per layer of :func:`fsdp_wrap_classes`, and one for the rest.

    ``generate`` and ``encode_images`` of the model work, too. All processes must call them together.

    Args:
        model: the model.
        options: arguments of ``torch.distributed.fsdp.fully_shard``, such as ``mesh`` and ``mp_policy``.

    Returns:
        ``model``.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    classes = set(fsdp_wrap_classes(model))
    units = [module for module in model.modules() if type(module).__name__ in classes]
    for unit in reversed(units):  # inner units first
        fully_shard(unit, **options)
    fully_shard(model, **options)
    for name in FORWARD_METHODS:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    return model


def set_wrap_classes(accelerator: Accelerator, model: nn.Module) -> None:
    """Set the classes that accelerate's FSDP plugin makes units of, unless the user has set them.

    accelerate would take ``_no_split_modules``, which are the modules that must stay on one device.
    """
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.auto_wrap_policy is not transformer_auto_wrap_policy:
        return
    if not plugin.transformer_cls_names_to_wrap:
        plugin.transformer_cls_names_to_wrap = fsdp_wrap_classes(model)


def check_engine(args: IDTrainingArguments, accelerator: Accelerator) -> None:
    """Refuse a run in which accelerate would use DDP in place of the DeepSpeed or FSDP that was asked for."""
    remedies = {
        "deepspeed": "leave use_cpu and ACCELERATE_USE_CPU unset; without a GPU, DeepSpeed then trains on the CPU",
        "fsdp": "on a CPU, shard the model with idavlm.training.fully_shard_model in a loop of your own",
    }
    for name, remedy in remedies.items():
        launched = os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true"
        if (getattr(args, name) or launched) and accelerator.distributed_type.value.lower() != name:
            raise ValueError(
                f"{name}={getattr(args, name) or 'true (accelerate launch)'} has no effect, because accelerate runs "
                f"{accelerator.distributed_type.value} in its place (use_cpu={args.use_cpu}); {remedy}."
            )


def check_optimizer(optimizer: Optimizer | None, accelerator: Accelerator) -> None:
    """Refuse an optimizer of matrices where DeepSpeed flattens the parameters to vectors."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED or optimizer is None:
        return
    if any(group.get("muon") for group in optimizer.param_groups):
        raise ValueError(
            f"optimizers={type(optimizer).__name__} updates whole matrices, but DeepSpeed joins all parameters to one "
            "vector and partitions it; use AdamW (leave optimizers out), or train with DDP or FSDP."
        )


def _layers(model: nn.Module) -> list[nn.Module]:
    """The modules in the outermost lists of layers of a model."""
    layers = list(_find_layers(model))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no list of layers (nn.ModuleList) to make FSDP units of; set "
            "fsdp_config={'transformer_layer_cls_to_wrap': [...]}."
        )
    return layers


def _find_layers(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, ENTERED_BY_METHODS):
        return
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) and all(map(_is_layer, child)):
            yield from child
        else:
            yield from _find_layers(child)


def _is_layer(module: nn.Module) -> bool:
    """Whether a module of a list may be a unit: a class of its own, which other modules of torch do not share."""
    has_parameters = next(module.parameters(), None) is not None
    return has_parameters and not type(module).__module__.startswith("torch.nn")
