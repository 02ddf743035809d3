"""Inner adaptors: decoder layers that give a frozen language model sight (IAA, arXiv 2408.12902)."""

import functools
from collections.abc import Iterable, Sequence

from torch import nn

from idavlm._compat import cache_in
from idavlm.modules.inner_adaptor.cache import TEXT, enter_cache
from idavlm.modules.inner_adaptor.decoder import DecoderParts, find_decoder_parts
from idavlm.modules.inner_adaptor.layers import adaptor_layer, own_copy
from idavlm.modules.inner_adaptor.routing import WorkflowMixin, route_layer, route_owned, takes_workflow
from idavlm.utils import check_choice, check_positive

OWNED = ("embeddings", "norm", "lm_head", "connector")


class InnerAdaptor(nn.ModuleDict):
    """What the workflows of a language model own; it is the model's ``inner_adaptor``.

    ``state_dict`` keys: ``<workflow>.layers.N.*`` with the names of the model's decoder layers (``composition=
    "parallel"``: ``<workflow>.layers.N.layer.*`` and ``.gate``; with ``rank`` ``down.weight`` and ``up.weight`` below
    the name of each linear layer), ``<workflow>.{embeddings,norm,lm_head,connector}.*`` where they are owned.

    Attributes:
        options: the arguments of :func:`add_inner_adaptors`, ``layers`` as a list.
        num_base_layers: layers of the language model; adaptor N has index ``num_base_layers + N`` in the cache.
        active: the workflow that runs.
    """

    def __init__(self, parts: DecoderParts, options: dict, dtype, connector: nn.Module | None):
        super().__init__()
        self.options = options
        self.num_base_layers = len(parts.layers)
        self.active = options["workflows"][0]
        owned = {name: _part(parts, name, connector) for name in options["modules_to_copy"]}
        kind = {"composition": options["composition"], "rank": options["rank"], "dtype": dtype}
        for workflow in options["workflows"]:
            layers = [
                adaptor_layer(parts.layers[index], cache_index=self.num_base_layers + place, **kind)
                for place, index in enumerate(options["layers"])
            ]
            self[workflow] = nn.ModuleDict({"layers": nn.ModuleList(layers)})
            self[workflow].update({name: own_copy(module) for name, module in owned.items()})
        for module in self.modules():
            module._is_hf_initialized = True  # transformers would draw their weights anew
        self.tensor_names = frozenset(self.state_dict())

    def activate(self, workflow: str) -> None:
        check_choice("workflow", workflow, (*self, TEXT))
        self.active = workflow

    def part(self, name: str) -> nn.Module | None:
        """``"layers"`` or an owned module of the active workflow; None in workflow ``"text"``."""
        return None if self.active == TEXT else self[self.active][name]


def add_inner_adaptors(
    language_model: nn.Module,
    *,
    layers: Sequence[int] | None = None,
    every: int | None = None,
    workflows: Sequence[str] = ("multimodal", "grounding"),
    composition: str = "serial",
    rank: int | None = None,
    owned: Sequence[str] = (),
    connector: nn.Module | None = None,
) -> nn.Module:
    """Give a transformers decoder language model adaptor layers, one set a workflow, and freeze all it had.

    After each of ``layers`` the hidden states pass through one more decoder layer, a trainable copy of the layer it
    follows, with the stream's position ids, causal mask and cache. Which workflow's is said by ``with
    model.workflow("grounding"):`` or by ``workflow=`` in ``forward`` and ``generate``; otherwise the first of
    ``workflows`` runs. Workflow ``"text"`` runs none: it is the base model, bit for bit. A cache belongs to the
    workflow that filled it. The base's parameters and their ``state_dict`` keys stay; the model gains
    ``inner_adaptor.*`` (see :class:`InnerAdaptor`). One workflow is active at a time, for the whole model: threads do
    not choose each its own.

    Args:
        language_model: of transformers, with its head or without. It is changed in place.
        layers: indices of the layers that are followed by an adaptor, ``0 .. num_hidden_layers - 1``; or
        every: after every so many layers: 4 is ``[3, 7, 11, ...]``.
        workflows: names; ``"text"`` is always there and is not given.
        composition: ``"serial"``: the adaptor's output replaces the layer's (IAA). ``"parallel"``: adaptor and layer
            read the same hidden states ``x``, and ``gate * (adaptor(x) - x)`` is added to the layer's output, with a
            trained gate that starts at zero: a new model computes what the base does.
        rank: share the linear weights of the layer that is followed and train a difference of this rank; norms are
            copied as ever. Whole copies if not given.
        owned: what each workflow has a trainable copy of, further: any of ``"embeddings"``, ``"norm"`` (behind the last
            layer), ``"lm_head"``, ``"connector"``. IAA owns all four. Copies of tied embeddings and head are not tied.
        connector: the module of image features that is owned; needed if ``"connector"`` is.

    Returns:
        The same model.

    Raises:
        ValueError: layers out of range, given twice or not at all; unknown or doubled names; a decoder whose layers
            cannot be found; an owned part that the model lacks; adaptors there already; weights that ZeRO-3 has
            partitioned or that are quantised (but for ``rank``).
    """
    if getattr(language_model, "inner_adaptor", None) is not None:
        there = ", ".join(map(repr, language_model.inner_adaptor))
        raise ValueError(f"language_model has inner adaptors already, for {there}; name all workflows in one call.")
    parts = find_decoder_parts(language_model)
    options = {
        "layers": _chosen_layers(layers, every, parts),
        "workflows": _names("workflows", workflows),
        "composition": composition,
        "rank": rank,
        "modules_to_copy": _names("modules_to_copy", owned),
    }
    inner_adaptor = new_inner_adaptor(language_model, options, connector)
    for place, index in enumerate(options["layers"]):
        route_layer(parts.layers[index], inner_adaptor, place)
    for name in options["modules_to_copy"]:
        route_owned(_part(parts, name, connector), inner_adaptor, name)
    language_model.requires_grad_(False)
    language_model.inner_adaptor = inner_adaptor
    language_model.__class__ = _adapted_class(type(language_model))
    return language_model


