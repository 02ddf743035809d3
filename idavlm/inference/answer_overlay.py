"""Boxes and identity maps drawn onto an image."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from idavlm.inference.identity_answer import IdentityMap, NamedBox

COLOURS = ((230, 60, 40), (40, 110, 220), (30, 150, 80), (220, 150, 20), (150, 70, 200), (20, 160, 170))
"""Colours of the identities, in the order of their introduction; they repeat."""


def draw_boxes(image: Image.Image, boxes: Sequence[NamedBox], names: Sequence[str] = ()) -> Image.Image:
    """Return a copy of ``image`` with boxes and the names of their identities.

    Args:
        image: the image that the boxes are about, in its original size.
        boxes: boxes of an answer.
        names: names of all identities; the number of a name determines its colour.
    """
    drawn = image.convert("RGB")
    canvas, width = ImageDraw.Draw(drawn), max(2, min(image.size) // 100)
    for box in boxes:
        colour = COLOURS[names.index(box.name) % len(COLOURS)] if box.name in names else COLOURS[0]
        canvas.rectangle(box.box, outline=colour, width=width)
        if box.name:
            left, _, right, bottom = canvas.textbbox((0, 0), box.name)
            x, y = box.box[0], max(box.box[1] - bottom - 2, 0)
            canvas.rectangle([x, y, x + right - left + 4, y + bottom + 2], fill=colour)
            canvas.text((x + 2, y), box.name, fill=(255, 255, 255))
    return drawn


def draw_identity_map(image: Image.Image, identity_map: IdentityMap, name: str, *, opacity: float = 0.6) -> Image.Image:
    """Return a copy of ``image`` on which the patches that attend to the photos of ``name`` glow.

    Args:
        image: the image that the map is about, in its original size.
        identity_map: the map of this image.
        name: an identity of the map.
        opacity: opacity of the colour at the patch with the largest share. The others are relative to it, or to 1/2 if
            no patch has a larger share.
    """
    share = identity_map.share(name).numpy()
    left, top, right, bottom = identity_map.crop_box
    crop = [
        round(left * image.width),
        round(top * image.height),
        round(right * image.width),
        round(bottom * image.height),
    ]
    scaled = (255 * opacity * share / max(float(share.max()), 0.5)).astype(np.uint8)
    heat = Image.fromarray(scaled).resize((crop[2] - crop[0], crop[3] - crop[1]), Image.Resampling.BILINEAR)
    mask = Image.new("L", image.size)
    mask.paste(heat, (crop[0], crop[1]))  # what lies outside the image is padding of the processor
    colour = COLOURS[identity_map.names.index(name) % len(COLOURS)]
    return Image.composite(Image.new("RGB", image.size, colour), image.convert("RGB"), mask)
