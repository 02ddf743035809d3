"""Answers of a model before scoring: the file ``predictions.jsonl``, and formats that other projects released."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from idavlm.data.dataset import JsonRecords
from idavlm.data.errors import DataError
from idavlm.data.schema import Sample
from idavlm.utils import drop_torn_line

CHOICE_TASKS = ("qa_single", "qa_multi")
"""Tasks whose answer is chosen among the right answer and the false ones; the others are generated freely."""


@dataclass(frozen=True)
class Answer:
    """The answer of a model to one sample.

    Attributes:
        id: id of the sample.
        prediction: generated text; None if the model only ranked the candidates.
        question: text of the question, for readers of the file.
        image_size: height and width of the last image, if known.
        likelihoods: log-likelihood of each of ``candidates(sample)``, if computed.
    """

    id: str
    prediction: str | None
    question: str = ""
    image_size: tuple[int, int] | None = None
    likelihoods: tuple[float, ...] | None = None


def candidates(sample: Sample) -> list[str]:
    """Possible answers; the right one is last. Ties are resolved in favour of the first, so a tie counts as wrong."""
    return [*sample.false_answers, sample.answer]


def most_likely(sample: Sample, answer: Answer) -> str:
    """The candidate with the highest likelihood; the first one in case of a tie."""
    texts = candidates(sample)
    if len(texts) != len(answer.likelihoods):
        raise ValueError(
            f"answer {answer.id!r} has {len(answer.likelihoods)} likelihoods for {len(texts)} candidates; pass the "
            "samples that the answers were generated for."
        )
    return texts[answer.likelihoods.index(max(answer.likelihoods))]


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
        DataError: with file and line, for a record without an answer, a repeated id, an id that is not in ``samples``,
            or samples without an answer.
    """
    records, found = JsonRecords(path), {}
    expected_ids = None if samples is None else {sample.id for sample in samples}
    for number, record in enumerate(records.decode_all()):
        if isinstance(record, DataError):
            raise record
        answer = _parse_answer(record, records.where(number))
        if answer.id in found:
            raise DataError(f"second answer to id={answer.id!r}; remove one.", where=records.where(number))
        if expected_ids is not None and answer.id not in expected_ids:
            raise DataError(
                f"id={answer.id!r} is not among the samples; pass the data that the answers belong to.",
                where=records.where(number),
            )
        found[answer.id] = answer
    if samples is None:
        return list(found.values())
    missing = [sample.id for sample in samples if sample.id not in found]
    if missing:
        raise DataError(
            f"{path} has no answer to {len(missing)} of {len(samples)} samples ({', '.join(missing[:5])}, ...); "
            "generate these answers, or leave these samples out."
        )
    return [found[sample.id] for sample in samples]


class AnswerFile:
    """A file to which answers are appended, so that an interrupted run resumes with the unanswered samples.

    Args:
        path: a ``.jsonl`` file. An incomplete last line is removed.
        settings: everything the answers depend on. It is stored in ``<name>.settings.json`` next to the file.

    Raises:
        ValueError: ``path`` holds answers that were generated with other settings.
    """

    def __init__(self, path: str | Path, settings: dict) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        settings_path = self.path.with_suffix(".settings.json")
        settings = json.loads(json.dumps(settings))
        if self.path.exists() and settings_path.exists():
            stored = json.loads(settings_path.read_text(encoding="utf-8"))
            different = sorted(key for key in stored.keys() | settings.keys() if stored.get(key) != settings.get(key))
            if different:
                changes = ", ".join(f"{key}: {stored.get(key)!r} then, {settings.get(key)!r} now" for key in different)
                raise ValueError(f"{self.path} holds answers of other settings ({changes}); choose another folder.")
        drop_torn_line(self.path)
        settings_path.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        answers = load_answers(self.path) if self.path.exists() and self.path.stat().st_size else []
        self.answers = {answer.id: answer for answer in answers}

    def add(self, answers: Iterable[Answer]) -> None:
        """Append answers and flush them to disk."""
        with self.path.open("a", encoding="utf-8") as file:
            for answer in answers:
                self.answers[answer.id] = answer
                fields = {name: value for name, value in asdict(answer).items() if value is not None}
                file.write(json.dumps(fields, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _parse_answer(record: object, where: str) -> Answer:
    record = record if isinstance(record, dict) else {"record": record}
    sample_id = record.get("id", record.get("question_id"))
    text = record.get("prediction", record.get("text"))
    if sample_id is None or not (isinstance(text, str) or (text is None and record.get("likelihoods"))):
        raise DataError(f"{str(record)[:80]} is not an answer; expected {{'id', 'prediction'}}.", where=where)
    size, likelihoods = record.get("image_size"), record.get("likelihoods")
    return Answer(
        id=str(sample_id),
        prediction=text,
        question=record.get("question", record.get("prompt")) or "",
        image_size=tuple(size) if size else None,
        likelihoods=tuple(likelihoods) if likelihoods else None,
    )
