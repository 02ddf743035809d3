"""Compare sizes in a configuration with the tensors, before a model of these sizes is built."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from idavlm.conversion.errors import ConversionError, shown

LAYER_COUNTS = re.compile(r"(?:\w+_)?(?:layers?|blocks|depths?)")
"""Fields that count parts of a model that have tensors and are built one by one."""
OTHER_COUNTS = re.compile(r"num_labels|num_\w*experts")
"""Fields that count what is listed one by one."""
MAX_OTHER_COUNT = 100_000
"""Their largest value; ImageNet-21k has 21,843 labels."""

Size = tuple[str, int]
"""A regular expression of names of tensors, and a dimension of these tensors."""

LANGUAGE_MODEL: dict[str, Size] = {
    "vocab_size": (r"(?:.*\.)?embed_tokens\.weight", 0),
    "hidden_size": (r"(?:.*\.)?embed_tokens\.weight", 1),
    "intermediate_size": (r".*layers\.\d+\.mlp\.up_proj\.weight", 0),
}
VISION_TOWER: dict[str, Size] = {
    "hidden_size": (r"(?:.*\.)?patch_embedding\.weight", 0),
    "num_channels": (r"(?:.*\.)?patch_embedding\.weight", 1),
    "patch_size": (r"(?:.*\.)?patch_embedding\.weight", 2),
    "intermediate_size": (r".*layers\.\d+\.mlp\.fc1\.weight", 0),
}
LAYERS = r"(?:.*\.)?layers?\.(\d+)\..*"
"""Tensors of the layers of a language model or a vision transformer."""


def check_counts(path: Path, config: dict[str, Any], tensors: dict[str, Tensor], *, section: str = "") -> None:
    """Check that a configuration, read by transformers, does not ask for more parts than there are tensors.

    Raises:
        ConversionError: names file, field, value and the number of tensors.
    """
    for name, value in config.items():
        field = f"{section}.{name}" if section else name
        if isinstance(value, dict):
            check_counts(path, value, tensors, section=field)
            continue
        limit = len(tensors) if LAYER_COUNTS.fullmatch(name) else MAX_OTHER_COUNT
        if limit == MAX_OTHER_COUNT and not OTHER_COUNTS.fullmatch(name):
            continue
        for count in value if isinstance(value, list) else [value]:
            if isinstance(count, (int, float)) and count > limit:
                raise ConversionError(
                    f"{path}: {field}={shown(value)} is more than {limit}; the weights have {len(tensors)} tensors. "
                    "Check that the file belongs to them."
                )


def check_layers(path: Path, field: str, value: int, tensors: dict[str, Tensor], *, pattern: str = LAYERS) -> None:
    """Check a number of layers.

    Raises:
        ConversionError: names file, field, value and the layers of the tensors.
    """
    numbers = sorted({int(match[1]) for match in map(re.compile(pattern).fullmatch, tensors) if match})
    # Missing and additional layers are left to the comparison of all tensors, which lists them.
    is_complete = bool(numbers) and numbers == list(range(len(numbers)))
    if value > len(tensors) or (is_complete and value != len(numbers)):
        raise ConversionError(
            f"{path}: {field}={shown(value)}, but the weights have {len(numbers)} layers in {len(tensors)} tensors. "
            "Check that the file belongs to the weights."
        )


def check_sizes(
    path: Path, config: dict[str, Any], tensors: dict[str, Tensor], sizes: dict[str, Size], *, section: str = ""
) -> None:
    """Check the fields that are dimensions of tensors. Of several tensors, what most of them have counts.

    Raises:
        ConversionError: names file, field, value, tensor and its shape.
    """
    prefix = f"{section}." if section else ""
    for field, (pattern, dim) in sizes.items():
        names = [name for name in tensors if re.fullmatch(pattern, name) and tensors[name].dim() > dim]
        if not isinstance(config.get(field), int) or not names:
            continue
        found, _ = Counter(tensors[name].shape[dim] for name in names).most_common(1)[0]
        if config[field] != found:
            name = next(name for name in names if tensors[name].shape[dim] == found)
            raise ConversionError(
                f"{path}: {prefix}{field}={shown(config[field])}, but {name} has shape {tuple(tensors[name].shape)}. "
                "Check that the file belongs to the weights."
            )
