"""Workflows: select which adaptors run, and the forward hooks that run them.

Every hook is an object of a top-level class that refers to the model's :class:`InnerAdaptor`, so a model with hooks can
be pickled and deep-copied. Base modules keep their classes, parameters and names. A deep copy of a single base layer
contains the adaptors, because its hook refers to them.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from idavlm._compat import cache_in
from idavlm.modules.inner_adaptor.decoder import TEXT, DecoderParts, ensure_cache_layer, enter_cache
from idavlm.utils import check_choice


class WorkflowState:
    """The active workflow of a model, and the one that its backward pass recomputes."""

    def __init__(self, names: tuple[str, ...]):
        self.names = (*names, TEXT)
        self.active = names[0]
        self.backward: str | None = None  # until the gradient of the decoder's output has been computed

    def activate(self, workflow: str) -> str:
        """Make ``workflow`` the active one, and return the one before."""
        check_choice("workflow", workflow, self.names)
        previous, self.active = self.active, workflow
        return previous

    def current(self) -> str:
        """The active workflow; while a backward pass recomputes layers and their hooks, that of its forward pass."""
        if not _in_backward():
            return self.active
        if self.backward is None:
            raise RuntimeError(
                "a module of a model with inner adaptors is recomputed before the backward pass has reached the "
                "decoder, so its workflow is undefined; checkpoint the decoder layers, for example with "
                "model.gradient_checkpointing_enable()."
            )
        return self.backward

    def begin_backward(self, workflow: str, grad: Tensor) -> None:
        """Tensor hook of the decoder's output: its gradient begins the backward pass of ``workflow``."""
        self.backward = workflow


class AdaptorHook:
    """Forward hook of a decoder layer: runs the adaptor of the current workflow after (or beside) the layer."""

    def __init__(self, inner_adaptor: nn.Module, position: int):
        self.inner_adaptor = inner_adaptor
        self.position = position

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict, output):
        inner_adaptor, workflow = self.inner_adaptor, self.inner_adaptor.state.current()
        if workflow == TEXT:
            return None  # keeps the layer's output
        cache = cache_in(args, kwargs)
        if cache is not None:
            base_index = inner_adaptor.options["layers"][self.position]
            ensure_cache_layer(cache, base_index, inner_adaptor.num_base_layers + self.position, workflow)
        kwargs = dict(kwargs)
        layer_input = args[0] if args else kwargs.pop("hidden_states")
        layer_output = output[0] if isinstance(output, tuple) else output
        # A workflow's layers may be wrapped after they were added (FSDP, peft), so they are looked up here.
        adaptor = inner_adaptor[workflow]["layers"][self.position]
        inputs = [layer_output, layer_input] if inner_adaptor.options["composition"] == "parallel" else [layer_output]
        adapted = adaptor(*inputs, *args[1:], **kwargs)
        adapted = adapted[0] if isinstance(adapted, tuple) else adapted
        return (adapted, *output[1:]) if isinstance(output, tuple) else adapted


class CopyHook:
    """Forward hook of a base module of ``modules_to_copy``: the current workflow's copy computes the output."""

    def __init__(self, inner_adaptor: nn.Module, name: str):
        self.inner_adaptor = inner_adaptor
        self.name = name

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output):
        workflow = self.inner_adaptor.state.current()
        if workflow == TEXT:
            return None  # keeps the base module's output
        self.inner_adaptor.check_vocabulary(self.name, module)
        return self.inner_adaptor[workflow][self.name](*args, **kwargs)


