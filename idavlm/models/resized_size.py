"""The size that an image processor resizes an image to, before it crops."""

import math


def resized_size(image_processor, size: tuple[int, int]) -> tuple[int, int]:
    """Return an upper bound of the (height, width) that an image of ``size`` has within the image processor.

    The bound follows from the settings, because an image must be refused before it is decoded. A processor that scales
    the short side to a length (CLIP's) enlarges a narrow image by far more than its output shows.
    """
    height, width = size
    settings = {name: getattr(image_processor, name, None) for name in ("size", "crop_size", "pad_size", "crop_pct")}
    target, crop = (_sides(settings[name]) for name in ("size", "crop_size"))
    if getattr(image_processor, "do_pad", False) and not settings["pad_size"]:
        height = width = max(size)  # LLaVA pads to a square before it resizes
    elif {"height", "width"} <= target.keys() and not settings["crop_pct"]:
        return max(height, target["height"]), max(width, target["width"])
    if not getattr(image_processor, "do_resize", True):
        return height, width
    edge = max(target.get("shortest_edge") or max(target.values(), default=0), *crop.values(), 0)
    if type(image_processor).__name__.startswith("Levit"):
        edge *= 256 / 224  # not a setting
    scale = max(1.0, edge / (settings["crop_pct"] or 1.0) / max(min(height, width), 1))
    return math.ceil(height * scale), math.ceil(width * scale)


def _sides(setting) -> dict[str, int]:
    """The named lengths of a setting such as ``size``, which may be a dict, a ``SizeDict``, a number or None."""
    return {"shortest_edge": setting} if isinstance(setting, int) else dict(setting or {})
