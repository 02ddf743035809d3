"""Questions about personal concepts, as Yo'LLaVA, MyVLM, RAP and MC-LLaVA ask them: photos, options, scores."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from idavlm.data.errors import DataError, quote
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.evaluation.tasks.base import Item
from idavlm.evaluation.tasks.constant_answers import ConstantAnswer
from idavlm.utils import contains_name, markdown_table, plain_answer
from idavlm.utils.answer_parsing import is_refusal, parse_letter, parse_yes_no

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

Released = Callable[[Item, str], "dict[str, float]"]
"""``released(item, text)``: the scores of the benchmark's own scorer; it may leave out what that scorer leaves out."""


def photos_in(folder: Path, root: Path) -> list[str]:
    """Paths of the photos in ``folder`` relative to ``root``, in the order of the numbers in their names.

    Masks (``0_mask.png``) are no photos.

    Raises:
        DataError: the folder does not exist or holds no photo.
    """
    files = list(folder.iterdir()) if folder.is_dir() else []
    found = [file for file in files if file.suffix.lower() in PHOTO_SUFFIXES and not file.stem.endswith("_mask")]
    if not found:
        raise DataError(f"{folder} holds no photo ({', '.join(PHOTO_SUFFIXES)}); add the photos of the release.")
    return [file.relative_to(root).as_posix() for file in sorted(found, key=_number_order)]


def _number_order(file: Path) -> tuple:
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", file.name))


def entries(value: Any, where: str) -> Mapping[str, dict]:
    """``value``, after the check that it is an object whose values are objects."""
    if not isinstance(value, dict) or not value:
        raise DataError(f"{quote(value)} is not an object of records.", where=where)
    for key, entry in value.items():
        if not isinstance(entry, dict):
            raise DataError(f"{quote(entry)} is not a record; expected a JSON object.", where=f"{where}: {key}")
    return value


def options_of(record: Mapping[str, Any], name: str, where: str) -> dict[str, str]:
    """The options of a record by their letters A, B, ..., after the check that ``correct_answer`` is one of them."""
    options = record.get(name)
    letters = [chr(ord("A") + number) for number in range(len(options))] if isinstance(options, dict) else []
    if len(letters) < 2 or list(options) != letters or not all(isinstance(text, str) for text in options.values()):
        raise DataError(f"{name}={quote(options)} must be texts by letters in order, from A on.", where=where)
    if record.get("correct_answer") not in letters:
        raise DataError(
            f"correct_answer={quote(record.get('correct_answer'))} is not one of the letters {', '.join(options)}.",
            where=where,
        )
    return options


def choice_question(question: str, options: Mapping[str, str]) -> str:
    """A question with its options, in the words of RAP."""
    listed = "".join(f"{letter}. {text}\n" for letter, text in options.items())
    return f"Question: {question}\nOptions:\n{listed}Please give a single character from the options above. \n"


def score_questions(
    items: Sequence[Item], answers: Sequence[Answer], released: Released | None = None
) -> EvaluationResult:
    """Score answers to questions about concepts. A refusal is neither yes nor no: it scores 0 and is counted.

    - ``recognition``: ``positive`` or ``negative``, the accuracy where the answer is yes or no.
    - ``choice_v``, ``choice_t``: ``accuracy``; the number of options is ``extra["options"]``, None if unknown.
    - ``caption``: ``recall``, the share of the names in ``extra["names"]`` that the answer holds as whole words, with
      or without the brackets of ``<name>``. If ``extra["others"]`` has further names: ``precision``, the share of names
      in the answer that are among the right ones.
    """
    predictions = []
    for item, answer in zip(items, answers, strict=True):
        text, sample, chance = answer.prediction or "", item.sample, {}
        parsed = True
        if sample.task == "recognition":
            said, right = parse_yes_no(text), parse_yes_no(sample.answer)
            parsed, metric = said is not None, "positive" if right else "negative"
            scores, chance = {metric: float(said is right)}, {metric: 0.5}
        elif sample.task.startswith("choice"):
            count = item.extra["options"]
            letter = parse_letter(text, count=count)
            parsed, scores = letter is not None, {"accuracy": float(letter == sample.answer)}
            chance = {"accuracy": 1 / count} if count else {}
        else:
            scores = _caption_scores(text, item.extra["names"], item.extra.get("others", ()))
        if released is not None:
            scores |= released(item, text)
        has_answer = parsed and (sample.task != "caption" or scores["recall"] > 0)
        problem = "refused" if not has_answer and is_refusal(text) else ""
        predictions.append(
            Prediction(sample.id, sample.task, text, sample.answer, scores, chance, parsed=parsed, problem=problem)
        )
    return EvaluationResult(predictions)


