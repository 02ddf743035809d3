"""Captions, questions and answers about film frames: requests to a model, or texts of a file; and their filters."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from idavlm.data.errors import DataError, quote
from idavlm.data.json_records import JsonRecords
from idavlm.datasets.tuning.annotations import Unsuitable, take
from idavlm.utils import contains_name, plain_answer

MAX_CAPTION_WORDS = 60
MAX_ANSWER_WORDS = 30

TASKS = ("caption_single", "qa_single", "caption_multi", "qa_multi")
"""Tasks that need a description."""

_COMMON = (
    "You write data about images of a film. Every person of interest has a name and a bounding box (left, top, right, "
    "bottom) in pixels. Use these names, and attribute to each person only what the person in that box is or does. "
    "Write about what can be seen, and do not guess. If an image is unclear, or you cannot tell the people apart, "
    "reply with the single word NO. "
)
INSTRUCTIONS = {
    "caption_single": _COMMON + f"Describe the image in one or two sentences of less than {MAX_CAPTION_WORDS} words.",
    "caption_multi": _COMMON
    + "The images follow one another. Describe what happens from the first to the last, as one "
    f"text of less than {MAX_CAPTION_WORDS} words, without numbering the images.",
    "qa_single": _COMMON
    + "Write a question about a named person (action, clothes, expression, place, relation to another "
    f"person) on the first line, and its answer of less than {MAX_ANSWER_WORDS} words on the second line.",
    "qa_multi": _COMMON
    + "The images follow one another. Write a question about a named person that needs several of the "
    f"images on the first line, and its answer of less than {MAX_ANSWER_WORDS} words on the second line.",
}

_REFUSAL = re.compile(
    r"\W*(?:no\W*\Z|(?:i(?:'m| am) (?:sorry|unable|not able)|sorry\b|i (?:can(?:no|')t|won't|do not|don't)\b|as an ai\b"
    r"|unfortunately,? i\b))",
    re.IGNORECASE,
)
_LABEL = re.compile(r"^\W*(?:q|a|question|answer)\s*:\s*", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"\[(nm\d+)\]")


@dataclass(frozen=True)
class DescriptionRequest:
    """What is to be described.

    Attributes:
        film: id of the film.
        task: one of :data:`TASKS`.
        frames: file names of the frames.
        images: the files.
        size: (width, height) that the boxes refer to.
        names: name of each introduced person, by its id.
        boxes: for each frame, the boxes of the introduced people in it, by name.
    """

    film: str
    task: str
    frames: tuple[str, ...]
    images: tuple[Path, ...]
    size: tuple[float, float]
    names: dict[str, str]
    boxes: tuple[dict[str, list[float]], ...]

    def messages(self) -> list[dict[str, Any]]:
        """The request as messages of the OpenAI API, with the images in base64."""
        width, height = self.size
        content: list[dict[str, Any]] = [{"type": "text", "text": f"The image size is {width:g} x {height:g} pixels."}]
        for path, boxes in zip(self.images, self.boxes, strict=True):
            data = base64.b64encode(path.read_bytes()).decode()
            content.append({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}})
            people = "; ".join(f"{name}: ({', '.join(f'{x:g}' for x in box)})" for name, box in boxes.items())
            content.append({"type": "text", "text": f"People: {people}"})
        return [{"role": "system", "content": INSTRUCTIONS[self.task]}, {"role": "user", "content": content}]


class Describer(Protocol):
    """Describes frames. It is sent to worker processes, so it must be possible to pickle it."""

    def __call__(self, requests: Sequence[DescriptionRequest]) -> list[str | None]:
        """Return a text for each request; None if there is none."""
        ...


class DescriptionFile:
    """Descriptions from a JSON Lines file: ``{"film", "task", "frames", "text"}``.

    ``frames`` are file names of frames (``"shot_0007_img_1.jpg"``). In ``text``, ``[nm0000123]`` stands for the name of
    a person. A question and its answer are on two lines.

    Args:
        path: the file.

    Raises:
        DataError: a line is no such object, with file and line.
    """

    def __init__(self, path: str | Path) -> None:
        records = JsonRecords(path)
        self.fingerprint = records.fingerprint
        self._texts: dict[tuple[str, str, tuple[str, ...]], str] = {}
        for number, entry in enumerate(records.decode_all()):
            if isinstance(entry, DataError):
                raise entry
            where = records.where(number)
            film, task, text = (take(entry, name, str, where) for name in ("film", "task", "text"))
            if task not in TASKS:
                raise DataError(f"task={quote(task)} is not known; choose one of {', '.join(TASKS)}.", where=where)
            frames = tuple(map(str, take(entry, "frames", list, where)))
            self._texts[film, task, frames] = text

    def __call__(self, requests: Sequence[DescriptionRequest]) -> list[str | None]:
        """Return the texts of the file with the names of each record."""
        return [self._text(request) for request in requests]

    def _text(self, request: DescriptionRequest) -> str | None:
        text = self._texts.get((request.film, request.task, request.frames))
        if text is None:
            return None
        # A person without a name in the record is filtered like a text that names no one.
        return _PLACEHOLDER.sub(lambda match: request.names.get(match[1], match[0]), text)


def checked_caption(reply: str, names: Sequence[str]) -> str:
    """A caption that passes the filters.

    Raises:
        Unsuitable: a refusal, too long, a person without a name in the record, or no name of the record.
    """
    text = " ".join(plain_answer(reply).split())
    _check_text(text, names, MAX_CAPTION_WORDS)
    return text


def checked_question(reply: str, names: Sequence[str]) -> tuple[str, str]:
    """A question and its answer that pass the filters. An answer may begin with "No": "Nodding", "No, he is sitting".

    Raises:
        Unsuitable: a refusal, no question and answer, too long, or no name of the record.
    """
    lines = [_LABEL.sub("", line).strip() for line in plain_answer(reply).splitlines()]
    lines = [line for line in lines if line]
    _check_text(" ".join(lines), names)
    if len(lines) < 2 or not lines[0].endswith("?"):
        raise Unsuitable("the description is no question with an answer")
    answer = " ".join(lines[1:])
    if len(answer.split()) >= MAX_ANSWER_WORDS:
        raise Unsuitable("the description is too long")
    return lines[0], answer


def _check_text(text: str, names: Sequence[str], max_words: int | None = None) -> None:
    if not text or _REFUSAL.match(text):
        raise Unsuitable("the model refused to describe the image")
    if max_words is not None and len(text.split()) >= max_words:
        raise Unsuitable("the description is too long")
    if _PLACEHOLDER.search(text) or not any(contains_name(text, name) for name in names):
        raise Unsuitable("the description names no person whom the record introduces")
