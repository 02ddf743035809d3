"""Small models, and batches of every kind for each process."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from idavlm.data import parse_sample
from idavlm.models import IdentityProcessor, attach_id_former
from tests.small_models import IMAGES, draw_images, record, small_model, small_processor
from tests.vlm_families import tiny_model, tiny_processor

SAMPLES_PER_BATCH = 2

KINDS = {
    "identity": ["II", "II", "II", "II"],
    "general": ["GG", "GG", "GG", "GG"],
    "text only": ["TT", "TT", "TT", "TT"],
    "mixed": ["IT", "GR", "TI", "NG"],
    "no boxes": ["NI", "NN", "IN", "NI"],
}
"""For each kind the batches of the steps, one letter per process: identities with boxes (I), without boxes (N),
references without a scene (R), general images (G), text without images (T)."""

COPIES = ("embeddings", "norm", "lm_head", "connector")
CONTRAST = {"contrastive_loss_weight": 0.5}
LEARNED = {"identity_embedding": "learned", "max_identities": 2}


def _own(**options):
    processor = small_processor()
    return small_model(processor, tower="vit", detach_references=False, **options), processor


def _connector(connector: str, **options):
    processor = small_processor(image_seq_length=4 if connector == "resampler" else 16)
    if connector != "resampler":
        options["image_seq_length"] = 16
    return small_model(processor, connector=connector, tower="vit", **options), processor


def _adaptors(*, connector: str = "resampler", **options):
    model, processor = _connector(connector, inner_adaptors={"every": 1, **options})
    for parameter in model.vision_tower.parameters():  # the new parts are trained, and the tower in front of them
        parameter.requires_grad_(True)
    return model, processor


def _attached(family: str, **options):
    torch.manual_seed(0)
    options = {"num_heads": 4, "hidden_size": 32, "gate": "none", "freeze_model": False, **CONTRAST, **options}
    model = attach_id_former(tiny_model(family), **options)
    return model, IdentityProcessor(tiny_processor(family))


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "ID-Former": functools.partial(_own, **CONTRAST, **LEARNED, max_images=4),
    "attached": functools.partial(_attached, "llava", identity_embedding="name", detach_references=False),
    "inner adaptors": functools.partial(_adaptors, modules_to_copy=COPIES),
}
"""The models of the table."""

MORE_MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "ID-Former, frozen": functools.partial(_own, **CONTRAST),
    "ID-Former, names": functools.partial(_own, identity_embedding="name", null_name_token_id=5),
    "linear": functools.partial(_connector, "linear"),
    "MLP": functools.partial(_connector, "mlp2x_gelu"),
    "resampler": functools.partial(_connector, "resampler"),
    "parallel adaptors": functools.partial(_adaptors, composition="parallel"),
    "low-rank adaptors": functools.partial(_adaptors, rank=2),
    "attached, frozen": functools.partial(_attached, "llava", freeze_model=True),
    "attached, DeepStack": functools.partial(_attached, "qwen3_vl", residual_on="all_features", **LEARNED),
    "attached, queries": functools.partial(_attached, "smolvlm", identity_keys="queries", num_queries=2),
}
"""Other connectors and options, with batches that differ between the processes."""

FREEZE = {"ID-Former, frozen": ["vision_tower", "id_former"]}
WORKFLOW = {name: "multimodal" for name in (*MODELS, *MORE_MODELS) if "adaptors" in name}


def build(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """A model, whose losses have its precision, and its processor."""
    set_seed(0)
    model, processor = (MODELS | MORE_MODELS)[name]()
    model.to(dtype)
    if dtype == torch.float64:
        model.loss_function = exact_loss
    return model.train(), processor


def exact_loss(logits, labels, vocab_size=None, shift_labels=None, **_):
    """transformers' causal language model loss without its conversion to float32."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    return nn.functional.cross_entropy(logits.flatten(0, -2), shift_labels.flatten(), ignore_index=-100)


def _record(letter: str, number: int) -> dict[str, Any]:
    people = [("Kate", "Tom"), ("Tom",), ("Tom", "Kate"), ("Kate",)][number % 4]
    answers = ["Kate is reading.", "Tom is waving. Kate is reading.", "Tom.", "Where is Kate? What is Tom doing?"]
    content = {
        "G": [{"type": "image", "image": IMAGES[number % 4]}, {"type": "text", "text": "What is it?"}],
        "T": [{"type": "text", "text": f"Question {number}?"}],
        "R": [{"type": "text", "text": f"Who is {people[0]}?"}],
        "N": [{"type": "image", "image": "scene.png"}, {"type": "text", "text": "What is Kate doing?"}],
    }
    entry = record(number, people=people)
    if letter == "I":
        return entry
    entry |= {
        "id": f"{letter}{number}",
        "boxes": [],
        "messages": [
            {"role": "user", "content": content[letter]},
            {"role": "assistant", "content": answers[number % 4]},
        ],
    }
    if letter in "GT":
        entry = {name: entry[name] for name in ("id", "messages")} | {"source": "general"}
    return entry


def samples(letters: str, processor, images: Path) -> list[dict[str, Any]]:
    """Encoded samples, :data:`SAMPLES_PER_BATCH` for each letter; one process after the other, step after step."""
    encoded = []
    for place, letter in enumerate(letters):
        for number in range(SAMPLES_PER_BATCH * place, SAMPLES_PER_BATCH * (place + 1)):
            parsed = parse_sample(_record(letter, number), where=f"{letter}:{number}", image_root=images)
            encoded.append(processor.encode(parsed))
    return encoded


def prompt(letter: str, processor, images: Path) -> dict[str, Any]:
    """A batch of one prompt for ``generate``."""
    entry = _record(letter, 0) | {"type": "caption_single", "answer": "Tom."}
    entry["messages"] = entry["messages"][:1]
    parsed = parse_sample(entry, where="prompt", image_root=images)
    batch = processor.collate([processor.encode(parsed, add_generation_prompt=True)], padding_side="left")
    return {name: value for name, value in batch.items() if name not in ("labels", "source", "sample_ids")}


def draw(folder: Path) -> Path:
    return draw_images(folder, IMAGES)
