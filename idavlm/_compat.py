"""Workarounds for versions of other packages. No other file of the package asks for a version.

Each function names the versions that it is for; when ``pyproject.toml`` excludes them, the function can go.

| function | works around |
| --- | --- |
| :func:`cache_name`, :func:`cache_in`, :func:`takes_cache` | transformers < 5.24 names the cache ``past_key_values`` |
| :func:`auto_image_processor` | transformers < 5.18: ``AutoImageProcessor`` needs torchvision |
| :func:`pil_image_processor` | transformers 5: image processors without torchvision have no public names |
| :func:`empty_cache_layer_like` | transformers 5: a cache layer cannot be cloned empty |
| :func:`saved_weights_by_module_name` | transformers 5: ``Trainer`` does not revert what ``save_pretrained`` renames |
| :func:`loses_image_blocks` | transformers 5.24: in packed rows, Gemma 3 and 4 lose the attention within an image |
| :func:`encodes_images_before_generation` | transformers < 5.24 encodes images in the first pass of ``generate`` |
| :func:`optimizer_state_may_lack_parameters` | accelerate 1: FSDP2 cannot resume with unused parameters |
| :func:`with_present_names` | transformers < 5.24 calls ``activation_checkpointing`` ``gradient_checkpointing`` |
| :func:`keep_new_names` | transformers 5: ``save_pretrained`` reverts the ``key_mapping`` of ``from_pretrained`` |
| :func:`call_with_replacements` | transformers 5: some processors convert text replacements to tensors |
| :func:`keep_4bit_layout` | bitsandbytes 0.49 and 0.50: on a CPU, an evaluation changes the layout of 4-bit weights |
| :func:`quantized_base_may_train` | transformers 5: ``Trainer`` refuses new modules on a quantised model |
"""

import copy
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

NEW, OLD = "cache", "past_key_values"


@functools.cache
def cache_name() -> str:
    """Name of the cache argument and output field: ``cache`` from transformers 5.24 on, ``past_key_values`` before."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return NEW if NEW in {field.name for field in fields(CausalLMOutputWithPast)} else OLD


def cache_in(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The transformers cache among the arguments of a model or a layer, under either name or by its type, or None.

    If both names are passed, the new one counts, as in transformers.
    """
    for name in (NEW, OLD):
        if kwargs.get(name) is not None:
            return kwargs[name]
    return next((value for value in args if hasattr(value, "get_seq_length") and hasattr(value, "layers")), None)


def takes_cache(method: Callable) -> Callable:
    """Decorate a method with a parameter ``cache`` so that it accepts the names that transformers' own models accept.

    Before transformers 5.24 that is ``past_key_values``. From 5.24 on it is ``cache``, and the old name with a
    FutureWarning of transformers.
    """
    if cache_name() == NEW:
        from transformers.utils.deprecation import deprecate_kwarg

        deprecated = deprecate_kwarg(OLD, version="5.40.0", new_name=NEW)(method)

        @functools.wraps(method)
        def run(*args, **kwargs):
            return (deprecated if OLD in kwargs else method)(*args, **kwargs)

    else:

        @functools.wraps(method)
        def run(*args, **kwargs):
            if OLD in kwargs:
                kwargs[NEW] = kwargs.pop(OLD)
            return method(*args, **kwargs)

        # generate() rejects arguments that are not in the signature.
        signature = inspect.signature(method)
        renamed = [p.replace(name=OLD) if p.name == NEW else p for p in signature.parameters.values()]
        run.__signature__ = signature.replace(parameters=renamed)

    # torch.compile would compile this wrapper for every combination of arguments. It compiles the method only.
    return torch.compiler.disable(run, recursive=False)


def auto_image_processor() -> type:
    """``AutoImageProcessor``, whether torchvision is installed or not.

    Without torchvision, ``from transformers import AutoImageProcessor`` returns a placeholder that raises ImportError
    before transformers 5.18. The class itself falls back to processors that use Pillow.
    """
    return importlib.import_module("transformers.models.auto.image_processing_auto").AutoImageProcessor


