"""Inner adaptors: trainable decoder layers inside a frozen language model (IAA, arXiv 2408.12902)."""

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from idavlm.modules.inner_adaptor.decoder import TEXT, DecoderParts, find_decoder_parts
from idavlm.modules.inner_adaptor.workflow import WorkflowState, register_hooks
from idavlm.utils import check_choice, check_positive
from idavlm.utils.sharding import gathered_for_copy, is_sharded_by_fsdp

MODULES_TO_COPY = ("embeddings", "norm", "lm_head", "connector")


class LowRankLinear(nn.Module):
    """``base(x) + up(down(x))``: a linear layer of the base model and a trainable difference of low rank.

    ``base`` is shared, and neither saved nor trained here. ``up`` starts at zero (LoRA, arXiv 2106.09685).
    """

    def __init__(self, base: nn.Linear, rank: int, dtype: torch.dtype):
        super().__init__()
        options = {"bias": False, "dtype": dtype, "device": base.weight.device}
        self.down = nn.Linear(base.in_features, rank, **options)
        self.up = nn.Linear(rank, base.out_features, **options)
        nn.init.zeros_(self.up.weight)
        self.base = (base,)  # in a tuple, so that it is not registered a second time

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return self.base[0](x) + self.up(self.down(x.to(self.down.weight.dtype)))


