"""Images with structure at all scales, which no two seeds share, and records about them: for tests of data tools."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def textured(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """A random RGB image of ``size`` (width, height): coarse areas, finer patches and some noise."""
    rng = np.random.default_rng(seed)
    layers = []
    for cells, amplitude in ((5, 110.0), (14, 60.0), (40, 22.0)):
        values = rng.uniform(0, 255, (cells, cells, 3)).astype(np.uint8)
        layer = Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)
        layers.append((np.asarray(layer, np.float32) / 255 - 0.5) * amplitude)
    noise = rng.normal(0, 3, (size[1], size[0], 3))
    return Image.fromarray((128 + sum(layers) + noise).clip(0, 255).astype(np.uint8))


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


class RecordMaker:
    """Records of Kate and Tom in a scene, each with photos and a scene of its own below ``root``."""

    def __init__(self, root: Path, *, first_seed: int = 0):
        self.root = root
        self.seed = first_seed

    def image(self, name: str) -> str:
        """Write a new image and return its path relative to the root."""
        self.seed += 1
        save(textured(self.seed), self.root / name)
        return name

    def record(self, name: str) -> dict[str, Any]:
        """A record without faults."""
        kate, tom, scene = (self.image(f"{name}/{each}.png") for each in ("kate", "tom", "scene"))
        return {
            "id": name,
            "identities": [{"name": "Kate", "images": [kate]}, {"name": "Tom", "images": [tom]}],
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": scene}, {"type": "text", "text": "\nWhere is Kate?"}],
                },
                {"role": "assistant", "content": [{"type": "box", "name": "Kate"}]},
                {"role": "user", "content": "What is Tom doing?"},
                {"role": "assistant", "content": "Tom is reading."},
            ],
            "boxes": [
                {"name": "Kate", "image": scene, "box": [20, 25, 70, 100]},
                {"name": "Tom", "image": scene, "box": [90, 30, 140, 110]},
            ],
        }

    def question(self, name: str, task: str = "qa_single") -> dict[str, Any]:
        """An evaluation record without faults."""
        record = self.record(name)
        scene = record["boxes"][0]["image"]
        text = {"qa_single": "\nWhat is Kate doing?", "location": "\nWhere is Kate?", "matching": "\nWhich shows Kate?"}
        record["messages"] = [
            {"role": "user", "content": [{"type": "image", "image": scene}, {"type": "text", "text": text[task]}]}
        ]
        record["identities"] = record["identities"][:1]
        record["type"] = task
        answers = {
            "qa_single": {"answer": "Kate is reading.", "false_answers": ["Kate is waving."]},
            "location": {"answer": "", "target": "Kate"},
            "matching": {"answer": "Picture 1", "false_answers": []},
        }
        return record | answers[task]