def pil_image_processor(model: str, name: str) -> type:
    """The image processor ``name`` of the transformers model ``model`` that uses Pillow instead of torchvision.

    transformers 5 defines it as ``<name>Pil`` in a file of its own. A model without that file has one processor only.
    """
    try:
        module = importlib.import_module(f"transformers.models.{model}.image_processing_pil_{model}")
        return getattr(module, f"{name}Pil")
    except ImportError:
        return getattr(importlib.import_module("transformers"), name)


def empty_cache_layer_like(layer: Any) -> Any:
    """An empty layer of a transformers cache, of the class and with the sizes of ``layer``.

    transformers 5 has no method for this: the arguments of the constructor are read from attributes of the same names.

    Raises:
        ValueError: the class has a required argument that is not an attribute.
    """
    options = {}
    for name, parameter in inspect.signature(type(layer).__init__).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if hasattr(layer, name):
            options[name] = getattr(layer, name)
        elif name == "sliding_window":  # static layers keep min(sliding_window, max_cache_len), as max_cache_len
            options[name] = layer.max_cache_len
        elif parameter.default is parameter.empty:
            raise ValueError(
                f"cache has layers of class {type(layer).__name__}, whose argument {name!r} cannot be read; inner "
                "adaptors support the dynamic, static, sliding-window and quantized layers of transformers."
            )
    return type(layer)(**options)


