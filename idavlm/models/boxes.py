"""The text forms of boxes: from pixels of the original image to text, and back."""

import math
import re
import string
from collections.abc import Sequence

from idavlm.utils import last_answer, plain_answer

_NUMBER = r"-?(?:\d++(?:\.\d++)?+|\.\d++)"
_COMMA = r"(?:\s*px)?\s*[,;]\s*"
_ONE_NUMBER, _BETWEEN_NUMBERS = re.compile(_NUMBER), re.compile(_COMMA)
_UNIT, _PERCENT = re.compile(r"\s*px"), re.compile(r"\s*%")
_PAIR = rf"[\[({{<]\s*{_NUMBER}{_COMMA}{_NUMBER}"
_PAIRS = re.compile(rf"{_PAIR}(?:(?!\n\n)\D){{0,40}}?{_PAIR}(?!{_COMMA}{_NUMBER})")
_SPACED = re.compile(rf"(?<![\d.,]){_NUMBER}(?:\s+{_NUMBER}){{3}}")
_BRACKETED = re.compile(rf"[\[({{]\s*{_NUMBER}(?:\s+{_NUMBER}){{3}}\s*[\])}}]")
_TAGGED = re.compile(r"<box>(.*?)(?:</box>|\Z)|<\|box_start\|>(.*?)(?:<\|box_end\|>|\Z)", re.DOTALL)
_WORDS = {
    "x1": "x1|x_?min|left", "y1": "y1|y_?min|top", "x2": "x2|x_?max|right", "y2": "y2|y_?max|bottom",
    "x": "x", "y": "y", "w": "w|width", "h": "h|height",
}  # fmt: skip
_KEY = re.compile(
    "|".join(rf"(?P<{key}>(?<![\w])(?:{words})(?![\w])[\"']?\s*[:=]\s*{_NUMBER})" for key, words in _WORDS.items()),
    re.IGNORECASE,
)
_NOT = re.compile(r"\b(?:not|isn't|no longer|instead of|rather than)(?: \w+){0,2}$", re.IGNORECASE)
_BINS = re.compile(r"bins([1-9]\d*)")


