"""Lead calls of a model's modules through the workflow that is active, without a change to their names or weights.

A routed module keeps its place, parameters and hooks; only its class becomes a subclass. Of layers it has another
``__call__`` and not another ``forward``, so that gradient checkpointing recomputes the base layer alone, whatever
workflow is active by then, and hooks of FSDP, DeepSpeed and accelerate see every module as usual.
"""

import contextlib
import copy
import functools
from collections.abc import Callable

from torch import nn

from idavlm._compat import cache_in
from idavlm.modules.inner_adaptor.cache import make_room


class _FollowedLayer:
    """A decoder layer, and behind (or beside) it the adaptor of the active workflow."""

    def __call__(self, *args, **kwargs):
        output = super().__call__(*args, **kwargs)
        inner_adaptor, place = self._inner_adaptor, self._inner_adaptor_place
        adaptor = inner_adaptor.part("layers")
        if adaptor is None:
            return output
        cache = cache_in(args, kwargs)
        if cache is not None:
            indices = inner_adaptor.options["layers"][place], inner_adaptor.num_base_layers + place
            make_room(cache, *indices, inner_adaptor.active)
        hidden_states = output[0] if isinstance(output, tuple) else output
        if inner_adaptor.options["composition"] == "parallel":
            args = (hidden_states, *args) if args else (hidden_states, kwargs.pop("hidden_states"))
        else:
            kwargs.pop("hidden_states", None)
            args = (hidden_states, *args[1:])
        adapted = adaptor[place](*args, **kwargs)
        adapted = adapted[0] if isinstance(adapted, tuple) else adapted
        return (adapted, *output[1:]) if isinstance(output, tuple) else adapted


class _OwnedModule:
    """A module in whose place the active workflow has its own; hooks of either run."""

    def forward(self, *args, **kwargs):
        own = self._inner_adaptor.part(self._inner_adaptor_place)
        return super().forward(*args, **kwargs) if own is None else own(*args, **kwargs)


@functools.cache
def _subclass(base: type, first: type) -> type:
    # The base's names: they are in messages, configurations and transformers' registries.
    members = {"__module__": base.__module__, "__qualname__": base.__qualname__, "_unrouted_class": base}
    return type(base.__name__, (first, base), members)


def _route(module: nn.Module, kind: type, inner_adaptor: nn.Module, place: int | str) -> None:
    # Past nn.Module.__setattr__, which would make it a submodule.
    module.__dict__["_inner_adaptor"] = inner_adaptor
    module.__dict__["_inner_adaptor_place"] = place
    module.__class__ = _subclass(type(module), kind)


def route_layer(layer: nn.Module, inner_adaptor: nn.Module, place: int) -> None:
    """Let the ``place``-th adaptor of each workflow follow this decoder layer."""
    _route(layer, _FollowedLayer, inner_adaptor, place)


def route_owned(module: nn.Module, inner_adaptor: nn.Module, name: str) -> None:
    """Let each workflow's own module ``name`` answer in the place of this one."""
    _route(module, _OwnedModule, inner_adaptor, name)


def unrouted(module: nn.Module, replaced: dict[int, nn.Module]) -> nn.Module:
    """A deep copy, as the module was before it was routed; ``replaced`` holds submodules by ``id`` of the originals."""
    route = module.__dict__.get("_inner_adaptor")
    duplicate = copy.deepcopy(module, dict(replaced) if route is None else {**replaced, id(route): None})
    if route is not None:
        duplicate.__class__ = type(module)._unrouted_class
        del duplicate.__dict__["_inner_adaptor"], duplicate.__dict__["_inner_adaptor_place"]
    return duplicate


def takes_workflow(method: Callable) -> Callable:
    """Let a method of a model with inner adaptors take ``workflow=``, active while it runs."""

    @functools.wraps(method)
    def run(self, *args, workflow: str | None = None, **kwargs):
        if workflow is None:
            return method(self, *args, **kwargs)
        inner_adaptor = _inner_adaptor_of(self, workflow)
        previous = inner_adaptor.active
        inner_adaptor.activate(workflow)
        try:
            return method(self, *args, **kwargs)
        finally:
            inner_adaptor.active = previous

    return run


class WorkflowMixin:
    """For models with inner adaptors in themselves or in their ``language_model``."""

    @contextlib.contextmanager
    def workflow(self, workflow: str):
        """``with model.workflow("grounding"):`` runs the model in this workflow.

        Raises:
            ValueError: an unknown workflow; a model without inner adaptors.
        """
        inner_adaptor = _inner_adaptor_of(self, workflow)
        previous = inner_adaptor.active
        inner_adaptor.activate(workflow)
        try:
            yield self
        finally:
            inner_adaptor.active = previous

    def train_workflow(self, workflow: str) -> None:
        """Train what this workflow owns and freeze what the others own, for which DDP would wait in vain.

        Raises:
            ValueError: as :meth:`workflow`.
        """
        with self.workflow(workflow):
            for name, owned in _inner_adaptor_of(self, workflow).items():
                owned.requires_grad_(name == workflow)


def _inner_adaptor_of(model: nn.Module, workflow: str) -> nn.Module:
    for module in (model, getattr(model, "language_model", None)):
        found = getattr(module, "inner_adaptor", None)
        if found is not None:
            return found
    raise ValueError(
        f"workflow={workflow!r}, but {type(model).__name__} has no inner adaptors; call "
        "add_inner_adaptors(language_model) first, or give IDAVLMConfig(inner_adaptors=...)."
    )
