"""Image features of any transformers vision tower, as sequences of patches."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn


def vision_features(
    vision_tower: nn.Module, pixel_values: Tensor, *, layer: int, select: str
) -> tuple[Tensor, tuple[int, int] | None]:
    """Compute one hidden state of a vision tower.

    Convolutional towers return a feature map ``[I, C, H, W]``, transformers a sequence with or without leading tokens.

    Args:
        vision_tower: a transformers vision model.
        pixel_values: ``[I, 3, H, W]``.
        layer: -1 for the output of the tower, -2 for the hidden state before, ...
        select: ``"patch"``, ``"cls"`` or ``"all"``, see :class:`IDAVLMConfig`.

    Returns:
        ``[I, P, C]`` features row by row, and the rows and columns of the grid (None unless ``select`` is ``"patch"``).

    Raises:
        ValueError: the tower has no such layer, or its tokens are not a grid of patches.
    """
    dtype = next((p.dtype for p in vision_tower.parameters() if p.is_floating_point()), pixel_values.dtype)
    # Convolutions keep the memory format, and channels last is faster: up to twice as fast on a CPU.
    pixel_values = pixel_values.to(dtype, memory_format=torch.channels_last)
    if layer == -1:
        hidden = vision_tower(pixel_values).last_hidden_state
        # Some timm models, such as Swin, return channels last.
        if hidden.dim() == 4 and getattr(getattr(vision_tower, "timm_model", None), "output_fmt", "") == "NHWC":
            hidden = hidden.permute(0, 3, 1, 2)
    else:
        states = vision_tower(pixel_values, output_hidden_states=True).hidden_states
        if states is None or len(states) < -layer:
            raise ValueError(
                f"vision_feature_layer={layer}: {type(vision_tower).__name__} has "
                f"{len(states) if states is not None else 'no'} hidden states."
            )
        hidden = states[layer]
    if hidden.dim() == 4:
        if select == "cls":
            raise ValueError(
                f"vision_feature_select='cls': {type(vision_tower).__name__} has no CLS token; use 'patch'."
            )
        return rearrange(hidden, "i c h w -> i (h w) c"), tuple(hidden.shape[2:])
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
    """Derive the grid from the patch size, or else from the largest square that leaves at most 16 leading tokens."""
    patch_size = getattr(vision_tower.config, "patch_size", None)
    if isinstance(patch_size, int):
        grid_size = (image_size[0] // patch_size, image_size[1] // patch_size)
        if 0 < grid_size[0] * grid_size[1] <= num_tokens:
            return grid_size
    side = math.isqrt(num_tokens)
    if num_tokens - side * side > 16 or side == 0:
        raise ValueError(
            f"{type(vision_tower).__name__} returns {num_tokens} tokens for an image of {image_size[1]} x "
            f"{image_size[0]} pixels; neither its patch_size nor a square number separates patches from leading tokens."
        )
    return side, side


def no_features(vision_tower: nn.Module, config) -> Tensor:
    """Return features ``[0, 1, C]`` of zero images."""
    parameter = next(parameter for parameter in vision_tower.parameters() if parameter.is_floating_point())
    return parameter.new_zeros(0, 1, features_width(config))


def features_width(config) -> int:
    """Return the width Cv of the image features of a model with this :class:`IDAVLMConfig`."""
    given = config.connector_config.get("vision_hidden_size")
    return given or output_width(config.vision_config, config.vision_feature_layer)


def output_width(config, layer: int = -1) -> int:
    """Return the width of the hidden state ``layer`` of a tower, from its configuration."""
    width = getattr(config, "hidden_size", None)
    if isinstance(width, int):
        return width
    widths = getattr(config, "hidden_sizes", None)
    if isinstance(widths, (list, tuple)) and -layer <= len(widths):
        return widths[layer]
    return _measured_width(config, layer)


def _measured_width(config, layer: int) -> int:
    """Return the width by running the tower on the meta device."""
    from transformers import AutoModel

    size = getattr(config, "image_size", None) or 224
    size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    try:
        with torch.device("meta"), torch.no_grad():
            tower = AutoModel.from_config(config).eval()
            of_timm = getattr(getattr(tower, "timm_model", None), "pretrained_cfg", None) or {}
            size = tuple(of_timm.get("input_size", size)[-2:])
            pixels = torch.zeros(1, getattr(config, "num_channels", 3), *size)
            return vision_features(tower, pixels, layer=layer, select="all")[0].shape[-1]
    except Exception as error:
        raise ValueError(
            f"vision_config of type {type(config).__name__} has neither hidden_size nor hidden_sizes, and running the "
            f"tower on an image of {size[0]} x {size[1]} pixels fails ({error}); the connector needs the width of the "
            "features: pass vision_hidden_size."
        ) from error
