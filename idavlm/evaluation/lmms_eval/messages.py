"""Chat messages with pictures to samples: "Kate is <picture>" on a line of its own introduces Kate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from idavlm.data import Sample, parse_sample
from idavlm.data.readers import read_qwen_vl


def sample_of(messages: Sequence[dict[str, Any]], folder: Path, name: str) -> Sample:
    """A sample to answer, its pictures written to ``folder``.

    Args:
        messages: ``{"role", "content": [{"type": "text", "text"} | {"type": "image", "url"}]}``; ``url`` is a picture
            of Pillow or a file.
        folder: for the pictures.
        name: of the sample; different for every sample of a folder.

    Raises:
        ValueError: video or audio.
    """
    turns, images = [], []
    for message in messages:
        text = ""
        for part in message["content"]:
            if part["type"] == "text":
                text += part["text"]
            elif part["type"] == "image":
                path = f"{name}-{len(images)}.png"
                images.append(path)
                _write(part["url"], folder / path)
                text += f"<img>{path}</img>"
            else:
                raise ValueError(f"content of type {part['type']!r}: idavlm reads text and pictures.")
        turns.append({"from": message["role"], "value": text})
    record = read_qwen_vl({"id": name, "conversations": turns}, name)
    # An evaluation record needs an answer; this one is asked, not scored.
    return parse_sample(record | {"type": "caption_single", "answer": "-"}, where=name, image_root=folder)


def _write(picture: Image.Image | str | Path, path: Path) -> None:
    if not isinstance(picture, Image.Image):
        picture = Image.open(picture)
    picture.convert("RGB").save(path, compress_level=1)
