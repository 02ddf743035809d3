"""Reading annotation files: every value is checked, and a fault is a DataError that names file, line and field."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from idavlm.data.errors import DataError, quote

Found = TypeVar("Found")

MAX_TRIALS = 20
"""Number of annotations that are drawn until one has a distractor."""

_TYPES = {str: "a string", int: "an integer", float: "a number", list: "a list", dict: "an object"}


class Unsuitable(Exception):
    """An annotation that a rule of the builder leaves out, which is no fault of the annotation.

    Args:
        reason: the rule, a short constant text: the report counts annotations by it.
    """


@dataclass
class Report:
    """What a builder left out.

    Attributes:
        dropped: number of annotations that a rule left out, by rule.
        problems: messages of faulty annotations, with file and line.
        counts: further counts, for example of distractors.
    """

    dropped: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)

    @contextmanager
    def catch(self, where: str) -> Iterator[None]:
        """Leave out what the context reads if it raises :class:`Unsuitable` or :class:`DataError`.

        Args:
            where: file and line, which are put before a message that does not begin with them.
        """
        try:
            yield
        except Unsuitable as unsuitable:
            self.dropped[str(unsuitable)] += 1
        except DataError as error:
            message = str(error)
            self.problems.append(message if message.startswith(where) else f"{where}: {message}")


def draw_distractor(draw: Callable[[], Found | None], report: Report) -> Found | None:
    """Return a distractor of another annotation; None, which ``report`` counts, if :data:`MAX_TRIALS` have none.

    Args:
        draw: draws an annotation at random and returns an individual of it, None if no one in it is suitable. A
            :class:`DataError` is ignored, because it is reported when the unit of the annotation is built.
        report: counts what is not found.
    """
    for _ in range(MAX_TRIALS):
        try:
            found = draw()
        except DataError:
            continue
        if found is not None:
            return found
    report.counts["distractors not found"] += 1
    return None


def take(entry: Any, name: str, kind: type, where: str, *, context: str = "the annotation") -> Any:
    """Return ``entry[name]`` after checking that ``entry`` is an object and the value is a ``kind``.

    Raises:
        DataError: with ``where``, the field and its value.
    """
    if not isinstance(entry, dict):
        raise DataError(f"{context} is {quote(entry)}; expected an object.", where=where)
    return check_kind(entry.get(name), name, kind, where)


def check_kind(value: Any, name: str, kind: type, where: str) -> Any:
    """Return ``value`` after checking that it is a ``kind``: str, int, float (any number), list or dict."""
    fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if not fits or (kind is str and not value.strip()):
        raise DataError(f"{name}={quote(value)} must be {_TYPES[kind]}; repair or remove the annotation.", where=where)
    if kind is str:
        check_unicode(value, name, where)
    return value


def check_unicode(text: str, name: str, where: str) -> None:
    """Raise DataError if a text holds half a surrogate pair, which JSON may escape but no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{name}={quote(text)} holds half a surrogate pair; remove it.", where=where) from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file does not exist or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError:
        raise DataError("does not exist or cannot be read; restore it.", where=str(path), kind="json") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON ({error}); repair it.", where=str(path), kind="json") from None


def pixel_box(value: Any, width: float, height: float, where: str, *, name: str = "box") -> list[float]:
    """Return a box ``[x1, y1, x2, y2]`` of an image of ``width`` x ``height`` pixels, cut at the edges of the image.

    Annotators often exceed an edge by a few pixels. A box of which no pixel remains is a fault.

    Raises:
        DataError: ``value`` is not four numbers, or the box is empty or outside the image.
    """
    numbers = value if isinstance(value, (list, tuple)) else []
    if len(numbers) != 4 or not all(isinstance(x, (int, float)) and abs(x) < 1e7 for x in numbers):
        raise DataError(f"{name}={quote(value)} must be four numbers [x1, y1, x2, y2].", where=where)
    x1, y1, x2, y2 = max(0, numbers[0]), max(0, numbers[1]), min(width, numbers[2]), min(height, numbers[3])
    if x2 - x1 < 1 or y2 - y1 < 1:
        raise DataError(
            f"{name}={quote(value)} is empty or outside the image of {width:g} x {height:g} pixels; correct it.",
            where=where,
        )
    return [x1, y1, x2, y2]


def area(box: list[float]) -> float:
    """Area of a box ``[x1, y1, x2, y2]``."""
    return (box[2] - box[0]) * (box[3] - box[1])


def scaled(box: list[float], from_size: tuple[float, float], to_size: tuple[float, float]) -> list[float]:
    """Scale a box from an image of (width, height) ``from_size`` to one of ``to_size``."""
    x, y = to_size[0] / from_size[0], to_size[1] / from_size[1]
    return [round(value, 2) for value in (box[0] * x, box[1] * y, box[2] * x, box[3] * y)]
