"""A small identity-aware VLM with its processor, and a sample to feed it: for tests of everything above the modules."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTModel

from idavlm.data import Sample, parse_sample
from idavlm.experimental.small_models import (
    small_image_processor,
    small_language_model,
    small_tokenizer,
    small_vision_tower,
)
from idavlm.models import IDAVLMForConditionalGeneration, IDAVLMProcessor

_PATCHES = {"image_size": 64, "patch_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_WIDTHS = {"hidden_size": 32, "intermediate_size": 64}
TOWERS = {
    "resnet": lambda: small_vision_tower(hidden_size=32),
    "vit": lambda: ViTModel(ViTConfig(**_PATCHES, **_WIDTHS)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**_PATCHES, **_WIDTHS)),
}
TEXTS = [
    "Kate is reading. Tom is waving.",
    "Where is Kate? What is Tom doing?",
    "Picture 1: Kate. Picture 2: Tom.",
] * 20


def small_processor(**options) -> IDAVLMProcessor:
    options = {"image_seq_length": 4, "box_format": "bins32", **options}
    return IDAVLMProcessor(small_image_processor(64), small_tokenizer(TEXTS, vocab_size=320), **options)


def small_model(
    processor: IDAVLMProcessor, *, connector: str = "id_former", tower: str = "resnet", **options
) -> IDAVLMForConditionalGeneration:
    torch.manual_seed(0)
    if connector in ("id_former", "resampler"):
        options = {"num_queries": processor.image_seq_length, "num_heads": 2, **options}
    if connector == "id_former":
        options = {"gate": "none", "null_token": True, **options}
    return IDAVLMForConditionalGeneration.from_parts(
        TOWERS[tower](),
        small_language_model(processor.tokenizer, hidden_size=32),
        image_token_id=processor.image_token_id,
        connector=connector,
        **options,
    ).eval()


def answering_model(processor: IDAVLMProcessor) -> IDAVLMForConditionalGeneration:
    """A small model with large random weights, whose answers depend on the whole prompt."""
    model = small_model(processor, identity_embedding="learned", max_identities=4)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def draw_images(folder: Path, names: list[str], size: tuple[int, int] = (80, 60)) -> Path:
    """Write images of random noise to ``folder``; ``size`` is (width, height)."""
    rng = np.random.default_rng(0)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return folder


def record(number: int = 0, *, people: tuple[str, ...] = ("Kate", "Tom"), answer: bool = True) -> dict:
    """An identity record: one photo each, a scene, a question of each kind."""
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": "scene.png"}, {"type": "text", "text": f"\nWhere is {people[0]}?"}],
        },
        {"role": "assistant", "content": [{"type": "box", "name": people[0]}]},
        {"role": "user", "content": f"What is {people[0]} doing?"},
        {"role": "assistant", "content": f"{people[0]} is reading."},
    ]
    return {
        "id": str(number),
        "source": "identity",
        "identities": [{"name": name, "images": [f"{name.lower()}.png"]} for name in people],
        "messages": messages if answer else messages[:1],
        "boxes": [
            {"name": name, "image": "scene.png", "box": [10 + 30 * place, 10, 35 + 30 * place, 55]}
            for place, name in enumerate(people)
        ],
    } | ({} if answer else {"type": "location", "answer": "", "target": people[0]})


IMAGES = ["kate.png", "tom.png", "scene.png", "other.png"]


def sample(root: Path, **options) -> Sample:
    return parse_sample(record(**options), where="test.jsonl:1", image_root=root)