class BoxFormat:
    """Text form of a box ``[x1, y1, x2, y2]``.

    - ``"qwen"``: ``<ref>Kate</ref><box>(120,40),(630,980)</box>``, 0..999 of width and height (Qwen-VL, IDA-VLM)
    - ``"thousand"``: ``[120, 40, 630, 980]``, 0..999 of width and height
    - ``"unit"``: ``[0.120, 0.040, 0.630, 0.980]``, 0..1 of width and height (LLaVA)
    - ``"square"``: ``[0.120, 0.245, 0.630, 0.715]``, 0..1 of the image padded to a centred square (IAA)
    - ``"pixels"``: ``[77, 19, 403, 470]``, pixels of the image (Qwen2.5-VL, ground truth of MM-ID)
    - ``"bins32"``: ``4 1 20 31``, 0..31 of width and height; any number of bins (quantised coordinates, Pix2Seq)

    The kind is a property of the model and never guessed: "[120, 40, 630, 980]" is one box in pixels and another one
    in thousandths.

    Args:
        kind: see above.

    Raises:
        ValueError: an unknown kind.
    """

    KINDS = ("qwen", "thousand", "unit", "square", "pixels")

    def __init__(self, kind: str):
        bins = _BINS.fullmatch(kind) if isinstance(kind, str) else None
        if kind not in self.KINDS and (bins is None or int(bins[1]) < 2):
            raise ValueError(
                f"box_format={kind!r} is not known; choose one of {', '.join(map(repr, self.KINDS))}, or 'bins32' (any "
                "number of bins from 2 for the 32)."
            )
        self.kind = kind
        self.num_bins = int(bins[1]) if bins else None

    def write(self, name: str, box: Sequence[float], image_size: Sequence[int]) -> str:
        """Return the text of ``box``, in pixels of an image of ``image_size`` (height, width); no name is ``""``."""
        before, after = self.around_name(box, image_size)
        if not self.writes_name:
            return after
        return before + name + after if name else after.removeprefix("</ref>")

    @property
    def writes_name(self) -> bool:
        """Whether the text holds the name of the identity."""
        return self.kind == "qwen"

    def around_name(self, box: Sequence[float], image_size: Sequence[int]) -> tuple[str, str]:
        """Return the text of ``box`` before and after the name. All of it is after the name if it holds no name."""
        size, shift = self._frame(image_size)
        unit = [(value + offset) / side for value, offset, side in zip(box, shift * 2, size * 2, strict=True)]
        unit = [min(max(value, 0.0), 1.0) for value in unit]
        if self.kind in ("unit", "square"):
            return "", "[" + ", ".join(f"{value:.3f}" for value in unit) + "]"
        steps = size if self.kind == "pixels" else [self._steps] * 2
        x1, y1, x2, y2 = (round(value * number) for value, number in zip(unit, steps * 2, strict=True))
        if self.kind == "qwen":
            return "<ref>", f"</ref><box>({x1},{y1}),({x2},{y2})</box>"
        return "", f"{x1} {y1} {x2} {y2}" if self.num_bins else f"[{x1}, {y1}, {x2}, {y2}]"

    def parse(self, text: str, image_size: Sequence[int] | None, *, name: str = "") -> list[float] | None:
        """Return the box that :meth:`read` finds, or None."""
        return self.read(text, image_size, name=name)[0]

    def read(
        self, text: str, image_size: Sequence[int] | None, *, name: str = ""
    ) -> tuple[list[float] | None, str | None]:
        """Find a box in ``text``, and say why there is none.

        Of several boxes, the one that follows ``name`` counts, otherwise the first. Exchanged corners are sorted, and
        the part outside the image is cut off. Numbers that cannot be of this kind (0.3 in thousandths or pixels, 300 in
        0..1) are no box and never interpreted as another kind.

        Args:
            text: the answer of a model; see :func:`find_boxes` for the forms that are recognised.
            image_size: height and width of the image. None is allowed for ``"pixels"``; the box is not cut off then.
            name: identity that the question is about.

        Returns:
            ``[x1, y1, x2, y2]`` in pixels and None; or None and the reason: ``"none"`` (no box in text), ``"empty"``
            (nothing of it lies in the image) or ``"convention"`` (the numbers cannot be of this kind).

        Raises:
            ValueError: ``image_size`` is None although the kind needs it.
        """
        if image_size is None and self.kind != "pixels":
            raise ValueError(
                f"image_size=None, but boxes of kind {self.kind!r} are relative to the image; pass its height and "
                "width."
            )
        found = find_boxes(text, spaced=self.num_bins is not None)
        named = [numbers for before, numbers in found if name and name.lower() in before.lower()]
        numbers = next(iter(named or [numbers for _, numbers in found]), None)
        if numbers is None:
            return None, "none"
        if not all(map(math.isfinite, numbers)) or not self._is_plausible(numbers):
            return None, "convention"
        pixels = self._to_pixels(numbers, image_size)
        x1, x2 = sorted((pixels[0], pixels[2]))
        y1, y2 = sorted((pixels[1], pixels[3]))
        height, width = image_size if image_size is not None else (float("inf"),) * 2
        x1, x2 = max(x1, 0.0), min(x2, float(width))
        y1, y2 = max(y1, 0.0), min(y2, float(height))
        return ([x1, y1, x2, y2], None) if x1 < x2 and y1 < y2 else (None, "empty")

    @property
    def _steps(self) -> int:
        """Largest coordinate."""
        if self.num_bins:
            return self.num_bins - 1
        return {"unit": 1, "square": 1}.get(self.kind, 999)

    def _is_plausible(self, numbers: Sequence[float]) -> bool:
        if self.kind in ("unit", "square"):
            return max(numbers) <= 10
        has_fractions = any(not number.is_integer() for number in numbers)
        return not (has_fractions and max(numbers) <= 1)

    def _to_pixels(self, numbers: Sequence[float], image_size: Sequence[int] | None) -> list[float]:
        if self.kind == "pixels":
            return list(numbers)
        size, shift = self._frame(image_size)
        unit = [number / self._steps for number in numbers]
        return [value * side - offset for value, offset, side in zip(unit, shift * 2, size * 2, strict=True)]

    def _frame(self, image_size: Sequence[int]) -> tuple[list[float], list[float]]:
        """Return the width and height that coordinates refer to, and the offset of the image in that frame."""
        height, width = image_size
        if self.kind != "square":
            return [width, height], [0.0, 0.0]
        side = max(height, width)
        return [side, side], [(side - width) / 2, (side - height) / 2]


def box_iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes ``[x1, y1, x2, y2]``; 0 if either is empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return width * height / (sum(areas) - width * height)


