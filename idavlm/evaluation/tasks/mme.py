"""MME: two yes/no questions per image, accuracy per question and accuracy+ per image (arXiv 2306.13394)."""

import os
from collections.abc import Sequence
from pathlib import Path

from idavlm.data.errors import DataError, quote
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.evaluation.scoring import ReadBox
from idavlm.evaluation.tasks.base import EvaluationTask, Item
from idavlm.evaluation.tasks.benchmark_records import question_sample
from idavlm.utils import markdown_table
from idavlm.utils.answer_parsing import is_refusal, parse_yes_no

COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def load_mme(data: Path, images: Path | None) -> list[Item]:
    """Load the released folder: one folder per category, with a file of ``question<tab>Yes|No`` lines per image.

    Images are next to the text files, or in ``images`` with the text files in ``questions_answers_YN``.
    """
    root, items = images if images is not None else data, []
    if not data.is_dir():
        raise DataError(f"{data} is not a folder; pass the release of MME, which has one folder per category.")
    for text in _text_files(data):
        separate = text.parent.name == "questions_answers_YN"
        folder = text.parent.parent if separate else text.parent
        if folder == data:
            continue  # for example a readme
        category = folder.relative_to(data).as_posix()
        image = f"{category}/images/{text.stem}" if separate else f"{category}/{text.stem}"
        # os.path: a root that cannot be a path, for example one that is too long, has no images either.
        files = {suffix: os.path.isfile(root / (image + suffix)) for suffix in (".jpg", ".jpeg", ".png")}
        suffix = next((suffix for suffix, is_there in files.items() if is_there), ".jpg")
        groups = {"ability": "cognition" if category in COGNITION else "perception", "category": category}
        try:
            content = text.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{text} is not UTF-8 ({error}); convert it.") from None
        lines = [line for line in content.splitlines() if line.strip()]
        if not lines:
            raise DataError(f"{text} holds no question; expected a question, a tab, and Yes or No.")
        for number, line in enumerate(lines, 1):
            where = f"{text}:{number}"
            question, tab, answer = line.rpartition("\t")
            if not tab or parse_yes_no(answer) is None:
                raise DataError(f"{quote(line)} is not a question, a tab, and Yes or No.", where=where)
            record = {"id": f"{category}/{text.stem}#{number}", "text": question.strip(), "image": image + suffix}
            sample = question_sample(record, where, root=root, task="mme", answer=answer.strip())
            items.append(Item(sample, groups, {"first": number == 1}))
    if not items:
        raise DataError(f"{data} has no category folder with .txt files; pass the release of MME.")
    return items


def _text_files(folder: Path) -> list[Path]:
    """All text files below a folder. A folder that cannot be read is an error; ``rglob`` would leave it out."""

    def fail(error: OSError) -> None:
        raise error

    found = [Path(root) / name for root, _, names in os.walk(folder, onerror=fail) for name in names]
    return sorted(path for path in found if path.suffix == ".txt")


def score_mme(items: Sequence[Item], answers: Sequence[Answer], read_box: ReadBox | None) -> EvaluationResult:
    """Score ``accuracy`` per question and ``accuracy_plus`` per image; the latter is attached to its first question."""
    parsed = [parse_yes_no(answer.prediction or "") for answer in answers]
    right = [value is parse_yes_no(item.sample.answer) for value, item in zip(parsed, items, strict=True)]
    by_image: dict[str, list[bool]] = {}
    for item, correct in zip(items, right, strict=True):
        by_image.setdefault(item.sample.images[0], []).append(correct)
    predictions = []
    for item, answer, value, correct in zip(items, answers, parsed, right, strict=True):
        sample, scores, chance = item.sample, {"accuracy": float(correct)}, {"accuracy": 0.5}
        if item.extra["first"]:
            of_image = by_image[sample.images[0]]
            scores["accuracy_plus"] = float(all(of_image))
            chance["accuracy_plus"] = 0.5 ** len(of_image)
        text = answer.prediction or ""
        problem = "refused" if value is None and is_refusal(text) else ""
        parsed_fields = {"parsed": value is not None, "problem": problem}
        predictions.append(Prediction(sample.id, "mme", text, sample.answer, scores, chance, **parsed_fields))
    return EvaluationResult(predictions)


def mme_scores(items: Sequence[Item], result: EvaluationResult) -> dict[str, float]:
    """The scores that MME reports: 100 (accuracy + accuracy+) per category, and their sums per ability."""
    ability = {item.groups["category"]: item.groups["ability"] for item in items}
    scores = {}
    for category in ability:
        pairs = zip(items, result.predictions, strict=True)
        found = [prediction for item, prediction in pairs if item.groups["category"] == category]
        scores[category] = 100 * sum(EvaluationResult(found).summary["mme"]["metrics"].values())
    for name in dict.fromkeys(ability.values()):
        scores[f"{name} (sum)"] = sum(scores[category] for category in ability if ability[category] == name)
    return scores


def _summary(items: Sequence[Item], result: EvaluationResult) -> str:
    rows = [[name, f"{score:.1f}"] for name, score in mme_scores(items, result).items()]
    return "## MME score\n\n" + markdown_table(["category", "100 (accuracy + accuracy+)"], rows)


MME = EvaluationTask(
    name="mme",
    description="MME: yes/no questions, accuracy and accuracy+ (folder of the release)",
    load=load_mme,
    score=score_mme,
    summary=_summary,
    max_new_tokens=16,
)
