"""Images within an HTML page: small copies with boxes, as base64 text."""

import base64
import io
from collections.abc import Sequence

from PIL import Image, ImageDraw


def small_jpeg(image: Image.Image, side: int, boxes: Sequence[tuple[Sequence[float], str]] = ()) -> str:
    """Return a copy of an image as base64 text of a JPEG file, for ``src="data:image/jpeg;base64,..."``.

    Args:
        image: an RGB image.
        side: longest side of the copy in pixels; a smaller image keeps its size.
        boxes: boxes ``[x1, y1, x2, y2]`` in pixels of ``image`` and their colours. The part of a box that lies in the
            image is drawn; a box without extent is not.
    """
    scale = min(1.0, side / max(image.size))
    small = image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(small)
    for box, colour in boxes:
        x1, y1, x2, y2 = (edge * scale for edge in box)
        x1, x2 = (min(max(edge, 0.0), small.width) for edge in (x1, x2))
        y1, y2 = (min(max(edge, 0.0), small.height) for edge in (y1, y2))
        if x1 < x2 and y1 < y2:
            draw.rectangle([x1, y1, x2, y2], outline=colour, width=3)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return base64.b64encode(buffer.getvalue()).decode()
