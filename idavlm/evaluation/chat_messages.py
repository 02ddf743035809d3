"""Samples as chat messages of other evaluation tools, and back: a line "Kate is <image>" introduces Kate."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from idavlm.data import Sample, parse_sample
from idavlm.data.errors import DataError, quote
from idavlm.data.photos import PhotoLoader
from idavlm.data.readers import read_qwen_vl


def messages_of(sample: Sample, open_image: Callable[[str], Any]) -> list[dict[str, Any]]:
    """Convert a question to messages. The references precede the first user turn, one line "Kate is <image>" each.

    Args:
        sample: an evaluation sample.
        open_image: returns what stands for the image of a path: a PIL image, or another path.

    Returns:
        ``{"role", "content": [{"type": "text", "text"} | {"type": "image", "url": open_image(path)}]}``.

    Raises:
        DataError: a message holds a box, which is written differently for each model.
    """
    introductions: list[dict[str, Any]] = []
    for identity in sample.identities:
        for path in identity.images:
            introductions.append({"type": "text", "text": f"{identity.name} is "})
            introductions.append({"type": "image", "url": open_image(path)})
            introductions.append({"type": "text", "text": "\n"})
    messages = []
    for message in sample.messages:
        content = []
        if message.role == "user":
            content, introductions = introductions, []
        for part in message.content:
            if part.type == "box":
                raise DataError(
                    f"a message holds a box ({quote(part.name)}), which other tools cannot write in the format of "
                    "their model; use idavlm eval.",
                    where=sample.where,
                )
            is_image = part.type == "image"
            content.append(
                {"type": "image", "url": open_image(part.image)} if is_image else {"type": "text", "text": part.text}
            )
        messages.append({"role": message.role, "content": content})
    return messages


def sample_of(
    messages: Sequence[dict[str, Any]], folder: Path, name: str, *, loader: PhotoLoader | None = None
) -> Sample:
    """Convert messages to a sample. Its images are written to ``folder``.

    Args:
        messages: as those of :func:`messages_of`; ``url`` is a PIL image or a file.
        folder: folder for the images.
        name: id of the sample, unique within ``folder``.
        loader: loads the images; by default with the default limits on their size.

    Raises:
        ValueError: video or audio content.
    """
    loader = PhotoLoader() if loader is None else loader
    turns, images = [], []
    for message in messages:
        text = ""
        for part in message["content"]:
            if part["type"] == "text":
                text += part["text"]
            elif part["type"] == "image":
                path = f"{name}-{len(images)}.png"
                images.append(path)
                image = loader.load(part["url"], field=f"{name}: image {len(images) - 1}")
                image.save(folder / path, compress_level=1)
                text += f"<img>{path}</img>"
            else:
                raise ValueError(f"content of type {part['type']!r} is not supported; pass text and images only.")
        turns.append({"from": message["role"], "value": text})
    record = read_qwen_vl({"id": name, "conversations": turns}, name)
    # The schema requires an answer of evaluation records. It is not used: the tool scores the answers.
    return parse_sample(record | {"type": "caption_single", "answer": "-"}, where=name, image_root=folder)
