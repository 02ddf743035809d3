"""Convert chat messages with images to samples: a line "Kate is <image>" introduces Kate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from idavlm.data import Sample, parse_sample
from idavlm.data.photos import PhotoLoader
from idavlm.data.readers import read_qwen_vl


def sample_of(messages: Sequence[dict[str, Any]], folder: Path, name: str) -> Sample:
    """Convert messages to a sample. Its images are written to ``folder``.

    Args:
        messages: ``{"role", "content": [{"type": "text", "text"} | {"type": "image", "url"}]}``; ``url`` is a PIL image
            or a file.
        folder: folder for the images.
        name: id of the sample, unique within ``folder``.

    Raises:
        ValueError: video or audio content.
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
                image = PhotoLoader().load(part["url"], field=f"{name}: image {len(images) - 1}")
                image.save(folder / path, compress_level=1)
                text += f"<img>{path}</img>"
            else:
                raise ValueError(f"content of type {part['type']!r} is not supported; pass text and images only.")
        turns.append({"from": message["role"], "value": text})
    record = read_qwen_vl({"id": name, "conversations": turns}, name)
    # The schema requires an answer of evaluation records. It is not used: lmms-eval scores the answers.
    return parse_sample(record | {"type": "caption_single", "answer": "-"}, where=name, image_root=folder)
