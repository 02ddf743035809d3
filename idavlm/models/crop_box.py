"""The crop box: the part of an image that an image processor keeps. CLIP crops the centre, others pad or stretch."""

import numpy as np
import torch
from PIL import Image

FULL_IMAGE = (0.0, 0.0, 1.0, 1.0)


def crop_box(image_processor, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of the part that is kept, relative to the (height, width) of the image.

    The function processes an image whose colours encode positions, so it works for any processor that resizes, crops
    or pads. The edges are exact to a few thousandths. With padding they lie outside 0..1.
    """
    if _stretches(image_processor):
        return FULL_IMAGE
    height, width = size
    ramp = np.full((height, width, 3), 255, np.uint8)
    ramp[..., 0] = np.round((np.arange(width) + 0.5) / width * 255)
    ramp[..., 1] = np.round((np.arange(height) + 0.5) / height * 255)[:, None]
    images = [Image.fromarray(pixels) for pixels in (ramp, np.zeros_like(ramp), np.full_like(ramp, 255))]
    output, dark, light = (image_processor([image], return_tensors="pt")["pixel_values"][0].float() for image in images)
    inside = (light - dark).abs().amin(0) > 1e-3
    place = (output - dark) / torch.where(inside, light - dark, 1.0)
    left, right = _ends(place[0], inside)
    top, bottom = _ends(place[1].T, inside.T)
    return left, top, right, bottom


def _stretches(image_processor) -> bool:
    """Return whether the processor resizes the whole image to a fixed height and width, by its settings."""
    size = getattr(image_processor, "size", None) or {}
    moves = any(getattr(image_processor, name, False) for name in ("do_center_crop", "do_pad"))
    return bool("height" in size and "width" in size and getattr(image_processor, "do_resize", False) and not moves)


def _ends(place: torch.Tensor, inside: torch.Tensor) -> tuple[float, float]:
    """Return start and end of a line fitted through the columns of ``place``; padding does not count."""
    columns = inside.any(0).nonzero().flatten()[1:-1]  # edges are blurred
    values = (place * inside).sum(0)[columns] / inside.sum(0)[columns]
    centres = (columns + 0.5) / place.shape[1]
    slope = ((centres - centres.mean()) * (values - values.mean())).sum() / (centres - centres.mean()).square().sum()
    begin = values.mean() - slope * centres.mean()
    return float(begin), float(begin + slope)
