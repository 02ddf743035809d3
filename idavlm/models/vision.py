"""Image features of any vision tower, as rows of patches."""

import math

import torch
from torch import Tensor, nn


def vision_features(
    vision_tower: nn.Module, pixel_values: Tensor, *, layer: int, select: str
) -> tuple[Tensor, tuple[int, int] | None]:
    """Read one hidden state of a vision tower.

    Convolutional towers give a feature map ``[I, C, H, W]``, transformers a sequence with or without leading tokens.

    Args:
        vision_tower: a transformers vision model.
        pixel_values: ``[I, 3, H, W]``.
        layer: -1 the tower's output, -2 the hidden state before, ...
        select: ``"patch"``, ``"cls"`` or ``"all"``, see :class:`IDAVLMConfig`.

    Returns:
        ``[I, P, C]`` features row by row, and their rows and columns (None unless ``select`` is ``"patch"``).

    Raises:
        ValueError: a tower without such a layer, or whose tokens are no grid of patches.
    """
    dtype = next((p.dtype for p in vision_tower.parameters() if p.is_floating_point()), pixel_values.dtype)
    if layer == -1:
        hidden = vision_tower(pixel_values.to(dtype)).last_hidden_state
    else:
        states = vision_tower(pixel_values.to(dtype), output_hidden_states=True).hidden_states
        if states is None or len(states) < -layer:
            raise ValueError(
                f"vision_feature_layer={layer}: {type(vision_tower).__name__} gives "
                f"{len(states) if states is not None else 'no'} hidden states."
            )
        hidden = states[layer]
    if hidden.dim() == 4:
        if select == "cls":
            raise ValueError(
                f"vision_feature_select='cls': {type(vision_tower).__name__} has no CLS token; use 'patch'."
            )
        return hidden.flatten(2).mT, tuple(hidden.shape[2:])
    if select == "all":
        return hidden, None
    grid_size = _grid_size(vision_tower, hidden.shape[1], pixel_values.shape[2:])
    patches = grid_size[0] * grid_size[1]
    leading = hidden.shape[1] - patches
    if select == "cls":
        if leading == 0:
            raise ValueError(f"vision_feature_select='cls': {type(vision_tower).__name__} has none; use 'patch'.")
        return hidden[:, :leading], None
    return hidden[:, leading:], grid_size


def _grid_size(vision_tower: nn.Module, num_tokens: int, image_size: torch.Size) -> tuple[int, int]:
    """From the patch size where the tower has one; else the largest square that leaves at most 16 leading tokens."""
    patch_size = getattr(vision_tower.config, "patch_size", None)
    if isinstance(patch_size, int):
        grid_size = (image_size[0] // patch_size, image_size[1] // patch_size)
        if 0 < grid_size[0] * grid_size[1] <= num_tokens:
            return grid_size
    side = math.isqrt(num_tokens)
    if num_tokens - side * side > 16 or side == 0:
        raise ValueError(
            f"{type(vision_tower).__name__} gives {num_tokens} tokens for an image of {image_size[1]} x "
            f"{image_size[0]} pixels, and neither its patch_size nor a square tells the patches from leading tokens."
        )
    return side, side


def output_width(config) -> int:
    """Channels of a tower's features, from its configuration."""
    if getattr(config, "model_type", None) == "timm_wrapper":
        from transformers import AutoModel

        with torch.device("meta"):
            return AutoModel.from_config(config).timm_model.num_features
    for name in ("hidden_size", "hidden_sizes", "embed_dim"):
        width = getattr(config, name, None)
        if isinstance(width, (list, tuple)):
            return width[-1]
        if isinstance(width, int):
            return width
    raise ValueError(
        f"vision_config of type {type(config).__name__} has neither hidden_size nor hidden_sizes; the connector needs "
        "the width of the features."
    )
