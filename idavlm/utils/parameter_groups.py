"""The modules that training arguments name, and optimizer groups with a learning rate per module."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

MODULES = ("vision_tower", "connector", "id_former", "inner_adaptor", "image_index_embedding", "language_model")
"""Names of the modules that can be frozen or trained with a learning rate of their own."""

NAMES_OF_TRANSFORMERS = {
    "visual": "vision_tower",
    "vision_model": "vision_tower",
    "multi_modal_projector": "connector",
    "merger": "connector",
    "deepstack_merger_list": "connector",
    "image_newline": "connector",
    "visual_embeddings_table": "connector",
    "text_model": "language_model",
    "lm_head": "language_model",
}
"""What image-text models of transformers call these modules, where it is another name."""


def module_of(parameter_name: str) -> str | None:
    """The module of :data:`MODULES` that a parameter belongs to, or None.

    A parameter belongs to the innermost of these modules; if its path has none of them, to the innermost of
    :data:`NAMES_OF_TRANSFORMERS`. All parameters of inner adaptors belong to ``inner_adaptor``, including those of the
    modules that a workflow copies (``modules_to_copy``), such as ``inner_adaptor.multimodal.connector.weight``.
    """
    path = parameter_name.split(".")
    if "inner_adaptor" in path:
        return "inner_adaptor"
    found = next((part for part in reversed(path) if part in MODULES), None)
    if found is None:
        found = next((part for part in reversed(path) if part in NAMES_OF_TRANSFORMERS), None)
    return NAMES_OF_TRANSFORMERS.get(found, found)


def require_module(model: nn.Module, argument: str, module: str) -> None:
    """Raise ``ValueError`` if ``model`` has no parameters of ``module``, which ``argument`` names."""
    present = {module_of(name) for name, _ in model.named_parameters()}
    if module not in present:
        choices = ", ".join(repr(name) for name in MODULES if name in present) or "none of these modules"
        raise ValueError(f"{argument} names {module!r}, which {type(model).__name__} does not have; it has {choices}.")


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    module_learning_rates: Mapping[str, float] | None = None,
    weight_decay: float = 0.0,
    decayed: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Optimizer groups of all trainable parameters, one per learning rate and weight decay.

    Their order depends on the arguments only, because a checkpoint stores the state of an optimizer by position.

    Args:
        model: the model.
        learning_rate: learning rate of modules without one of their own.
        module_learning_rates: learning rates by module name, see :data:`MODULES`.
        weight_decay: weight decay of the parameters in ``decayed``; it is 0 for all others.
        decayed: names of the parameters with weight decay.

    Returns:
        Groups with ``params``, ``lr`` and ``weight_decay``.

    Raises:
        ValueError: ``module_learning_rates`` names a module that the model does not have.
    """
    module_learning_rates = module_learning_rates or {}
    for module in module_learning_rates:
        require_module(model, "module_learning_rates", module)
    decayed = set(decayed)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = module_learning_rates.get(module_of(name), learning_rate)
            groups.setdefault((rate, name in decayed), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": weight_decay if decays else 0.0}
        for (rate, decays), parameters in groups.items()
    ]
