"""P-Bench of PVIT: questions about people whose faces the question introduces, some without an answer (2410.07113)."""

import itertools
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from idavlm.data.errors import DataError, quote
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.evaluation.scoring import ReadBox, word_f1
from idavlm.evaluation.tasks.base import EvaluationTask, Item
from idavlm.evaluation.tasks.benchmark_records import field, iterate_records, question_sample
from idavlm.evaluation.tasks.constant_answers import constant_answer_table
from idavlm.utils import markdown_table
from idavlm.utils.answer_parsing import is_refusal, parse_letter, says_absent

_OPTION = re.compile(r"(?:^|\s)\(?([A-H])[.):]\s*\S")
_LETTER = re.compile(r"\s*\(?([A-H])(?:[.):](?:\s.*)?|\s*)", re.DOTALL)
# The introductions of PVIT's templates: "Here is Ann in a photo.", "This is Ann's portrait.", "This is a photo of Ann."
_INTRODUCTIONS = (
    re.compile(r"(?:This|Here) is (?!an? )(?P<name>[^\n]+?)(?:'s (?:portrait|picture)| in an? [\w ]+)\."),
    re.compile(
        r"(?:This|Here)\b[\w ]*? (?:of|you see|features|featuring|shows|showing|depicts|portrays|presents|captures"
        r"|capturing|highlights|highlighting) (?P<name>[^\n]+)\."
    ),
)
# A refusal of PVIT denies that the person is in the image, or is known.
_DENIAL = re.compile(
    r"n't\b|\b(?:not|no|cannot|nowhere|absent|missing|lacks?|excludes?|fails? to|beyond|unfamiliar|unaware|unknown"
    r"|unanswerable|unable|unclear|clueless|at a loss)\b",
    re.IGNORECASE,
)
_OF_PERSON = re.compile(
    r"\b(?:images?|pictures?|photos?|scene|here|face|see|seen|find|found|locate|visible|visual\w*|present|appear\w*|shown"
    r"|knows?|known|knowledge|familiar|unfamiliar|acquainted|aware|unaware|unknown|unclear|unanswerable|recogni\w+|identi\w+"
    r"|details?|information|informed|describe|describing|looks?|capabilit\w+|capable|privy|at a loss)\b",
    re.IGNORECASE,
)


def load_pvit(data: Path, images: Path | None) -> list[Item]:
    r"""Load the question file: ``{"image": [paths], "text", "value", "mode"}``, a JSON list.

    Introductions at the start of a line after an ``<image>`` of the text ("<image>\\nThis is a photo of Ann.") become
    identities; photos of introductions in other words stay in the question. ``value`` is the letter of an option, a
    refusal, or a free text. Paths are relative to ``images``, by default the folder ``image`` next to the file.
    """
    root = images if images is not None else data.parent / "image"
    items = []
    for number, (record, where) in enumerate(iterate_records(data)):
        if "conversations" in record:
            raise DataError(
                "the record has 'conversations', so it is a training record of PVIT-3M; pass the question file of "
                "P-Bench, or read PVIT-3M with RecordDataset(..., reader='llava').",
                where=where,
            )
        paths = field(record, ("image",), where, kinds=(list,))
        text, value = field(record, ("text",), where), field(record, ("value",), where)
        mode = field(record, ("mode",), where, kinds=(str, int))
        if text.count("<image>") != len(paths):
            raise DataError(
                f"the text has {text.count('<image>')} <image> placeholders for {len(paths)} images.", where=where
            )
        identities, scenes, rest = _take_introductions(text, paths)
        question = {"id": number, "text": rest, "image": scenes, "identities": identities}
        options = _options(rest)
        task, answer = _kind(value, options, where)
        sample = question_sample(question, where, root=root, task=task, answer=answer)
        people = len(identities)
        groups = {"mode": str(mode), "people": ">=4" if people >= 4 else str(people)}
        items.append(Item(sample, groups, {"options": options}))
    return items


def _take_introductions(text: str, paths: list) -> tuple[list[dict], list, str]:
    """Identities, the images that introduce nobody, and the text without the introductions."""
    before, *after = text.split("<image>")
    identities: dict[str, list] = {}
    scenes, rest = [], before
    for path, part in zip(paths, after, strict=True):
        line, _, more = part.lstrip().partition("\n")
        matches = [pattern.fullmatch(line.strip()) for pattern in _INTRODUCTIONS]
        name = next((match["name"] for match in matches if match), None)
        if name is None:
            scenes.append(path)
            rest += "<image>" + part
        else:
            identities.setdefault(name, []).append(path)
            rest += more
    return [{"name": name, "images": photos} for name, photos in identities.items()], scenes, rest