def saved_weights_by_module_name(
    model: nn.Module, saved: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The tensors of a checkpoint of ``model`` under the names of its ``state_dict``.

    ``save_pretrained`` of transformers 5 writes many models under the names of the original checkpoints (ViT, Swin) and
    splits merged weights (Mixtral). ``from_pretrained`` reverts this, ``Trainer._load_from_checkpoint`` does not. This
    function runs the conversion of ``from_pretrained`` on a copy of ``model`` without memory for weights, so ``model``
    and its parameters stay as they are.

    Args:
        model: the model that wrote the checkpoint, or one of the same configuration.
        saved: all tensors of the checkpoint under their names in its files.

    Returns:
        The tensors by name; names of tensors that no part of the model takes; tensors that do not fit, with the reason.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        present = model.state_dict()
        known = {name: tensor for name, tensor in saved.items() if name in present}
        misfits = [
            _shapes(name, tensor.shape, present[name].shape)
            for name, tensor in known.items()
            if tensor.shape != present[name].shape
        ]
        return known, sorted(saved.keys() - known.keys()), misfits

    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange
    from transformers.modeling_utils import LoadStateDictConfig

    # The same conversions as in save_pretrained (transformers.core_model_loading.revert_weight_conversion).
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [conversion for conversion in conversions if not isinstance(conversion, PrefixChange)]
    empty = _copy_without_weights(model)
    info, _ = PreTrainedModel._load_pretrained_model(
        empty, saved, None, LoadStateDictConfig(weight_mapping=conversions)
    )
    loaded = {name: tensor for name, tensor in empty.state_dict().items() if not tensor.is_meta}
    misfits = [_shapes(*mismatch) for mismatch in sorted(info.mismatched_keys)]
    misfits += [*map(str, info.error_msgs), *map(str, info.conversion_errors.values())]
    return loaded, sorted(info.unexpected_keys), misfits


def _copy_without_weights(model: nn.Module) -> nn.Module:
    """A deep copy of ``model`` on the meta device."""
    copies: dict[int, Any] = {}
    for parameter in model.parameters():
        copies[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        copies[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, copies)


def _shapes(name: str, saved: torch.Size, expected: torch.Size) -> str:
    return f"{name} has shape {list(saved)} instead of {list(expected)}"


def loses_image_blocks(model: Any) -> bool:
    """Whether the mask of an image-text model is wrong in packed rows, without an error.

    transformers 5.24 (5.17 not yet) counts the positions of packed rows within each sample, but the blocks of images
    that Gemma 3 and Gemma 4 add to the mask of sliding-window layers are found by the position in the row.
    """
    from transformers import masking_utils

    config = model.config
    layer_types = getattr(config.get_text_config(), "layer_types", None) or ()
    return (
        config.model_type in ("gemma3", "gemma4", "gemma4_unified")
        and "sliding_attention" in layer_types
        and hasattr(masking_utils, "remap_positions_for_packed_sequence")
    )


def encodes_images_before_generation(model: Any) -> bool:
    """Whether ``generate`` of a model encodes its images before the first forward pass, from transformers 5.24 on."""
    supports = getattr(model, "_supports_mm_encoder_outputs", None)
    return supports is not None and bool(supports())


@contextmanager
def optimizer_state_may_lack_parameters() -> Iterator[None]:
    """Within the block, accelerate loads the state of an FSDP2 optimizer that has none for some parameters.

    A parameter that never got a gradient, such as that of a pooler, has no state. accelerate 1 saves the optimizer so,
    and then refuses to load it, because it does not pass ``strict=False`` to torch.
    """
    from accelerate.utils import fsdp_utils

    prepare = getattr(fsdp_utils, "_prepare_sd_options", None)
    if prepare is None:  # another version of accelerate
        yield
        return

    def not_strict(plugin: Any) -> Any:
        options = prepare(plugin)
        return None if options is None else replace(options, strict=False)

    fsdp_utils._prepare_sd_options = not_strict
    try:
        yield
    finally:
        fsdp_utils._prepare_sd_options = prepare


def call_with_replacements(processor: Any, **arguments: Any) -> tuple[Any, list[list[dict[str, Any]]]]:
    """Call a processor of transformers; return its output, and by which text it replaced each image placeholder.

    transformers 5: the processors of Idefics 3, InternVL and PaliGemma try to convert the replacements to tensors,
    which fails if the first row has no image.
    """
    from transformers import BatchFeature

    name = "text_replacement_offsets"
    try:
        output = processor(return_text_replacement_offsets=True, **arguments)
    except ValueError as error:
        if name not in str(error):
            raise
        tensor_type = arguments.pop("return_tensors")
        output = processor(return_text_replacement_offsets=True, **arguments)
        replacements = output.pop(name)
        return BatchFeature(dict(output), tensor_type=tensor_type), replacements
    return output, output.pop(name, [])


def keep_4bit_layout(model: nn.Module) -> None:
    """Let the 4-bit layers of bitsandbytes in ``model`` keep the layout of their weights.

    bitsandbytes 0.49 and 0.50: on a CPU with AVX512-BF16, a forward pass in evaluation mode rearranges the weights in
    place for a kernel that computes in bfloat16, whatever the compute type. Afterwards no gradient passes through the
    layer, and dequantisation (of peft, for DoRA and merging) reads wrong values.
    """
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        weight = module.weight
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)


@contextmanager
def quantized_base_may_train(model: nn.Module) -> Iterator[None]:
    """Within this context, ``Trainer(model)`` does not refuse a quantised model whose other modules are trained.

    transformers 5: the Trainer refuses every quantised model that is no peft model, also if it has trainable modules
    that are not quantised, such as inner adaptors or an ID-Former.
    """
    was_quantized = model.__dict__.get("is_quantized", False)
    if was_quantized and any(parameter.requires_grad for parameter in model.parameters()):
        model.is_quantized = False
    try:
        yield
    finally:
        if was_quantized:
            model.is_quantized = True


def keep_new_names(model: nn.Module, key_mapping: dict[str, str]) -> None:
    """Let a model that was loaded with ``key_mapping`` be saved under the names that its tensors have now.

    ``save_pretrained`` of transformers 5 would write the old names, which belong to the old configuration.
    """
    conversions = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [
        conversion for conversion in conversions if not set(conversion.source_patterns) & key_mapping.keys()
    ]


def with_present_names(options: dict[str, Any]) -> dict[str, Any]:
    """Training arguments in which ``gradient_checkpointing`` has its present name.

    transformers 5.24 renamed it to ``activation_checkpointing``, and warns about the old name.
    """
    from transformers import TrainingArguments

    names = {field.name for field in fields(TrainingArguments)}
    renamed = {}
    for name, value in options.items():
        new = name.replace("gradient_checkpointing", "activation_checkpointing")
        renamed[new if new in names else name] = value
    return renamed
