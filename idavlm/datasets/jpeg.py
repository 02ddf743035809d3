"""How built data sets keep their pictures."""

import io
from pathlib import Path

from PIL import Image


def save_jpeg(image: Image.Image, path: Path) -> None:
    """Write an RGB picture with little loss: quality 92, full colour resolution."""
    # Encoded in memory and written at once: much faster than PIL's own writing to a file.
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=92, subsampling=0)
    path.write_bytes(encoded.getbuffer())
