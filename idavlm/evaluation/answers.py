"""What a model answered, before anything is scored: ``predictions.jsonl``, and the form MM-ID's authors released."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from idavlm.data.errors import DataError
from idavlm.data.json_records import JsonRecords
from idavlm.data.schema import Sample
from idavlm.utils import drop_torn_line


@dataclass(frozen=True)
class Answer:
    """The model's answer to one sample.

    Attributes:
        id: the sample's.
        prediction: what the model wrote; None where it only chose among candidates.
        question: what was asked, for readers.
        image_size: height and width of the last picture, where it is known.
        likelihoods: log-likelihood of every one of ``candidates(sample)``, where they were asked for.
    """

    id: str
    prediction: str | None
    question: str = ""
    image_size: tuple[int, int] | None = None
    likelihoods: tuple[float, ...] | None = None

    def to_json(self) -> str:
        """One line; what is not known is left out."""
        return json.dumps({k: v for k, v in asdict(self).items() if v is not None}, ensure_ascii=False)


def candidates(sample: Sample) -> list[str]:
    """Answers to choose among. The right one comes last: the first of equals is chosen, so that a tie is wrong."""
    return [*sample.false_answers, sample.answer]


def likeliest(sample: Sample, answer: Answer) -> str:
    """The candidate of highest likelihood; the first of equals."""
    texts = candidates(sample)
    if len(texts) != len(answer.likelihoods):
        raise ValueError(
            f"likelihoods of {answer.id!r} are {len(answer.likelihoods)} for {len(texts)} candidates; of other data?"
        )
    return texts[answer.likelihoods.index(max(answer.likelihoods))]


def question_text(sample: Sample) -> str:
    """The last question behind its last picture; all its text where nothing stands there."""
    parts = sample.messages[-1].content
    last = max((number for number, part in enumerate(parts) if part.type == "image"), default=-1)
    behind = "".join(part.text for part in parts[last + 1 :]).strip()
    return behind if any(map(str.isalnum, behind)) else " ".join("".join(part.text for part in parts).split())


def load_answers(path: str | Path, samples: Sequence[Sample] | None = None) -> list[Answer]:
    """Answers of a file: JSON lines or a JSON list of ``{"id", "prediction"}``, with whatever else they have.

    LLaVA's answers files, ``{"question_id", "text"}``, are read too.

    Args:
        path: ``predictions.jsonl``, or the released ``[{"id", "question", "prediction"}]``.
        samples: what was asked. Then the answers come in the order of these, one each.

    Raises:
        DataError: by file and line: no answer, an id twice, an id that ``samples`` do not have; or samples without an
            answer.
    """
    records, found = JsonRecords(path), {}
    known = None if samples is None else {sample.id for sample in samples}
    for number, record in enumerate(records.decode_all()):
        if isinstance(record, DataError):
            raise record
        answer = _read(record, records.where(number))
        if answer.id in found:
            raise DataError(f"a second answer to {answer.id!r}; keep one.", where=records.where(number))
        if known is not None and answer.id not in known:
            raise DataError(f"id={answer.id!r} was not asked; is it of other data?", where=records.where(number))
        found[answer.id] = answer
    if samples is None:
        return list(found.values())
    missing = [sample.id for sample in samples if sample.id not in found]
    if missing:
        raise DataError(
            f"{path} has no answer to {len(missing)} of {len(samples)} samples ({', '.join(missing[:5])}, ...); "
            "generate them, or leave these samples out."
        )
    return [found[sample.id] for sample in samples]


class AnswerFile:
    """Answers appended as they come, for a run that may be killed: what is there is not asked again.

    Args:
        path: a ``.jsonl`` file. A line that was cut off is removed.
        settings: what the answers depend on, kept beside the file; going on with others is an error.

    Raises:
        ValueError: ``path`` holds answers of other settings.
    """

    def __init__(self, path: str | Path, settings: dict) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".settings.json")
        settings = json.loads(json.dumps(settings))
        if self.path.exists() and beside.exists():
            before = json.loads(beside.read_text(encoding="utf-8"))
            other = sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key))
            if other:
                changes = ", ".join(f"{key}: {before.get(key)!r} then, {settings.get(key)!r} now" for key in other)
                raise ValueError(f"{self.path} holds answers of other settings ({changes}); give another folder.")
        drop_torn_line(self.path)
        beside.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        answers = load_answers(self.path) if self.path.exists() and self.path.stat().st_size else []
        self.answers = {answer.id: answer for answer in answers}

    def add(self, answers: Iterable[Answer]) -> None:
        """Append answers; they are on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            for answer in answers:
                self.answers[answer.id] = answer
                file.write(answer.to_json() + "\n")
            file.flush()
            os.fsync(file.fileno())


def _read(record: object, where: str) -> Answer:
    record = record if isinstance(record, dict) else {"record": record}
    name = record.get("id", record.get("question_id"))
    text = record.get("prediction", record.get("text"))
    if name is None or not (isinstance(text, str) or (text is None and record.get("likelihoods"))):
        raise DataError(f"{str(record)[:80]} is no answer; expected {{'id', 'prediction'}}.", where=where)
    size, likelihoods = record.get("image_size"), record.get("likelihoods")
    return Answer(
        id=str(name),
        prediction=text,
        question=record.get("question", record.get("prompt")) or "",
        image_size=tuple(size) if size else None,
        likelihoods=tuple(likelihoods) if likelihoods else None,
    )