class DecoderHook:
    """Hooks before and after the decoder: checks of its arguments, and the record for recomputation."""

    def __init__(self, inner_adaptor: nn.Module):
        self.inner_adaptor = inner_adaptor

    def before(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        workflow = kwargs.get("workflow")
        if workflow is not None:  # transformers passes unknown arguments on, and would ignore it
            raise ValueError(
                f"workflow={workflow!r} is not an argument of {type(decoder).__name__} or of a model around it; call "
                f"the model within `with use_workflow(model, {workflow!r}):`."
            )
        state = self.inner_adaptor.state
        if not _in_backward():
            state.backward = None
        cache = cache_in(args, kwargs)
        if cache is not None:
            enter_cache(cache, state.current())

    def after(self, decoder: nn.Module, args: tuple, output) -> None:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        state = self.inner_adaptor.state
        begin_backward = functools.partial(state.begin_backward, state.current())
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(begin_backward)


class VocabularyHook:
    """Forward pre-hook of the language model: an error if embeddings or head were resized after they were copied."""

    def __init__(self, inner_adaptor: nn.Module):
        self.inner_adaptor = inner_adaptor

    def __call__(self, language_model: nn.Module, args: tuple) -> None:
        if self.inner_adaptor.active != TEXT:
            self.inner_adaptor.check_vocabulary("embeddings", language_model.get_input_embeddings())
            self.inner_adaptor.check_vocabulary("lm_head", language_model.get_output_embeddings())


def register_hooks(
    language_model: nn.Module, parts: DecoderParts, inner_adaptor: nn.Module, copied: dict[str, nn.Module]
) -> list:
    """Register all hooks of a model and return their handles; ``copied`` are the base modules of modules_to_copy."""
    # First in the order of forward hooks: what others register (capture of hidden states, FSDP2) reads the output of
    # layer and adaptor, whether it was registered before or after.
    options = {"with_kwargs": True, "prepend": True}
    handles = []
    for position, index in enumerate(inner_adaptor.options["layers"]):
        handles.append(parts.layers[index].register_forward_hook(AdaptorHook(inner_adaptor, position), **options))
    for name, module in copied.items():
        handles.append(module.register_forward_hook(CopyHook(inner_adaptor, name), **options))
    if inner_adaptor.vocabulary:
        handles.append(language_model.register_forward_pre_hook(VocabularyHook(inner_adaptor)))
    hook = DecoderHook(inner_adaptor)
    handles.append(parts.decoder.register_forward_pre_hook(hook.before, with_kwargs=True))
    handles.append(parts.decoder.register_forward_hook(hook.after))
    return handles


@contextlib.contextmanager
def use_workflow(model: nn.Module, workflow: str) -> Iterator[nn.Module]:
    """``with use_workflow(model, "grounding"):`` runs a model with inner adaptors in this workflow.

    Args:
        model: a language model with inner adaptors, or a model that contains one (an IDAVLM model, a peft model).
        workflow: one of the names passed to :func:`add_inner_adaptors`, or ``"text"`` for the base model.

    Raises:
        ValueError: an unknown workflow, or a model without inner adaptors.
    """
    with find_inner_adaptor(model, workflow).workflow(workflow):
        yield model


def train_workflow(model: nn.Module, workflow: str) -> None:
    """Make the parameters of this workflow trainable and freeze those of the others; ``"text"`` freezes all.

    DDP would otherwise wait for gradients of the workflows that do not run. Of a workflow that peft has wrapped, only
    the parameters of the active adapter become trainable, because peft saves no others. Args and errors are those of
    :func:`use_workflow`.
    """
    inner_adaptor = find_inner_adaptor(model, workflow)
    check_choice("workflow", workflow, inner_adaptor.state.names)
    inner_adaptor.requires_grad_(False)
    if workflow == TEXT:
        return
    of_adapter = list(_adapter_parameters(inner_adaptor[workflow]))
    for parameter in of_adapter or inner_adaptor[workflow].parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # others are quantised


def takes_workflow(method: Callable) -> Callable:
    """Let a method of a model with inner adaptors take ``workflow=``, which is active while the method runs."""

    @functools.wraps(method)
    def run(self, *args, workflow: str | None = None, **kwargs):
        if workflow is None:
            return method(self, *args, **kwargs)
        with find_inner_adaptor(self, workflow).workflow(workflow):
            return method(self, *args, **kwargs)

    # torch.compile would compile this wrapper for every combination of arguments. It compiles the method only.
    return torch.compiler.disable(run, recursive=False)


class WorkflowMixin:
    """Methods of model classes with a ``language_model`` that may have inner adaptors."""

    workflow = use_workflow
    train_workflow = train_workflow


def find_inner_adaptor(model: nn.Module, workflow: str) -> nn.Module:
    """The :class:`InnerAdaptor` of a model, or of its language model, or within a wrapper (peft, DDP)."""
    for module in (model, getattr(model, "language_model", None)):
        found = getattr(module, "inner_adaptor", None)
        if found is not None:
            return found
    found = next((module.inner_adaptor for module in model.modules() if hasattr(module, "inner_adaptor")), None)
    if found is None:
        raise ValueError(
            f"workflow={workflow!r}, but {type(model).__name__} has no inner adaptors; call "
            "add_inner_adaptors(language_model) first, or set IDAVLMConfig(inner_adaptors=...)."
        )
    return found


def _adapter_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of the active peft adapter within ``module``: LoRA weights, and copies in ``modules_to_save``."""
    for layer in module.modules():
        for name in getattr(layer, "adapter_layer_names", ()):  # peft's name for the attributes with its parameters
            for adapter, part in getattr(layer, name, {}).items():
                if adapter in layer.active_adapters:
                    yield from part.parameters() if isinstance(part, nn.Module) else (part,)


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _tensors(output) -> Iterator[Tensor]:
    """The tensors of a model output or tuple, hidden states of all layers included."""
    for value in output.values() if isinstance(output, dict) else output:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from (item for item in value if isinstance(item, Tensor))
