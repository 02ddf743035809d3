"""The argument that holds the cache: what was ``past_key_values`` is ``cache`` from transformers 5.24 on."""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import fields

NEW, OLD = "cache", "past_key_values"


@functools.cache
def cache_name() -> str:
    """What the installed transformers calls it."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return NEW if NEW in {field.name for field in fields(CausalLMOutputWithPast)} else OLD


def cache_in(args: tuple, kwargs: dict):
    """The transformers cache among the arguments of a model or layer, by either name or by its place, or None."""
    for name in (NEW, OLD):  # where both are given, transformers ignores the old one
        if kwargs.get(name) is not None:
            return kwargs[name]
    return next((value for value in args if hasattr(value, "get_seq_length") and hasattr(value, "layers")), None)


def takes_cache(method: Callable) -> Callable:
    """Let a method with a parameter ``cache`` take it as transformers' own models do.

    That is as ``past_key_values`` before 5.24, and from then on as ``cache`` or, with transformers' warning, by the old
    name.
    """
    if cache_name() == NEW:
        from transformers.utils.deprecation import deprecate_kwarg

        return deprecate_kwarg(OLD, version="5.40.0", new_name=NEW)(method)

    @functools.wraps(method)
    def run(*args, **kwargs):
        if OLD in kwargs:
            kwargs[NEW] = kwargs.pop(OLD)
        return method(*args, **kwargs)

    # generate refuses what is not in the signature.
    signature = inspect.signature(method)
    renamed = [p.replace(name=OLD) if p.name == NEW else p for p in signature.parameters.values()]
    run.__signature__ = signature.replace(parameters=renamed)
    return run


def pil_image_processor(model: str, name: str) -> type:
    """The image processor ``name`` of the transformers model ``model`` that needs Pillow and no torchvision.

    transformers 5.x keeps it in ``image_processing_pil_<model>.py``; before, the class without suffix was that one.
    """
    try:
        module = importlib.import_module(f"transformers.models.{model}.image_processing_pil_{model}")
        return getattr(module, f"{name}Pil")
    except ImportError:
        return getattr(importlib.import_module("transformers"), name)