def _caption_scores(text: str, names: Iterable[str], others: Iterable[str]) -> dict[str, float]:
    text = plain_answer(text)
    found = [contains_name(text, bare(name)) for name in names]
    scores = {"recall": fmean(found)}
    if others:
        wrong = sum(contains_name(text, bare(name)) for name in others)
        scores["precision"] = sum(found) / (sum(found) + wrong) if sum(found) + wrong else 0.0
    return scores


def bare(name: str) -> str:
    """``name`` without the brackets of ``<name>``."""
    return name.strip("<>")


def constant_questions(items: Sequence[Item]) -> dict[str, ConstantAnswer]:
    """The constant answers to questions about concepts: yes and no, and each letter that is right somewhere."""
    is_choice = {item.sample.id: item.sample.task.startswith("choice") for item in items}
    letters = {item.sample.answer for item in items if is_choice[item.sample.id]} | {"A", "B"}

    def always(text: str, *, of_choices: bool) -> ConstantAnswer:
        def answer(item: Item) -> str | None:
            fits = is_choice[item.sample.id] if of_choices else item.sample.task == "recognition"
            return text if fits else None

        return answer

    yes_no = {f"always {text}": always(text, of_choices=False) for text in ("Yes", "No")}
    return yes_no | {f"always {letter}": always(letter, of_choices=True) for letter in sorted(letters)}


def recognition_by_concept(items: Sequence[Item], result: EvaluationResult) -> str:
    """Markdown table of ``positive``, ``negative`` and ``weighted``, over pairs and as means over concepts.

    ``weighted`` is the mean of both classes, as in Yo'LLaVA, whose paper does not say over what its figures average.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for item, prediction in zip(items, result.predictions, strict=True):
        for metric in ("positive", "negative"):
            if prediction.task == "recognition" and metric in prediction.scores:
                of_concept = values.setdefault(metric, {}).setdefault(item.groups["concept"], [])
                of_concept.append(prediction.scores[metric])
    if len(values) < 2:
        return ""
    over_pairs = [fmean(score for scores in found.values() for score in scores) for found in values.values()]
    over_concepts = [fmean(map(fmean, found.values())) for found in values.values()]
    rows = [
        [label, *(f"{value:.3f}" for value in (*means, fmean(means)))]
        for label, means in (("pairs", over_pairs), ("concepts", over_concepts))
    ]
    return "## Recognition\n\n" + markdown_table(["mean over", *values, "weighted"], rows)


def with_missing_parts(items: Sequence[Item], parts: Sequence[str]) -> list[Item]:
    """The items with ``extra["missing"]``: what the report lists as not evaluated."""
    return [replace(item, extra={**item.extra, "missing": tuple(parts)}) for item in items]


def missing_parts(items: Sequence[Item]) -> str:
    """Markdown list of what was left out, from ``extra["missing"]`` of the items."""
    parts = dict.fromkeys(part for item in items for part in item.extra.get("missing", ()))
    return "## Not evaluated\n\n" + "\n".join(f"- {part}" for part in parts) if parts else ""
