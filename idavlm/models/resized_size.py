"""The size that an image processor resizes an image to, before it crops."""

import math

_ENLARGEMENT = 256 / 224  # LeViT resizes to a multiple of its size, and the setting does not say so


def resized_size(image_processor, size: tuple[int, int]) -> tuple[int, int]:
    """Return an upper bound of the (height, width) that an image of ``size`` has within the image processor.

    The bound follows from the settings, because an image must be refused before it is decoded. A processor that scales
    the short side to a length (CLIP's) enlarges a narrow image by far more than its output shows.
    """
    height, width = size
    settings = {name: getattr(image_processor, name, None) for name in ("size", "crop_size", "pad_size", "crop_pct")}
    target, crop = (dict(settings[name] or {}) for name in ("size", "crop_size"))
    if getattr(image_processor, "do_pad", False) and not settings["pad_size"]:
        height = width = max(size)  # LLaVA pads to a square before it resizes
    elif {"height", "width"} <= target.keys() and not settings["crop_pct"]:
        return max(height, target["height"]), max(width, target["width"])
    if not getattr(image_processor, "do_resize", True):
        return height, width
    edge = max(target.get("shortest_edge") or max(target.values(), default=0), *crop.values(), 0)
    scale = max(1.0, _ENLARGEMENT * edge / (settings["crop_pct"] or 1.0) / max(min(height, width), 1))
    return math.ceil(height * scale), math.ceil(width * scale)
