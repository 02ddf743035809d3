"""Workarounds for versions of transformers. No other file of the package asks for a version.

Each function names the versions that it is for; when ``pyproject.toml`` excludes them, the function can go.

| function | works around |
| --- | --- |
| :func:`cache_name`, :func:`cache_in`, :func:`takes_cache` | transformers < 5.24 names the cache ``past_key_values`` |
| :func:`auto_image_processor` | transformers < 5.18: ``AutoImageProcessor`` needs torchvision |
| :func:`pil_image_processor` | transformers 5: image processors without torchvision have no public names |
| :func:`empty_cache_layer_like` | transformers 5: a cache layer cannot be cloned empty |
| :func:`call_with_replacements` | transformers 5: some processors convert text replacements to tensors |
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

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

        return deprecate_kwarg(OLD, version="5.40.0", new_name=NEW)(method)

    @functools.wraps(method)
    def run(*args, **kwargs):
        if OLD in kwargs:
            kwargs[NEW] = kwargs.pop(OLD)
        return method(*args, **kwargs)

    # generate() rejects arguments that are not in the signature.
    signature = inspect.signature(method)
    renamed = [p.replace(name=OLD) if p.name == NEW else p for p in signature.parameters.values()]
    run.__signature__ = signature.replace(parameters=renamed)
    return run


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