def _options(text: str) -> list[str]:
    """The letters of the options in a question: A, B, ... without a gap; none if there is one letter only."""
    found = set(_OPTION.findall(text))
    letters = list(itertools.takewhile(found.__contains__, "ABCDEFGH"))
    return letters if len(letters) > 1 else []


def _kind(value: str, options: list[str], where: str) -> tuple[str, str]:
    """Task and right answer: a letter, a refusal, or a free text."""
    letter = _LETTER.fullmatch(value)
    if letter and options:
        if letter[1] not in options:
            raise DataError(f"value={quote(value)} is not one of the options {', '.join(options)}.", where=where)
        return "choice", letter[1]
    return ("unanswerable", value) if declines(value) else ("description", value)


def declines(text: str) -> bool:
    """Whether the first sentence of a text says that the person is not in the image, or is not known."""
    first = re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0]
    is_short = len(text.split()) <= 3 and says_absent(text)
    denies = _DENIAL.search(first) is not None and _OF_PERSON.search(first) is not None
    return is_refusal(text) or is_short or denies


def score_pvit(items: Sequence[Item], answers: Sequence[Answer], read_box: ReadBox | None) -> EvaluationResult:
    """Score ``accuracy`` of choices and of unanswerable questions, which are right if the answer declines.

    Descriptions score ``word_f1``. No scorer is released.
    """
    predictions = []
    for item, answer in zip(items, answers, strict=True):
        text, gold, task = answer.prediction or "", item.sample.answer, item.sample.task
        letter = parse_letter(text) if item.extra["options"] else None
        refuses = letter is None and bool(text.strip()) and declines(text)
        chance, parsed = {}, True
        if task == "choice":
            scores, parsed = {"accuracy": float(letter == gold)}, letter is not None
            chance = {"accuracy": 1 / len(item.extra["options"])}
        elif task == "unanswerable":
            scores, parsed = {"accuracy": float(refuses)}, bool(text.strip())
        else:
            scores = {"word_f1": 0.0 if refuses else word_f1(text, gold)}
        problem = "refused" if refuses and task != "unanswerable" else ""
        predictions.append(Prediction(item.sample.id, task, text, gold, scores, chance, parsed=parsed, problem=problem))
    return EvaluationResult(predictions)


def pvit_scores(items: Sequence[Item], result: EvaluationResult) -> dict[str, float]:
    """Accuracy of choices by the number of introduced people, of unanswerable questions, and the mean of both kinds."""
    rows: dict[str, list[float]] = {}
    for item, prediction in zip(items, result.predictions, strict=True):
        if prediction.task == "choice":
            rows.setdefault(f"choice, {item.groups['people']} people", []).append(prediction.scores["accuracy"])
    scores = {name: sum(values) / len(values) for name, values in sorted(rows.items())}
    means = [
        result.summary[task]["metrics"]["accuracy"] for task in ("choice", "unanswerable") if task in result.summary
    ]
    if "unanswerable" in result.summary:
        scores["unanswerable"] = means[-1]
    return scores | ({"mean of choice and unanswerable": sum(means) / 2} if len(means) == 2 else {})


def _summary(items: Sequence[Item], result: EvaluationResult) -> str:
    rows = [[name, f"{score:.3f}"] for name, score in pvit_scores(items, result).items()]
    unread = sum(not item.sample.identities for item in items)
    letters = sorted({letter for item in items for letter in item.extra["options"]})
    constants = {letter: letter for letter in letters} | {"a refusal": "Sorry, I do not know who that is."}
    parts = ["## P-Bench", markdown_table(["questions", "accuracy"], rows)] if rows else ["## P-Bench"]
    parts.append(f"{unread} of {len(items)} items introduce nobody in the words of PVIT's templates.")
    return "\n\n".join([*parts, constant_answer_table(items, partial(score_pvit, read_box=None), constants)])


PVIT = EvaluationTask(
    name="pvit",
    description="P-Bench of PVIT: choices about introduced people, and questions without an answer (question file)",
    load=load_pvit,
    score=score_pvit,
    judged=("description",),
    summary=_summary,
    max_new_tokens=256,
)
