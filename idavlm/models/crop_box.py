"""The crop box: the part of an image that an image processor keeps. CLIP crops the centre, others pad or stretch."""

import functools
import math

import numpy as np
import torch
from PIL import Image

from idavlm.data import DataError

FULL_IMAGE = (0.0, 0.0, 1.0, 1.0)

_MEASURED_SIDE = 64
"""Smallest side of an image whose crop box is measured. The edges of smaller images are blurred too widely."""

_PRECISION = 4e-3
"""Precision of measured edges. What differs less from the full image is the full image."""


def crop_box(image_processor, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of the part that is kept, relative to the (height, width) of the image.

    For transformers image processors that follow their settings (``size``, ``crop_size``, ``pad_size``; CLIP, SigLIP,
    ViT, LLaVA ...), the box is computed and exact. Others process images whose brightness encodes positions; the edges
    are then exact to a few thousandths. With padding they lie outside 0..1.

    Raises:
        ValueError: the output of the processor is not one part of the image.
        DataError: the image is small, and the processor neither follows its settings nor treats a larger image of the
            same shape alike.
    """
    if _follows_settings(image_processor):
        return _computed(image_processor, size)
    return _measured(image_processor, image_processor.to_json_string(), size)


def crops_images(image_processor) -> bool:
    """Whether the image processor crops images or pads them to a square, without splitting them into tiles."""
    if not getattr(image_processor, "image_grid_pinpoints", None):
        pads = hasattr(image_processor, "pad_to_square") and getattr(image_processor, "do_pad", False)
        return bool(getattr(image_processor, "do_center_crop", False) or pads)
    return False


def _follows_settings(image_processor) -> bool:
    """Whether resizing, cropping and padding are transformers' own, so that the settings say what happens."""
    kind = type(image_processor)
    if not all(hasattr(kind, name) for name in ("_preprocess", "resize", "center_crop", "pad")):
        return False
    of_transformers = {"transformers.image_processing_backends"}
    if kind._preprocess.__module__.startswith("transformers.models.llava.image_processing"):
        of_transformers.add(kind._preprocess.__module__)  # resizes and crops alike, but pads to a square first
    methods = (kind._preprocess, kind.resize, kind.center_crop, kind.pad)
    size, crop_size = _sides(image_processor.size), _sides(image_processor.crop_size)
    return (
        all(method.__module__ in of_transformers for method in methods)
        and (not image_processor.do_resize or size.keys() in ({"height", "width"}, {"shortest_edge"}))
        and (not image_processor.do_center_crop or crop_size.keys() == {"height", "width"})
    )


def _sides(setting) -> dict[str, int]:
    """The named lengths of a setting such as ``size``, which may be a dict, a ``SizeDict`` or None."""
    return {} if setting is None or isinstance(setting, int) else dict(setting)


def _computed(image_processor, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Follow the place of the image in the frame through padding to a square, resizing, cropping and padding."""
    top_left, image = [0.0, 0.0], [float(side) for side in size]  # rows, columns
    frame = list(size)
    pads_to_square = hasattr(image_processor, "pad_to_square")
    if pads_to_square and image_processor.do_pad:
        side = max(frame)
        top_left = [float((side - length) // 2) for length in frame]
        frame = [side, side]
    if image_processor.do_resize:
        target = _sides(image_processor.size)
        if "shortest_edge" in target:
            shortest = target["shortest_edge"]
            new = [shortest if length == min(frame) else int(shortest * length / min(frame)) for length in frame]
        else:
            new = [target["height"], target["width"]]
        top_left, image = (
            [value * after / before for value, after, before in zip(values, new, frame, strict=True)]
            for values in (top_left, image)
        )
        frame = new
    if image_processor.do_center_crop:
        crop = _sides(image_processor.crop_size)
        crop = [crop["height"], crop["width"]]
        # An odd row or column of padding is put before the image by Pillow's backend and after it by torchvision's.
        odd_first = image_processor.backend == "pil"
        for axis, (length, kept) in enumerate(zip(frame, crop, strict=True)):
            padding = (kept - length + odd_first) // 2 if kept > length else -((length - kept) // 2)
            top_left[axis] += padding
        frame = crop
    if not pads_to_square and getattr(image_processor, "do_pad", False) and image_processor.pad_size:
        frame = [image_processor.pad_size["height"], image_processor.pad_size["width"]]
    top, left = (-start / side for start, side in zip(top_left, image, strict=True))
    bottom, right = ((length - start) / side for length, start, side in zip(frame, top_left, image, strict=True))
    return left + 0.0, top + 0.0, right, bottom


@functools.lru_cache(maxsize=4096)
def _measured(image_processor, settings: str, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Measure the crop box. ``settings`` is part of the key of the cache, because settings can change."""
    enlargement = math.ceil(_MEASURED_SIDE / min(size))
    if enlargement == 1:
        return _fit(image_processor, size)
    larger, largest = (_fit(image_processor, (size[0] * n, size[1] * n)) for n in (enlargement, 2 * enlargement))
    if max(abs(a - b) for a, b in zip(larger, largest, strict=True)) > 0.01:
        raise DataError(
            f"an image of {size[1]} x {size[0]} pixels is too small to find out which part of it "
            f"{type(image_processor).__name__} keeps; enlarge it to {_MEASURED_SIDE} pixels or more.",
            kind="image",
        )
    return larger


def _fit(image_processor, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Process two images whose brightness encodes columns and rows, and fit the positions in the output."""
    height, width = size
    columns = np.broadcast_to((np.arange(width) + 0.5) / width * 255, size)
    rows = np.broadcast_to(((np.arange(height) + 0.5) / height * 255)[:, None], size)
    black, white = np.zeros(size), np.full(size, 255)
    images = [
        Image.fromarray(np.repeat(values.round().astype(np.uint8)[..., None], 3, axis=2))
        for values in (columns, rows, black, white)
    ]
    columns, rows, dark, light = (
        image_processor([image], return_tensors="pt")["pixel_values"][0].float().mean(0) for image in images
    )
    inside = (light - dark).abs() > 1e-3
    scale = torch.where(inside, light - dark, 1.0)
    (left, right), (top, bottom) = (
        _ends(image_processor, (columns - dark) / scale, inside),
        _ends(image_processor, ((rows - dark) / scale).T, inside.T),
    )
    found = (left, top, right, bottom)
    is_full = all(abs(edge - full) < _PRECISION for edge, full in zip(found, FULL_IMAGE, strict=True))
    return FULL_IMAGE if is_full else found


def _ends(image_processor, place: torch.Tensor, inside: torch.Tensor) -> tuple[float, float]:
    """Return start and end of a line fitted through the columns of ``place``; padding does not count."""
    columns = inside.any(0).nonzero().flatten()[1:-1]  # edges are blurred
    values = (place * inside).sum(0)[columns] / inside.sum(0)[columns]
    centres = (columns + 0.5) / place.shape[1]
    slope = ((centres - centres.mean()) * (values - values.mean())).sum() / (centres - centres.mean()).square().sum()
    begin = values.mean() - slope * centres.mean()
    error = (values - begin - slope * centres).square().mean().sqrt()
    if not (error < 0.02 and slope > 0):
        raise ValueError(
            f"image_processor={type(image_processor).__name__} does not bring one part of an image to its output as it "
            "is (it may cut images into tiles or mirror them), so boxes cannot be moved; use another image processor."
        )
    return float(begin), float(begin + slope)
