"""Keys and values of adaptors in the base model's cache: at the indices after the base's layers."""

import inspect

from idavlm.utils import outside_compile

TEXT = "text"


def enter_cache(cache, workflow: str) -> None:
    """Note that ``workflow`` fills the cache from here on.

    Raises:
        ValueError: it holds tokens of another workflow, whose keys and values are not what this one would compute.
    """
    filled_by = getattr(cache, "filled_by_workflow", TEXT)
    if filled_by == workflow:
        return
    if int(cache.get_seq_length()):
        raise ValueError(
            f"cache holds {int(cache.get_seq_length())} tokens read in workflow {filled_by!r}, and "
            f"workflow={workflow!r} would have read them otherwise; keep one cache a workflow, or give the whole "
            "conversation without a cache when the workflow changes."
        )
    cache.filled_by_workflow = workflow


def make_room(cache, base_index: int, cache_index: int, workflow: str) -> None:
    """Let the cache have a layer ``cache_index``, of the kind of its layer ``base_index``."""
    if len(cache.layers) <= cache_index:
        _add_layers(cache, base_index, cache_index, workflow)
    if getattr(cache, "offloading", False):
        cache.layers[cache_index].prefetch()


@outside_compile
def _add_layers(cache, base_index: int, cache_index: int, workflow: str) -> None:
    cache.filled_by_workflow = workflow  # a cache that the model made itself comes here without enter_cache
    while len(cache.layers) <= cache_index:
        cache.layers.append(_like(cache.layers[base_index]))


def _like(layer):
    """An empty cache layer of the same class and sizes."""
    sizes = {}
    for name, parameter in inspect.signature(type(layer).__init__).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if hasattr(layer, name):
            sizes[name] = getattr(layer, name)
        elif name == "sliding_window":  # static layers keep the smaller of window and length, as their length
            sizes[name] = layer.max_cache_len
        elif parameter.default is parameter.empty:
            raise ValueError(
                f"cache has layers of class {type(layer).__name__}, whose {name!r} cannot be read; inner "
                "adaptors know the dynamic, static, sliding-window and quantised layers of transformers."
            )
    return type(layer)(**sizes)
