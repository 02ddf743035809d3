"""MMPB: recognition and preferences of one concept ``<sks>``, by yes/no and multiple-choice questions (2509.22820)."""

import csv
import string
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import quote as quote_path

from idavlm.data.errors import DataError, quote
from idavlm.data.table_records import TableRecords
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.evaluation.scoring import ReadBox
from idavlm.evaluation.tasks.base import EvaluationTask, Item
from idavlm.evaluation.tasks.benchmark_records import field, optional_field, question_sample
from idavlm.evaluation.tasks.constant_answers import constant_answer_table
from idavlm.utils import contains_name
from idavlm.utils.answer_parsing import is_refusal, parse_letter, parse_yes_no

CONCEPT = "<sks>"
"""Name of the concept in all questions."""

LETTERS = "ABCD"
_ANSWERS = dict(enumerate((*LETTERS, "Yes", "No")))
_REFUSALS = (
    "Sorry, I can't help with images of people yet.", "I can't process this file.",
    "I'm sorry, but without the image provided", "Cannot determine the answer",
)  # fmt: skip


def load_mmpb(data: Path, images: Path | None) -> list[Item]:
    """Load the parquet files of the release (a file or their folder), or ``dataset.csv`` of its converters.

    Images of parquet files are written once to ``images``, by default the folder ``images`` next to the files. Those of
    ``dataset.csv`` are relative to ``images``, by default its folder; reference photos are
    ``<attribute>/train/<name>/0.png`` to ``4.png``.
    """
    if (data / "dataset.csv").is_file():
        data = data / "dataset.csv"
    elif (data / "data").is_dir() and not list(data.glob("*.parquet")):
        data = data / "data"  # as on the Hugging Face Hub
    if data.suffix == ".csv":
        root = images if images is not None else data.parent
        rows = _csv_rows(data, root)
    else:
        root = images if images is not None else (data if data.is_dir() else data.parent) / "images"
        rows = _parquet_rows(data, root)
    return [_item(record, where, references, root) for record, references, where in rows]


def _item(record: dict, where: str, references: list[str], root: Path) -> Item:
    options = {letter: record[letter] for letter in LETTERS if optional_field(record, (letter,), where) is not None}
    category = field(record, ("category",), where)
    group = field(record, ("l2-category",), where)
    gold = _gold(record, options, where)
    text = field(record, ("question",), where)
    preference = optional_field(record, ("preference",), where)
    if category == "preference":
        if preference is None:
            raise DataError("a question of category 'preference' has no 'preference'; add it.", where=where)
        text = f"{preference}\n{text}"
    if options:
        text += "\nOptions:\n" + "\n".join(f"{letter}. {option}" for letter, option in options.items())
        text += "\nAnswer with a single letter."
    else:
        text += "\nAnswer with Yes or No."
    question = {"id": field(record, ("index",), where, kinds=(int, str)), "text": text, "image": record["image_path"]}
    question["identities"] = [{"name": CONCEPT, "images": references}]
    task = "choice_v" if options else category
    sample = question_sample(question, where, root=root, task=task, answer=gold)
    groups = {"l2-category": group, "attribute": field(record, ("attribute",), where)}
    return Item(sample, {"category": category, **groups}, {"options": options})


def _gold(record: dict, options: dict[str, str], where: str) -> str:
    """The right answer: a letter, "Yes" or "No". One converter writes these, the other the numbers of the release."""
    value = field(record, ("answer",), where, kinds=(int, str))
    text = str(value).strip()
    gold = _ANSWERS.get(int(text), text) if text.isdecimal() and len(text) == 1 else text
    if gold not in (options or ("Yes", "No")):
        expected = " or ".join(options) if options else "Yes or No"
        raise DataError(
            f"answer={quote(value)} is not {expected}; expected 0 to 3 or the letter of an option, and 4 or Yes, 5 or "
            "No for questions without options.",
            where=where,
        )
    return gold


