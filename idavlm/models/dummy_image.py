"""The dummy image of a batch without images: every process runs the same modules, whatever its batch holds.

ZeRO-3 and FSDP gather the parameters of a module when it runs, which all processes have to do together. If the batch of
one process has no images, it runs the vision tower on one white image and uses none of its tokens: the outputs are
bit-identical to those without it, and the gradients of the tower are zeros.

This happens where parameters are partitioned or where there are several processes, in training, evaluation and
generation. In one process with whole parameters it only happens where a vision tower is trained, so that the optimizer
takes the same steps; elsewhere it would only take time.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from idavlm.utils.sharding import is_zero3_parameter, num_processes

DEFAULT_IMAGE_SIZE = 224
"""Side of the dummy image of a vision tower whose configuration has no ``image_size``."""


def runs_all_modules(model: nn.Module) -> bool:
    """Whether every forward pass of a model has to run all of its modules, whatever the batch holds."""
    if num_processes() > 1:
        return True
    parameter = next(model.parameters(), None)
    return parameter is not None and is_zero3_parameter(parameter)


def dummy_pixels(vision_tower: nn.Module, device: torch.device) -> Tensor:
    """One white image ``[1, 3, H, W]`` for a vision tower."""
    size = _image_size(vision_tower.config, getattr(vision_tower, "timm_model", None))
    return torch.ones(1, getattr(vision_tower.config, "num_channels", 3), *size, device=device)


def dummy_image_arguments(config, method: Callable, device: torch.device) -> dict[str, Any]:
    """Arguments of ``get_image_features`` of a transformers model for one white image.

    Args:
        config: configuration of the model.
        method: its ``get_image_features``.
        device: the device of the arguments.
    """
    parameters = inspect.signature(method).parameters
    vision_config = getattr(config, "vision_config", config)
    if "image_grid_thw" in parameters:  # Qwen-VL, GLM-V: one row per patch
        side = vision_config.spatial_merge_size
        channels = getattr(vision_config, "in_channels", getattr(vision_config, "in_chans", 3))
        width = channels * vision_config.temporal_patch_size * vision_config.patch_size**2
        return {
            "pixel_values": torch.ones(side**2, width, device=device),
            "image_grid_thw": torch.tensor([[1, side, side]], device=device),
        }
    height, width = _image_size(vision_config)
    pixels = torch.ones(1, getattr(vision_config, "num_channels", 3), height, width, device=device)
    if "pixel_attention_mask" in parameters:  # Idefics 3, SmolVLM: samples of tiles
        mask = torch.ones(1, 1, height, width, dtype=torch.bool, device=device)
        return {"pixel_values": pixels[None], "pixel_attention_mask": mask}
    sizes = parameters.get("image_sizes")
    if sizes is None or sizes.default is not inspect.Parameter.empty:  # LLaVA takes them for another tower
        return {"pixel_values": pixels}
    sizes = torch.tensor([[height, width]], device=device)
    if getattr(config, "image_grid_pinpoints", None) is None:
        return {"pixel_values": pixels, "image_sizes": sizes}
    # LLaVA-NeXT and its kind: the whole image, then the tiles of the grid that fits it best.
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    count = image_size_to_num_patches([height, width], config.image_grid_pinpoints, height)
    return {"pixel_values": pixels.expand(count, -1, -1, -1)[None].contiguous(), "image_sizes": sizes}


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Within the block, batch norms use their running statistics and do not update them."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True


def _image_size(config, timm_model: nn.Module | None = None) -> tuple[int, int]:
    """Height and width of the images of a vision tower."""
    of_timm = (getattr(timm_model, "pretrained_cfg", None) or {}).get("input_size")
    if of_timm is not None:
        return tuple(of_timm[-2:])
    size = getattr(config, "image_size", None) or DEFAULT_IMAGE_SIZE
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)
