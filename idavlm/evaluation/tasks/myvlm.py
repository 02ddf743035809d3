"""MyVLM (arXiv 2403.14599): captions that name a personal object; recall of the name over five random splits."""

import random
from collections.abc import Sequence
from pathlib import Path

from idavlm.data.errors import DataError, quote
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.results import EvaluationResult
from idavlm.evaluation.scoring import ReadBox
from idavlm.evaluation.tasks.base import EvaluationTask, Item
from idavlm.evaluation.tasks.benchmark_records import question_sample, read_object
from idavlm.evaluation.tasks.concept_questions import missing_parts, score_questions, with_missing_parts
from idavlm.evaluation.tasks.constant_answers import constant_answer_table

IDENTIFIER = "sks"
"""Replaces the name of every concept. Real names ("red chicken") would occur in captions that recognise nothing."""

TRAINING_PHOTOS = 4
SPLITS = 5
CAPTION_FILES = ("captions_augmented.json", "captions.json")


def load_myvlm(data: Path, images: Path | None) -> list[Item]:
    """Load the folder of the release: ``<concept>/*.jpg`` with ``captions.json`` or ``captions_augmented.json``.

    In each of five random splits, four photos introduce the concept, and the others are to be captioned.
    """
    root = images if images is not None else data
    if not data.is_dir():
        raise DataError(f"{data} is not a folder; pass the folder of the release, with one folder per concept.")
    folders = sorted(folder for folder in data.iterdir() if folder.is_dir())
    found = {folder: next((name for name in CAPTION_FILES if (folder / name).is_file()), None) for folder in folders}
    missing = ["people: the photos of MyVLM's 16 people are not released"]
    missing += [f"{folder.name}: {folder} has no captions.json" for folder, name in found.items() if name is None]
    items = [
        item for folder, name in found.items() if name is not None for item in _concept(folder, folder / name, root)
    ]
    if not items:
        raise DataError(f"{data} has no folder with {' or '.join(CAPTION_FILES)}; pass the folder of the release.")
    unnamed = sorted({item.sample.message_images[-1] for item in items if IDENTIFIER not in item.sample.answer})
    if unnamed:
        missing.append(f"the target captions of {len(unnamed)} images do not name the concept: {', '.join(unnamed)}")
    return with_missing_parts(items, missing)


def _concept(folder: Path, file: Path, root: Path) -> list[Item]:
    concept, captions = folder.name, read_object(file)
    for name, texts in captions.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise DataError(f"{quote(texts)} is not a list of captions.", where=f"{file}: {name}")
    if len(captions) <= TRAINING_PHOTOS:
        raise DataError(
            f"{file} has {len(captions)} images; {TRAINING_PHOTOS} introduce the concept, so at least "
            f"{TRAINING_PHOTOS + 1} are needed."
        )
    items = []
    for split in range(SPLITS):
        training = random.Random(f"{concept} {split}").sample(sorted(captions), TRAINING_PHOTOS)
        references = [f"{concept}/{name}" for name in training]
        for name in captions:
            if name in training:
                continue
            record = {"id": f"{split}/{concept}/{name}", "text": f"Please caption this image of {IDENTIFIER}."}
            record |= {"image": f"{concept}/{name}", "identities": [{"name": IDENTIFIER, "images": references}]}
            answer = _with_identifier(captions[name][0], concept)
            sample = question_sample(record, f"{file}: {name}", root=root, task="caption", answer=answer)
            items.append(Item(sample, {"split": str(split), "concept": concept}, {"names": [IDENTIFIER]}))
    return items


def _with_identifier(caption: str, concept: str) -> str:
    """As the released code: the name as written for objects, in title case for people."""
    spaced = concept.replace("_", " ")
    for name in (concept, concept.title(), spaced, spaced.title()):
        caption = caption.replace(name, IDENTIFIER)
    return caption


def score_myvlm(items: Sequence[Item], answers: Sequence[Answer], read_box: ReadBox | None) -> EvaluationResult:
    """``recall``: share of captions that name the concept, as a whole word. No scorer is released."""
    return score_questions(items, answers)


def _summary(items: Sequence[Item], result: EvaluationResult) -> str:
    # The question holds the name, so that a model that repeats it has full recall.
    constants = {"the name of the prompt": IDENTIFIER, "no name": "A photo of an object."}
    return f"{constant_answer_table(items, score_questions, constants)}\n\n{missing_parts(items)}"


def _identity_key(name: str, path: str) -> str:
    return path.split("/")[0]  # all concepts have the same name


MYVLM = EvaluationTask(
    name="myvlm",
    description="MyVLM: recall of the name in captions of personal objects (folder of the release)",
    load=load_myvlm,
    score=score_myvlm,
    judged=("caption",),
    summary=_summary,
    identity_key=_identity_key,
    max_references=TRAINING_PHOTOS,
    max_new_tokens=128,
)
