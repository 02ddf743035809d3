"""Yo'LLaVA (arXiv 2406.09400): recognition of 40 concepts, and questions with two options about their images."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from idavlm.data.errors import DataError, quote
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.results import EvaluationResult
from idavlm.evaluation.scoring import ReadBox
from idavlm.evaluation.tasks.base import EvaluationTask, Item
from idavlm.evaluation.tasks.benchmark_records import field, question_sample, read_object
from idavlm.evaluation.tasks.concept_questions import (
    choice_question,
    constant_questions,
    entries,
    missing_parts,
    options_of,
    photos_in,
    recognition_by_concept,
    score_questions,
    with_missing_parts,
)
from idavlm.evaluation.tasks.constant_answers import constant_answer_table

VISUAL_QUESTIONS = "yollava-visual-qa.json"


def load_yollava(data: Path, images: Path | None) -> list[Item]:
    """Load the folder ``yollava-data``: ``train/<concept>``, ``test/<concept>``, ``yollava-visual-qa.json``.

    Recognition has no file: each concept is asked of every test image. Concepts are written ``<name>``, as released,
    and introduced by the photos of ``train``.
    """
    root = images if images is not None else data
    train, test = root / "train", root / "test"
    for folder in (train, test):
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder; pass yollava-data, which has the folders train and test.")
    concepts = sorted(folder.name for folder in test.iterdir() if folder.is_dir())
    references = {concept: photos_in(train / concept, root) for concept in concepts}
    test_images = {concept: photos_in(test / concept, root) for concept in concepts}
    file = data / VISUAL_QUESTIONS
    missing = ["text-only questions: this release does not have them; the task rap reads those of RAP"]
    if not file.is_file():
        missing.append(f"visual questions: {file} does not exist")
    items = []
    for concept in concepts:
        question = f"Can you see <{concept}> in this photo? Answer with a single word or phrase."
        for shown, paths in test_images.items():
            for path in paths:
                record = {"id": f"recognition/{concept}/{path}", "text": question, "image": path}
                answer = "Yes" if shown == concept else "No"
                items.append(_item(record, str(root / path), root, references, concept, "recognition", answer))
    if file.is_file():
        items += _visual_questions(file, root, references)
    return with_missing_parts(items, missing)


def _visual_questions(file: Path, root: Path, references: dict[str, list[str]]) -> list[Item]:
    items = []
    for concept, questions in entries(read_object(file), str(file)).items():
        if concept not in references:
            raise DataError(f"{quote(concept)} is not one of the concepts in {root / 'test'}.", where=str(file))
        for path, entry in entries(questions, f"{file}: {concept}").items():
            where = f"{file}: {concept}: {path}"
            options = options_of(entry, "options", where)
            question = field(entry, ("question",), where).replace("<sks>", f"<{concept}>")
            # Paths are written from the folder above yollava-data.
            image = PurePosixPath(*PurePosixPath(path).parts[-3:]).as_posix()
            record = {"id": f"choice_v/{image}", "text": choice_question(question, options), "image": image}
            answer = entry["correct_answer"]
            items.append(_item(record, where, root, references, concept, "choice_v", answer, options=len(options)))
    return items


def _item(
    record: dict,
    where: str,
    root: Path,
    references: dict[str, list[str]],
    concept: str,
    task: str,
    answer: str,
    **extra: object,
) -> Item:
    record["identities"] = [{"name": f"<{concept}>", "images": references[concept]}]
    sample = question_sample(record, where, root=root, task=task, answer=answer)
    return Item(sample, {"task": task, "concept": concept}, extra)


def _released(item: Item, text: str) -> dict[str, float]:
    """The released scorer of recognition accepts "Yes" and "No" only, and drops every other answer."""
    if item.sample.task != "recognition" or text not in ("Yes", "No"):
        return {}
    metric = "released_positive" if item.sample.answer == "Yes" else "released_negative"
    return {metric: float(text == item.sample.answer)}


def score_yollava(items: Sequence[Item], answers: Sequence[Answer], read_box: ReadBox | None) -> EvaluationResult:
    """Scores of :func:`score_questions`; ``released_positive`` and ``released_negative`` for "Yes" and "No" only."""
    return score_questions(items, answers, _released)


def _summary(items: Sequence[Item], result: EvaluationResult) -> str:
    constant = constant_answer_table(items, score_questions, constant_questions(items))
    parts = [recognition_by_concept(items, result), constant, missing_parts(items)]
    return "\n\n".join(part for part in parts if part)


YOLLAVA = EvaluationTask(
    name="yollava",
    description="Yo'LLaVA: recognition of 40 concepts, visual questions (folder yollava-data)",
    load=load_yollava,
    score=score_yollava,
    summary=_summary,
    identity_key=lambda name, path: name,
    max_references=5,
    max_new_tokens=16,
)