def find_boxes(text: str, *, spaced: bool = False) -> list[tuple[str, tuple[float, ...]]]:
    """Find the four numbers of each box in the answer of a model, whatever the text around them.

    Recognised are ``<box>(1,2),(3,4)</box>``, ``[1, 2, 3, 4]``, ``(1, 2) to (3, 4)``, ``1, 2, 3, 4``, ``[1 2 3 4]`` and
    named numbers (``x1=1, y1=2, ...``, ``left: 1, top: 2, ...``; ``x, y, width, height`` are converted to corners). If
    the text has box tags, only their content counts. If it says "the answer is", only what follows counts, provided it
    holds a box. "not [1, 2, 3, 4]" does not count if there is another box.

    Args:
        text: the answer of a model.
        spaced: whether four numbers that are separated by spaces only are a box, wherever they occur.

    Returns:
        For each box the text between the previous box and this one, and its numbers.
    """
    text = plain_answer(text)
    found = _search(last_answer(text), spaced) or _search(text, spaced)
    affirmed = [(before, numbers) for before, numbers in found if not _is_denied(before)]
    return affirmed or found


def _is_denied(before: str) -> bool:
    """Whether the text before a box ends with "not", or with "not" and one or two words, and with a space."""
    text = before.rstrip("[(<{" + string.whitespace)
    return before[len(text) : len(text) + 1].isspace() and _NOT.search(" ".join(text.split()[-4:])) is not None


def _search(text: str, spaced: bool) -> list[tuple[str, tuple[float, ...]]]:
    tags = list(_TAGGED.finditer(text))
    if tags:
        contents = [(tag.start(), tag.end(), _find_numbers(tag[1] or tag[2] or "", spaced)) for tag in tags]
        spans = [(start, end, inside[0][2]) for start, end, inside in contents if inside]
    else:
        spans = _find_numbers(text, spaced)
    ends = [0, *(end for _, end, _ in spans)]
    return [(text[end:start], numbers) for end, (start, _, numbers) in zip(ends, spans, strict=False)]


def _find_numbers(text: str, spaced: bool) -> list[tuple[int, int, tuple[float, ...]]]:
    """Return start, end and numbers of each box in text without tags."""
    spans = _runs(text) + _spans(text, _PAIRS, _BRACKETED) or _named(text)
    if not spans and (spaced or _SPACED.fullmatch(text.strip(" .\n"))):
        spans = _spans(text, _SPACED)
    return sorted(spans)


def _runs(text: str) -> list[tuple[int, int, tuple[float, ...]]]:
    """Find four numbers, not more, that are separated by commas and are not percentages."""
    runs: list[list[re.Match]] = []
    for number in _ONE_NUMBER.finditer(text):
        if runs and _BETWEEN_NUMBERS.fullmatch(text, runs[-1][-1].end(), number.start()):
            runs[-1].append(number)
        else:
            runs.append([number])
    spans = []
    for run in runs:
        end = run[-1].end()
        if len(run) == 4 and not _PERCENT.match(text, end):
            unit = _UNIT.match(text, end)
            numbers = tuple(float(number[0]) for number in run)
            spans.append((run[0].start(), unit.end() if unit else end, numbers))
    return spans


def _spans(text: str, *forms: re.Pattern) -> list[tuple[int, int, tuple[float, ...]]]:
    matches = [match for form in forms for match in form.finditer(text)]
    spans = [(match.start(), match.end(), _numbers(match[0])) for match in matches]
    return [span for span in spans if len(span[2]) == 4]


def _named(text: str) -> list[tuple[int, int, tuple[float, ...]]]:
    """Find boxes whose numbers have names. A name that occurs again starts the next box."""
    boxes: list[dict[str, re.Match]] = [{}]
    for match in _KEY.finditer(text):
        if match.lastgroup in boxes[-1]:
            boxes.append({})
        boxes[-1][match.lastgroup] = match
    spans = []
    for box in boxes:
        value = {key: _numbers(match[0])[-1] for key, match in box.items()}
        if {"x1", "y1", "x2", "y2"} <= value.keys():
            numbers = (value["x1"], value["y1"], value["x2"], value["y2"])
        elif {"x", "y", "w", "h"} <= value.keys():
            numbers = (value["x"], value["y"], value["x"] + value["w"], value["y"] + value["h"])
        else:
            continue
        spans.append((min(m.start() for m in box.values()), max(m.end() for m in box.values()), numbers))
    return spans


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in re.findall(_NUMBER, text))