def _csv_rows(path: Path, root: Path) -> Iterator[tuple[dict, list[str], str]]:
    """Records, reference photos and places of ``dataset.csv``. An empty field is none."""
    csv.field_size_limit(2**24)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(
                        f"the row does not have the {len(reader.fieldnames)} fields of the header.", where=where
                    )
                record = {name: value for name, value in row.items() if value.strip()}
                record["image_path"] = field(record, ("image_path",), where)
                folder = f"{field(record, ('attribute',), where)}/train/{field(record, ('name',), where)}"
                photos = [f"{folder}/{number}.png" for number in range(5)]
                there = [photo for photo in photos if (root / photo).is_file()]
                yield record, there or photos[:1], where
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8 ({error}); write it again with the converter.") from None


def _parquet_rows(path: Path, root: Path) -> Iterator[tuple[dict, list[str], str]]:
    """Records, reference photos and places of parquet files; their images are written to ``root``."""
    records = TableRecords(path)
    for number in range(len(records)):
        record, where = records[number], records.where(number)
        parts = (field(record, ("attribute",), where), field(record, ("name",), where).strip())
        folder = "/".join(quote_path(part, safe=" ") for part in parts)
        scene, references = f"scenes/{number}.png", []
        _write_image(root / scene, record, "image_path", where)
        for count in range(1, 6):
            if record.get(f"injection_image_{count}") is not None:
                references.append(f"references/{folder}/{count}.png")
                _write_image(root / references[-1], record, f"injection_image_{count}", where)
        if not references:
            raise DataError(
                "the row has no 'injection_image_1' to 5, the reference photos of the concept.", where=where
            )
        yield {**record, "image_path": scene}, references, where


def _write_image(path: Path, record: dict, name: str, where: str) -> None:
    image = record.get(name)
    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes) or not content:
        raise DataError(f"{name} holds no image; expected the bytes of an image file.", where=where)
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def score_mmpb(items: Sequence[Item], answers: Sequence[Answer], read_box: ReadBox | None) -> EvaluationResult:
    """Score ``accuracy``: the verdict of the answer is the right one.

    Beside it, what the release scores: ``exact_match`` of yes/no questions (the answer is "Yes" or "No" and nothing
    else), and ``released_accuracy`` of choices (:func:`released_option`).
    """
    predictions = []
    for item, answer in zip(items, answers, strict=True):
        text, gold, options = answer.prediction or "", item.sample.answer, item.extra["options"]
        if options:
            chosen = _option(text, options)
            released = {"released_accuracy": float(released_option(text, options) == gold)}
            chance = 1 / len(options)
        else:
            verdict = parse_yes_no(text)
            chosen = None if verdict is None else "Yes" if verdict else "No"
            released = {"exact_match": float(text.strip() == gold)}
            chance = 0.5
        scores = {"accuracy": float(chosen == gold), **released}
        problem = "refused" if chosen is None and is_refusal(text) else ""
        fields = {"parsed": chosen is not None, "problem": problem}
        predictions.append(
            Prediction(item.sample.id, item.sample.task, text, gold, scores, {"accuracy": chance}, **fields)
        )
    return EvaluationResult(predictions)


def _option(text: str, options: dict[str, str]) -> str | None:
    """The chosen letter, otherwise the only option whose words the answer holds."""
    letter = parse_letter(text)
    if letter is not None:
        return letter if letter in options else None
    named = [letter for letter, option in options.items() if contains_name(text, option)]
    return named[0] if len(named) == 1 and not is_refusal(text) else None


def released_option(text: str, options: dict[str, str]) -> str | None:
    """The option that the released matching finds; None for none.

    It takes the only letter that is a word of the answer, so that "A man eats pizza" chooses A; without one, the only
    option whose text is a substring.
    """
    if any(refusal in text for refusal in _REFUSALS):
        return None
    words = text.translate(str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1:
        return letters[0]
    if not letters and "Z" in words:
        return None
    named = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else None


def _summary(items: Sequence[Item], result: EvaluationResult) -> str:
    letters = [letter for letter in string.ascii_uppercase if any(letter in item.extra["options"] for item in items)]
    return constant_answer_table(
        items, partial(score_mmpb, read_box=None), {text: text for text in ("Yes", "No", *letters)}
    )


MMPB = EvaluationTask(
    name="mmpb",
    description="MMPB: recognition and preferences of a concept (parquet files of the release, or dataset.csv)",
    load=load_mmpb,
    score=score_mmpb,
    summary=_summary,
    max_references=2,  # the default of the release, which has up to 5
    max_new_tokens=32,
)
