"""Rows and columns of the image tokens of transformers' vision-language models."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

SQUARE = (
    "aya_vision",
    "cohere2_vision",
    "gemma3",
    "idefics3",
    "internvl",
    "llava",
    "ovis2",
    "paligemma",
    "smolvlm",
    "vipllava",
)
"""Families whose vision tower makes a square of tokens per entry of ``pooler_output`` or per tile."""

Grid = tuple[int, int]


def token_grids(
    config, lengths: Sequence[int], entries: Sequence[Tensor], arguments: Mapping[str, Any]
) -> tuple[Grid | None, ...]:
    """Return rows and columns of the tokens of each image, or None where they form no grid.

    Tokens of an image that was split into tiles, or that newline tokens separate, form no grid. Boxes then do not
    supervise the image, and its tokens carry no position; all else works.

    Args:
        config: configuration of the model.
        lengths: number of tokens of each image.
        entries: ``pooler_output`` of ``get_image_features``.
        arguments: arguments of ``get_image_features``, for example ``image_grid_thw`` (Qwen-VL, GLM-V).
    """
    vision_config = getattr(config, "vision_config", None)
    if arguments.get("image_grid_thw") is not None:
        merge = getattr(vision_config, "spatial_merge_size", 1)
        return tuple(
            (rows // merge, columns // merge) if frames == 1 else None
            for frames, rows, columns in arguments["image_grid_thw"].tolist()
        )
    if config.model_type == "mistral3":
        side = vision_config.patch_size * config.spatial_merge_size
        return tuple((int(height) // side, int(width) // side) for height, width in arguments["image_sizes"])
    if config.model_type not in SQUARE:
        return (None,) * len(lengths)
    tile = _tokens_per_tile(config, entries, arguments)
    return tuple(_square(length) if length == tile else None for length in lengths)


def _tokens_per_tile(config, entries: Sequence[Tensor], arguments: Mapping[str, Any]) -> int:
    """Number of tokens of one tile. Idefics 3 and SmolVLM join the tiles of a sample in one entry."""
    if config.model_type in ("idefics3", "smolvlm"):
        height, width = arguments["pixel_values"].shape[-2:]
        patch_size = config.vision_config.patch_size
        return (height // patch_size) * (width // patch_size) // config.scale_factor**2
    return entries[0].shape[-2]


def _square(length: int) -> Grid | None:
    side = math.isqrt(length)
    return (side, side) if side * side == length else None