class GatedLayer(nn.Module):
    """A parallel adaptor: ``layer_output + gate * (layer(layer_input) - layer_input)``; the gate starts at zero."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.layer = layer
        self.gate = nn.Parameter(torch.zeros(1, dtype=dtype, device=next(layer.parameters()).device))

    def forward(self, layer_output: Tensor, layer_input: Tensor, *args, **kwargs) -> Tensor:
        """Add to the output of a base layer ``[B, T, C]`` what the adaptor computes from the input of that layer."""
        parallel = self.layer(layer_input, *args, **kwargs)
        parallel = parallel[0] if isinstance(parallel, tuple) else parallel
        return layer_output + self.gate * (parallel - layer_input)


class InnerAdaptor(nn.ModuleDict):
    """The trainable modules of all workflows of a language model; registered there as ``inner_adaptor``.

    ``state_dict`` keys are ``<workflow>.layers.N.*`` with the names of the model's decoder layers
    (``composition="parallel"``: ``<workflow>.layers.N.layer.*`` and ``<workflow>.layers.N.gate``; with ``rank``:
    ``down.weight`` and ``up.weight`` below the name of each linear layer), and
    ``<workflow>.{embeddings,norm,lm_head,connector}.*`` for ``modules_to_copy``.

    Attributes:
        options: the arguments of :func:`add_inner_adaptors`, with ``layers`` as a list.
        num_base_layers: number of layers of the language model; adaptor N has index ``num_base_layers + N`` in the
            cache.
        state: the active workflow.
        hook_handles: handles of the hooks that run the adaptors. They are pickled with the model, because loading a
            handle keeps torch from using its id for later hooks.
        tensor_names: the names in ``state_dict`` when the adaptors were added.
    """

    # Names of attributes, so that no workflow can have them.
    options = num_base_layers = state = hook_handles = vocabulary = tensor_names = None

    def __init__(self, parts: DecoderParts, options: dict, dtype: torch.dtype, connector: nn.Module | None):
        super().__init__()
        self.options = options
        self.num_base_layers = len(parts.layers)
        self.state = WorkflowState(tuple(options["workflows"]))
        self.hook_handles = []
        copied = {name: _module_to_copy(parts, name, connector) for name in options["modules_to_copy"]}
        vocabularies = copied.keys() & {"embeddings", "lm_head"}
        self.vocabulary = {name: _vocabulary_size(copied[name]) for name in vocabularies}
        kind = {"composition": options["composition"], "rank": options["rank"], "dtype": dtype}
        for workflow in options["workflows"]:
            layers = [
                _adaptor_layer(parts.layers[index], cache_index=self.num_base_layers + position, **kind)
                for position, index in enumerate(options["layers"])
            ]
            self[workflow] = nn.ModuleDict({"layers": nn.ModuleList(layers)})
            self[workflow].update({name: _copy(module).requires_grad_(True) for name, module in copied.items()})
        for module in self.modules():
            module._is_hf_initialized = True  # transformers' flag for modules whose weights it must not draw again
        self.tensor_names = frozenset(self.state_dict())

    @property
    def active(self) -> str:
        """The workflow that runs."""
        return self.state.active

    @contextlib.contextmanager
    def workflow(self, workflow: str) -> Iterator[None]:
        """``with language_model.inner_adaptor.workflow("grounding"):`` runs the model in this workflow."""
        previous = self.state.activate(workflow)
        try:
            yield
        finally:
            self.state.active = previous

    def share_base_layers(self, model: nn.Module) -> None:
        """Let adaptors of low rank share the linear layers that their language model has now.

        Needed if these were replaced after the adaptors were added, for example by quantised ones.

        Args:
            model: the language model, or a model that contains it.
        """
        language_model = next(module for module in model.modules() if module._modules.get("inner_adaptor") is self)
        layers = find_decoder_parts(language_model).layers
        for workflow in self.values():
            for index, adaptor in zip(self.options["layers"], workflow["layers"], strict=True):
                adaptor = getattr(adaptor, "layer", adaptor)  # of a GatedLayer
                for name, module in adaptor.named_modules():
                    if isinstance(module, LowRankLinear):
                        module.base = (layers[index].get_submodule(name),)

    def check_vocabulary(self, name: str, module: nn.Module | None) -> None:
        """Raise ``ValueError`` if a base module has another vocabulary size than its copies."""
        expected = self.vocabulary.get(name)
        if expected is not None and _vocabulary_size(module) not in (expected, None):
            raise ValueError(
                f"{name} of the language model: {_vocabulary_size(module)} tokens, but {expected} in the copies of the "
                "workflows (modules_to_copy); call resize_token_embeddings before add_inner_adaptors."
            )

    def extra_repr(self) -> str:
        shown = ("layers", "composition", "rank")
        return ", ".join(f"{name}={self.options[name]!r}" for name in shown) + f", active={self.active!r}"


def inner_adaptor_of(model: nn.Module) -> InnerAdaptor | None:
    """The inner adaptors of a language model, or of a model or wrapper that contains it; None if there are none."""
    return next((module for module in model.modules() if isinstance(module, InnerAdaptor)), None)


def add_inner_adaptors(
    language_model: nn.Module,
    *,
    layers: Sequence[int] | None = None,
    every: int | None = None,
    workflows: Sequence[str] = ("multimodal", "grounding"),
    composition: str = "serial",
    rank: int | None = None,
    modules_to_copy: Sequence[str] = (),
    connector: nn.Module | None = None,
) -> nn.Module:
    """Add trainable decoder layers (inner adaptors) to a language model, one set per workflow, and freeze the rest.

    After each of ``layers``, the hidden states pass through one more decoder layer. It starts as a copy of the layer
    before it, and reads the same position ids, attention mask and cache. The active workflow selects the set::

        with language_model.inner_adaptor.workflow("grounding"):   # or: with use_workflow(model, "grounding"):
            language_model(input_ids=input_ids)

    Without a selection, the first of ``workflows`` runs. In workflow ``"text"`` no adaptor runs: the output is
    bit-identical to the base model. A cache belongs to the workflow that filled it. The active workflow is a property
    of the model, shared by all threads.

    The adaptors run in forward hooks of the layers. The language model and its modules keep their classes, parameters
    and ``state_dict`` keys; the model gains the submodule ``inner_adaptor`` (see :class:`InnerAdaptor`).
    ``output_hidden_states`` returns the hidden states after the adaptors, as the next layer reads them.

    Args:
        language_model: a transformers decoder, with or without its head. It is changed in place.
        layers: indices of the layers that are followed by an adaptor, ``0 .. num_hidden_layers - 1``. Alternatively:
        every: the interval between adaptors; 4 means layers ``3, 7, 11, ...``.
        workflows: names of the workflows. ``"text"`` always exists and is not listed.
        composition: ``"serial"``: the adaptor reads the layer's output and replaces it (IAA). ``"parallel"``: adaptor
            and layer read the same hidden states ``x``, and ``gate * (adaptor(x) - x)`` is added to the layer's output.
            The trainable gate starts at zero, so that a new model computes what the base model computes.
        rank: share the linear weights of the layer and train a difference of this rank. Norms are copied. None copies
            the whole layer.
        modules_to_copy: further modules of which each workflow has a trainable copy: any of ``"embeddings"``,
            ``"norm"`` (after the last layer), ``"lm_head"`` and ``"connector"``. IAA copies all four. Copies of tied
            embeddings and head are not tied. The base module is evaluated too, and its output replaced.
        connector: the module that maps image features to image tokens; required if ``modules_to_copy`` has
            ``"connector"``.

    Returns:
        ``language_model``.

    Raises:
        ValueError: layers out of range, repeated or missing; unknown or repeated names; a decoder whose layers are not
            found; a module to copy that the model does not have; a model that has adaptors already; weights that are
            sharded by FSDP, or quantised (without ``rank``).
    """
    if getattr(language_model, "inner_adaptor", None) is not None:
        present = ", ".join(map(repr, language_model.inner_adaptor))
        raise ValueError(f"language_model already has inner adaptors for {present}; pass all workflows in one call.")
    parts = find_decoder_parts(language_model)
    options = {
        "layers": _layer_indices(layers, every, parts),
        "workflows": _names("workflows", workflows),
        "composition": composition,
        "rank": rank,
        "modules_to_copy": _names("modules_to_copy", modules_to_copy),
    }
    inner_adaptor = new_inner_adaptor(language_model, options, connector)
    copied = {name: _module_to_copy(parts, name, connector) for name in options["modules_to_copy"]}
    inner_adaptor.hook_handles = register_hooks(language_model, parts, inner_adaptor, copied)
    language_model.requires_grad_(False)
    language_model.inner_adaptor = inner_adaptor
    return language_model


def new_inner_adaptor(language_model: nn.Module, options: dict, connector: nn.Module | None) -> InnerAdaptor:
    """New adaptors with their initial values, not yet part of the model; ``options`` as in :class:`InnerAdaptor`."""
    check_choice("composition", options["composition"], ("serial", "parallel"))
    check_positive(rank=options["rank"])
    for workflow in options["workflows"]:
        if workflow == TEXT or "." in workflow or hasattr(InnerAdaptor, workflow):
            raise ValueError(
                f"workflows contains {workflow!r}; 'text' always exists and is not listed, and other names must have "
                "no dot and not be an attribute of InnerAdaptor. Choose names such as 'multimodal' and 'grounding'."
            )
    for name in options["modules_to_copy"]:
        check_choice("modules_to_copy", name, MODULES_TO_COPY)
    if ("connector" in options["modules_to_copy"]) != (connector is not None):
        raise ValueError("modules_to_copy=('connector',) and connector=<module> belong together; pass both or neither.")
    if any(is_sharded_by_fsdp(parameter) for parameter in language_model.parameters()):
        raise ValueError(
            "language_model is sharded by FSDP, so its layers cannot be copied; add the adaptors before the model is "
            "passed to the trainer or to fully_shard."
        )
    return InnerAdaptor(find_decoder_parts(language_model), options, language_model.dtype, connector)


def _adaptor_layer(
    layer: nn.Module, *, cache_index: int, composition: str, rank: int | None, dtype: torch.dtype
) -> nn.Module:
    """A trainable copy of a decoder layer with its own index in the cache."""
    shared = [module for module in layer.modules() if rank is not None and isinstance(module, nn.Linear)]
    adaptor = _copy(layer, {id(linear): LowRankLinear(linear, rank, dtype) for linear in shared})
    indexed = [module for module in adaptor.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    if not indexed:
        raise ValueError(
            f"language_model: layers of class {type(layer).__name__} have no layer_idx, so the index of the adaptor's "
            "keys and values in the cache cannot be set; use a decoder of transformers 5 or later."
        )
    for module in indexed:
        module.layer_idx = cache_index
    packed = [name for name, parameter in adaptor.named_parameters() if not parameter.is_floating_point()]
    if packed:
        raise ValueError(
            f"rank=None copies the layer, but {packed[0]!r} of {type(layer).__name__} is quantised and cannot be "
            "trained; set a rank, e.g. rank=16, which shares the quantised weights."
        )
    adaptor.requires_grad_(True)
    return GatedLayer(adaptor, dtype) if composition == "parallel" else adaptor


def _copy(module: nn.Module, replacements: dict[int, nn.Module] | None = None) -> nn.Module:
    """A deep copy without forward hooks; ``replacements`` holds new submodules by ``id`` of the originals."""
    memo = dict(replacements or {})
    for submodule in module.modules():
        for name in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
            memo[id(getattr(submodule, name))] = OrderedDict()
    with gathered_for_copy(module):
        return copy.deepcopy(module, memo)


def _layer_indices(layers: Iterable[int] | None, every: int | None, parts: DecoderParts) -> list[int]:
    count = len(parts.layers)
    if (layers is None) == (every is None):
        raise ValueError(f"layers={layers!r} and every={every!r}: pass exactly one of the two.")
    if every is not None:
        check_positive(every=every)
        if every > count:
            raise ValueError(f"every={every} exceeds the {count} layers of {parts.name}; pass at most {count}.")
        return list(range(every - 1, count, every))
    chosen = list(layers)
    wrong = [index for index in chosen if type(index) is not int or not 0 <= index < count]
    if wrong or not chosen or len(set(chosen)) < len(chosen):
        what = f"{wrong[0]!r} does not exist" if wrong else "an index is repeated" if chosen else "the list is empty"
        raise ValueError(
            f"layers={chosen}: {what}; pass distinct indices of the {count} layers of {parts.name}, 0 to {count - 1}."
        )
    return sorted(chosen)


def _names(argument: str, names: Sequence[str]) -> list[str]:
    names = [names] if isinstance(names, str) else list(names)
    if len(set(names)) < len(names) or (argument == "workflows" and not names):
        raise ValueError(f"{argument}={names}: pass at least one name, and no name twice.")
    return names


def _module_to_copy(parts: DecoderParts, name: str, connector: nn.Module | None) -> nn.Module:
    module = connector if name == "connector" else getattr(parts, name)
    if module is None:
        raise ValueError(f"modules_to_copy contains {name!r}, which {parts.name} does not have; leave it out.")
    return module


def _vocabulary_size(module: nn.Module | None) -> int | None:
    """Rows of an embedding or head, also where its weight is partitioned."""
    return getattr(module, "num_embeddings", getattr(module, "out_features", None))
