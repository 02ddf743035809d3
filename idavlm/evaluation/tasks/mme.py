"""MME: two yes/no questions a picture, accuracy by question and accuracy+ by picture (arXiv 2306.13394)."""

from collections.abc import Sequence
from pathlib import Path

from idavlm.data.errors import DataError
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.parsing import parse_yes_no
from idavlm.evaluation.report import markdown_table
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.evaluation.scoring import ParseBox
from idavlm.evaluation.tasks.questions import question
from idavlm.evaluation.tasks.task import EvaluationTask, Item

COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_PICTURES = (".jpg", ".jpeg", ".png")


def load_mme(data: Path, images: Path | None) -> list[Item]:
    """The released folder: a folder a category, with ``NAME.txt`` of ``question<tab>Yes|No`` lines for every picture.

    Pictures stand beside the texts, or in ``images`` with the texts in ``questions_answers_YN``; both are in use.
    """
    root, items = images if images is not None else data, []
    if not data.is_dir():
        raise DataError(f"{data} is no folder; give MME's release, a folder a category.")
    for text in sorted(data.rglob("*.txt")):
        folder = text.parent.parent if text.parent.name == "questions_answers_YN" else text.parent
        if folder == data:
            continue  # notes of the release
        beside = folder.relative_to(data) / ("images" if text.parent != folder else "")
        found = [name for end in _PICTURES if (root / (name := str(beside / f"{text.stem}{end}"))).is_file()]
        image = found[0] if found else str(beside / f"{text.stem}.jpg")
        category = folder.relative_to(data).as_posix()
        lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
        for number, line in enumerate(lines, 1):
            where = f"{text}:{number}"
            asked, tab, answer = line.rpartition("\t")
            if not tab or parse_yes_no(answer) is None:
                raise DataError(f"{line[:80]!r} is no question, a tab, and Yes or No.", where=where)
            name = f"{category}/{text.stem}#{number}"
            sample = question(name, asked.strip(), [image], type="mme", where=where, root=root, answer=answer.strip())
            ability = "cognition" if category in COGNITION else "perception"
            groups = {"ability": ability, "category": category}
            items.append(Item(sample, groups, {"picture": f"{category}/{text.stem}", "first": number == 1}))
    if not items:
        raise DataError(f"{data} holds no category with .txt files; give MME's release.")
    return items


def score_mme(items: Sequence[Item], answers: Sequence[Answer], parse_box: ParseBox | None) -> EvaluationResult:
    """``accuracy`` of every question; ``accuracy_plus`` of every picture, counted with its first question."""
    said = [parse_yes_no(answer.prediction or "") for answer in answers]
    right = [one is parse_yes_no(item.sample.answer) for one, item in zip(said, items, strict=True)]
    pictures: dict[str, list[bool]] = {}
    for item, one in zip(items, right, strict=True):
        pictures.setdefault(item.extra["picture"], []).append(one)
    predictions = []
    for item, answer, one, correct in zip(items, answers, said, right, strict=True):
        scores, chance = {"accuracy": float(correct)}, {"accuracy": 0.5}
        if item.extra["first"]:
            together = pictures[item.extra["picture"]]
            scores["accuracy_plus"] = float(all(together))
            chance["accuracy_plus"] = 0.5 ** len(together)
        text = answer.prediction or ""
        sample = item.sample
        predictions.append(
            Prediction(sample.id, sample.task, text, sample.answer, scores, chance, parsed=one is not None)
        )
    return EvaluationResult(predictions)


def mme_scores(items: Sequence[Item], result: EvaluationResult) -> dict[str, float]:
    """MME's own numbers: 100 (accuracy + accuracy+) of every category, and their sums over each ability."""
    by_category: dict[str, list[Prediction]] = {}
    ability = {}
    for item, prediction in zip(items, result.predictions, strict=True):
        by_category.setdefault(item.groups["category"], []).append(prediction)
        ability[item.groups["category"]] = item.groups["ability"]
    scores = {
        category: 100 * sum(EvaluationResult(found).summary["mme"]["metrics"].values())
        for category, found in by_category.items()
    }
    sums = {
        f"{one} (sum)": sum(score for category, score in scores.items() if ability[category] == one)
        for one in dict.fromkeys(ability.values())
    }
    return scores | sums


def _summary(items: Sequence[Item], result: EvaluationResult) -> str:
    rows = [[name, f"{score:.1f}"] for name, score in mme_scores(items, result).items()]
    return "## MME score\n\n" + markdown_table(["category", "100 (accuracy + accuracy+)"], rows)


MME = EvaluationTask(
    name="mme",
    about="MME: yes/no questions, accuracy and accuracy+ (the released folder)",
    load=load_mme,
    score=score_mme,
    summary=_summary,
    max_new_tokens=16,
)
