"""Which part of a picture an image processor shows: CLIP's cuts the sides off, others pad, timm's do as they please."""

import numpy as np
import torch
from PIL import Image

WHOLE = (0.0, 0.0, 1.0, 1.0)


def crop_box(image_processor, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what is shown of a picture, in parts of its width and height.

    Found by showing the processor a picture whose colours say where they are, so that it holds for any that resizes,
    cuts or pads; the edges are exact to a few thousandths of the picture. Padding lies outside of 0..1.

    Args:
        image_processor: a transformers image processor.
        size: (height, width) of the picture.
    """
    if _stretches(image_processor):
        return WHOLE
    height, width = size
    ramp = np.full((height, width, 3), 255, np.uint8)
    ramp[..., 0] = np.round((np.arange(width) + 0.5) / width * 255)
    ramp[..., 1] = np.round((np.arange(height) + 0.5) / height * 255)[:, None]
    pictures = [Image.fromarray(picture) for picture in (ramp, np.zeros_like(ramp), np.full_like(ramp, 255))]
    seen, dark, light = (image_processor([one], return_tensors="pt")["pixel_values"][0].float() for one in pictures)
    inside = (light - dark).abs().amin(0) > 1e-3
    place = (seen - dark) / torch.where(inside, light - dark, 1.0)
    left, right = _ends(place[0], inside)
    top, bottom = _ends(place[1].T, inside.T)
    return left, top, right, bottom


def _stretches(image_processor) -> bool:
    """Whether the whole picture is shown, as wide and as high as all others: no need to look."""
    size = getattr(image_processor, "size", None) or {}
    moves = any(getattr(image_processor, name, False) for name in ("do_center_crop", "do_pad"))
    return bool("height" in size and "width" in size and getattr(image_processor, "do_resize", False) and not moves)


def _ends(place: torch.Tensor, inside: torch.Tensor) -> tuple[float, float]:
    """Where a line through the columns of ``place`` begins and ends; what lies beside the picture does not count."""
    columns = inside.any(0).nonzero().flatten()[1:-1]  # edges are blurred
    values = (place * inside).sum(0)[columns] / inside.sum(0)[columns]
    centres = (columns + 0.5) / place.shape[1]
    slope = ((centres - centres.mean()) * (values - values.mean())).sum() / (centres - centres.mean()).square().sum()
    begin = values.mean() - slope * centres.mean()
    return float(begin), float(begin + slope)