def new_inner_adaptor(language_model: nn.Module, options: dict, connector: nn.Module | None) -> InnerAdaptor:
    """The adaptors of ``options`` as they start, not yet part of the model."""
    check_choice("composition", options["composition"], ("serial", "parallel"))
    check_positive(rank=options["rank"])
    for workflow in options["workflows"]:
        if workflow == TEXT or "." in workflow or hasattr(nn.ModuleDict, workflow):
            raise ValueError(
                f"workflows holds {workflow!r}; 'text' is there without being named, and other names have no dot and "
                "are no method of nn.ModuleDict. Choose names such as 'multimodal' and 'grounding'."
            )
    for name in options["modules_to_copy"]:
        check_choice("modules_to_copy", name, OWNED)
    if ("connector" in options["modules_to_copy"]) != (connector is not None):
        raise ValueError("modules_to_copy=('connector',) and connector=<the module> go together; give both or neither.")
    if any(hasattr(parameter, "ds_id") for parameter in language_model.parameters()):
        raise ValueError(
            "language_model is partitioned by ZeRO-3, so its layers cannot be copied; load it and add the adaptors "
            "before TrainingArguments(deepspeed=...) is made: the Trainer partitions both."
        )
    return InnerAdaptor(find_decoder_parts(language_model), options, language_model.dtype, connector)


class _AdaptedModel(WorkflowMixin):
    """Methods of a language model with inner adaptors."""

    def resize_token_embeddings(self, *args, **kwargs):
        owned = {"embeddings", "lm_head"} & set(self.inner_adaptor.options["modules_to_copy"])
        if owned and (args or kwargs):
            raise ValueError(
                f"the workflows own {', '.join(sorted(owned))}, which resize_token_embeddings would leave as they are; "
                "call it before add_inner_adaptors."
            )
        return super().resize_token_embeddings(*args, **kwargs)


@functools.cache
def _adapted_class(base: type) -> type:
    def forward(self, *args, **kwargs):
        cache = cache_in(args, kwargs)
        if cache is not None:
            enter_cache(cache, self.inner_adaptor.active)
        return base.forward(self, *args, **kwargs)

    members = {"forward": takes_workflow(functools.wraps(base.forward)(forward))}
    if hasattr(base, "generate"):
        members["generate"] = takes_workflow(base.generate)
    members |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (_AdaptedModel, base), members)


def _chosen_layers(layers: Iterable[int] | None, every: int | None, parts: DecoderParts) -> list[int]:
    count = len(parts.layers)
    if (layers is None) == (every is None):
        raise ValueError(f"layers={layers!r} and every={every!r}: give one of the two.")
    if every is not None:
        check_positive(every=every)
        if every > count:
            raise ValueError(f"every={every} passes all {count} layers of {parts.name}; give at most {count}.")
        return list(range(every - 1, count, every))
    chosen = list(layers)
    wrong = [index for index in chosen if isinstance(index, bool) or not isinstance(index, int)]
    wrong += [index for index in chosen if index not in wrong and not 0 <= index < count]
    if wrong or not chosen or len(set(chosen)) < len(chosen):
        what = f"{wrong[0]!r} is not there" if wrong else "an index twice" if chosen else "none is chosen"
        raise ValueError(f"layers={chosen}: {what}; {parts.name} has {count} layers, 0 to {count - 1}, each once.")
    return sorted(chosen)


def _names(argument: str, names: Sequence[str]) -> list[str]:
    names = [names] if isinstance(names, str) else list(names)
    if len(set(names)) < len(names) or (argument == "workflows" and not names):
        raise ValueError(f"{argument}={names}: give at least one name, and each once.")
    return names


def _part(parts: DecoderParts, name: str, connector: nn.Module | None) -> nn.Module:
    module = connector if name == "connector" else getattr(parts, name)
    if module is None:
        raise ValueError(f"owned holds {name!r}, which {parts.name} does not have; leave it out.")
    return module
