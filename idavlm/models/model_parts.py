"""Where the vision tower, the language model and the modules between them are in an image-text model."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from idavlm.utils import check_choice

PARTS = ("language_model", "vision_tower")
"""Pretrained parts of an image-text model."""


def find_part(model: PreTrainedModel, part: str) -> tuple[str, nn.Module]:
    """The path and the module of a pretrained part.

    Args:
        model: an :class:`idavlm.IDAVLMForConditionalGeneration`, an image-text model or a causal language model of
            transformers.
        part: ``"language_model"`` (its decoder, without the output head) or ``"vision_tower"``.

    Raises:
        ValueError: the model has no such part.
    """
    check_choice("part", part, PARTS)
    found = model.get_decoder() if part == "language_model" else model.get_encoder(modality="image")
    path = next((path for path, module in model.named_modules() if module is found and module is not model), None)
    if path is None:
        raise ValueError(f"{type(model).__name__} has no {part}.")
    return path, found


def modules_beside_parts(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules with parameters that belong to no pretrained part, and their paths.

    These are the connector, the ID-Former, the image index embedding and the inner adaptors of a model, whatever their
    names. The output head belongs to the language model.
    """
    pretrained = [model.get_output_embeddings()]
    for part in PARTS:
        try:
            pretrained.append(find_part(model, part)[1])
        except ValueError:  # a language model alone
            continue
    paths = [path for path, module in model.named_modules() if any(module is part for part in pretrained)]

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if path in paths or not any(True for _ in child.parameters()):
                continue
            if any(other.startswith(f"{path}.") for other in paths):
                yield from walk(child, f"{path}.")
            else:
                yield path, child

    return walk(model, "")
