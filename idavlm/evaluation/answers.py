"""Answers of a model before scoring: the file ``predictions.jsonl``, and formats that other projects released."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from idavlm.data.errors import DataError, quote, shorten
from idavlm.data.json_records import JsonRecords
from idavlm.data.schema import Sample
from idavlm.evaluation.choices import CHOICE_TASKS, candidates
from idavlm.evaluation.fingerprints import QUESTION_PARTS, changed_parts, item_fingerprint
from idavlm.utils import append_lines, drop_torn_line, read_json_object, write_text


@dataclass(frozen=True)
class Answer:
    """The answer of a model to one sample.

    Attributes:
        id: id of the sample.
        prediction: generated text; None if the model only ranked the candidates.
        question: text of the question, for readers of the file.
        image_size: height and width of the last image, if known.
        likelihoods: log-likelihood of each of the candidates (the false answers, then the right one), if computed.
        item: what was asked, see :func:`item_fingerprint`, if known.
    """

    id: str
    prediction: str | None
    question: str = ""
    image_size: tuple[int, int] | None = None
    likelihoods: tuple[float, ...] | None = None
    item: Mapping[str, str] | None = field(default=None, compare=False)


def question_text(sample: Sample) -> str:
    """The text after the last image of the last message, or all its text if no text follows the image."""
    parts = sample.messages[-1].content
    last = max((number for number, part in enumerate(parts) if part.type == "image"), default=-1)
    after = "".join(part.text for part in parts[last + 1 :]).strip()
    return after if any(map(str.isalnum, after)) else " ".join("".join(part.text for part in parts).split())


def load_answers(path: str | Path, samples: Sequence[Sample] | None = None) -> list[Answer]:
    """Load answers from JSON lines or a JSON list of ``{"id", "prediction"}``; other fields are allowed.

    LLaVA's answer files, ``{"question_id", "text"}``, are supported too.

    Args:
        path: the file.
        samples: the evaluated samples. If passed, exactly one answer per sample is returned, in the order of
            ``samples``.

    Raises:
        DataError: with file and line, for a record without an answer, a field of another type, a repeated id, an id
            that is not in ``samples``, samples without an answer, an answer that does not fit its sample, or one to
            another question (known for files that :func:`generate_answers` wrote).
    """
    records, found = JsonRecords(path), {}
    by_id = None if samples is None else {sample.id: sample for sample in samples}
    for number, record in enumerate(records.decode_all()):
        if isinstance(record, DataError):
            raise record
        where = records.where(number)
        answer = _parse_answer(record, where)
        if answer.id in found:
            raise DataError(f"second answer to id={quote(answer.id)}; remove one.", where=where)
        if by_id is not None:
            if answer.id not in by_id:
                raise DataError(
                    f"id={quote(answer.id)} is not among the samples; pass the data that the answers belong to.",
                    where=where,
                )
            _check_fits(answer, by_id[answer.id], where)
        found[answer.id] = answer
    if samples is None:
        return list(found.values())
    missing = [sample.id for sample in samples if sample.id not in found]
    if missing:
        listed = ", ".join(shorten(sample_id) for sample_id in missing[:5])
        raise DataError(
            f"{path} has no answer to {len(missing)} of {len(samples)} samples ({listed}, ...); "
            "generate these answers, or leave these samples out."
        )
    return [found[sample.id] for sample in samples]


class AnswerFile:
    """A file to which answers are appended, so that an interrupted run resumes with the unanswered samples.

    The file holds the fingerprint of each item. ``<name>.settings.json`` next to it holds everything else that the
    answers depend on.

    Args:
        path: a ``.jsonl`` file. An incomplete last line is removed.
        settings: everything the answers depend on except the items: fingerprints of model and processor, options.
        items: id of each sample -> its fingerprint. Answers to samples that are not among them are kept and not used.

    Raises:
        ValueError: ``path`` holds answers of other settings or to other items, or answers of unknown settings.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], items: Mapping[str, Mapping[str, str]]) -> None:
        self.path = Path(path)
        self.items = items
        settings_path = self.path.with_suffix(".settings.json")
        settings = json.loads(json.dumps(settings))
        drop_torn_line(self.path)
        answers = load_answers(self.path) if self.path.exists() and self.path.stat().st_size else []
        if answers:
            self._check_settings(settings_path, settings)
            self._check_items(answers)
        write_text(settings_path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        self.answers = {answer.id: answer for answer in answers}

    def add(self, answers: Iterable[Answer]) -> None:
        """Append answers and flush them to disk."""
        lines = []
        for answer in answers:
            self.answers[answer.id] = answer
            fields = {name: value for name, value in asdict(answer).items() if value is not None}
            lines.append(json.dumps(fields | {"item": self.items[answer.id]}, ensure_ascii=False))
        append_lines(self.path, lines)

    def _check_settings(self, path: Path, settings: dict[str, Any]) -> None:
        if not path.exists():
            raise ValueError(
                f"{self.path} holds answers, but {path.name} is missing, so it is not known what they were generated "
                f"with; {self._remedy}"
            )
        stored = read_json_object(path)
        different = sorted(key for key in stored.keys() | settings.keys() if stored.get(key) != settings.get(key))
        if different:
            changes = ", ".join(f"{key}: {stored.get(key)!r} then, {settings.get(key)!r} now" for key in different)
            raise ValueError(f"{self.path} holds answers of other settings ({changes}); {self._remedy}")

    def _check_items(self, answers: Sequence[Answer]) -> None:
        changed = []
        for answer in answers:
            now = self.items.get(answer.id)
            if now is None:
                continue
            stored = answer.item or {}
            parts = [part for part in now if stored.get(part, "") != now[part]]
            if parts:
                changed.append(f"{quote(answer.id)}: {', '.join(parts)}")
        if changed:
            listed = "; ".join(changed[:5]) + ("; ..." if len(changed) > 5 else "")
            raise ValueError(
                f"{self.path} holds answers to {len(changed)} items that have changed since ({listed}); {self._remedy}"
            )

    @property
    def _remedy(self) -> str:
        return f"choose another folder, or delete {self.path} to generate all answers again."


def _check_fits(answer: Answer, sample: Sample, where: str) -> None:
    """Raise DataError if ``answer`` cannot be an answer to ``sample``."""
    if sample.task in CHOICE_TASKS:
        count = len(candidates(sample))
        if answer.likelihoods is not None and len(answer.likelihoods) != count:
            raise DataError(
                f"{len(answer.likelihoods)} likelihoods for the {count} candidates of id={quote(answer.id)}; pass the "
                "data that the answers belong to.",
                where=where,
            )
    elif answer.prediction is None:
        raise DataError(
            f"the answer to id={quote(answer.id)} has likelihoods, but its task ({sample.task}) has no candidates; "
            "add a prediction.",
            where=where,
        )
    if answer.item is not None and (parts := changed_parts(answer.item, item_fingerprint(sample), QUESTION_PARTS)):
        raise DataError(
            f"the answer to id={quote(answer.id)} was generated before the {' and '.join(parts)} of the item changed; "
            "pass the data that the answers belong to, or generate the answers again.",
            where=where,
        )


def _parse_answer(record: object, where: str) -> Answer:
    record = record if isinstance(record, dict) else {"record": record}
    sample_id = record.get("id", record.get("question_id"))
    text = record.get("prediction", record.get("text"))
    if sample_id is None or not (isinstance(text, str) or (text is None and record.get("likelihoods") is not None)):
        raise DataError(f"{quote(record)} is not an answer; expected {{'id', 'prediction'}}.", where=where)

    def check(name: str, value: object, valid: bool, expected: str) -> None:
        if not valid:
            raise DataError(f"{name}={quote(value)} must be {expected}.", where=where)

    question, size = record.get("question", record.get("prompt")), record.get("image_size")
    likelihoods, item = record.get("likelihoods"), record.get("item")
    check("id", sample_id, isinstance(sample_id, str) or _is_integer(sample_id), "a string or an integer")
    check("question", question, question is None or isinstance(question, str), "a string")
    is_size = isinstance(size, list) and len(size) == 2 and all(_is_integer(side) and 0 < side < 2**31 for side in size)
    check("image_size", size, size is None or is_size, "height and width in pixels, [480, 640]")
    are_numbers = isinstance(likelihoods, list) and likelihoods and all(map(_is_finite, likelihoods))
    check("likelihoods", likelihoods, likelihoods is None or are_numbers, "a list of finite numbers")
    are_parts = isinstance(item, dict) and all(isinstance(part, str) for part in item.values())
    check("item", item, item is None or are_parts, "the fingerprints that idavlm wrote")
    for name, value in (("id", sample_id), ("prediction", text), ("question", question)):
        check(name, value, not isinstance(value, str) or _is_unicode(value), "valid Unicode (no half surrogate pairs)")
    return Answer(
        id=str(sample_id),
        prediction=text,
        question=question or "",
        image_size=tuple(size) if size else None,
        likelihoods=tuple(likelihoods) if likelihoods else None,
        item=item,
    )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
