"""Tiny checkpoints and data on disk for ``idavlm train``."""

import gc
import json
from pathlib import Path
from typing import Any

from transformers import LlavaProcessor

from idavlm._compat import auto_image_processor
from idavlm.cli.main import main
from idavlm.data import chat_templates
from tests.released import FIXTURES, language_model, llava_tokenizer, tower, transformers_llava
from tests.small_models import IMAGES, draw_images, record

QUICK = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_num_workers": 0,
}
"""Options of a run that takes a second."""


def overrides(**options: Any) -> list[str]:
    """``key=value`` of the command line."""
    return [f"{key}={json.dumps(value, default=str)}" for key, value in options.items()]


def train(config: Path, *flags: str, **options: Any) -> int:
    """``idavlm train`` for a few steps; returns the exit status."""
    gc.collect()
    gc.freeze()  # accelerate collects garbage at each start, which would walk over all imported modules
    return main(["train", str(config), *overrides(**{**QUICK, **options}), *flags])


def write_records(folder: Path, *, count: int = 4) -> Path:
    """Identity, general and evaluation records, and records in LLaVA's format, with images."""
    draw_images(folder / "images", IMAGES)
    question = [{"type": "image", "image": "other.png"}, {"type": "text", "text": "What is it?"}]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "A hat."}]
    llava = [{"from": "human", "value": "<image>\nWho is this?"}, {"from": "gpt", "value": "Kate, who likes tea."}]
    files = {
        "train.jsonl": [record(number) for number in range(count)],
        "general.jsonl": [{"id": f"g{number}", "source": "general", "messages": turns} for number in range(count)],
        "test.jsonl": [{**record(number, answer=False), "id": f"t{number}"} for number in range(2)],
        "llava.jsonl": [{"id": f"l{number}", "image": "kate.png", "conversations": llava} for number in range(count)],
    }
    for name, records in files.items():
        (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in records))
    return folder


def write_parts(folder: Path) -> dict[str, Path]:
    """Folders of a vision tower and of a language model, as on the hub."""
    vision, language = folder / "tower", folder / "language"
    tower().save_pretrained(vision)
    _write_preprocessor(vision)
    language_model().save_pretrained(language)
    llava_tokenizer().save_pretrained(language)
    return {"vision_tower": vision, "language_model": language}


def write_llava(folder: Path) -> Path:
    """A LLaVA of transformers with its processor, as llava-Qwen2-7B-Instruct-Chinese-CLIP is released."""
    transformers_llava(folder)
    _write_preprocessor(folder)
    processor = LlavaProcessor(
        auto_image_processor().from_pretrained(folder),
        llava_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=chat_templates.QWEN_CHATML,
    )
    processor.save_pretrained(folder)
    return folder


def _write_preprocessor(folder: Path) -> None:
    preprocessor = FIXTURES / "llava-1.5-tiny" / "clip-vision-tiny" / "preprocessor_config.json"
    (folder / preprocessor.name).write_text(preprocessor.read_text().replace("56", "28"))
