"""The text forms of boxes: from pixels of the original image to text, and back."""

import math
import re
import string
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from idavlm.utils.answer_text import answer_parts, name_matches, normal_name, plain_answer, without_markdown
from idavlm.utils.json_text import find_json

_NUMBER = r"-?(?:\d++(?:\.\d++)?+|\.\d++)"
_COMMA = r"(?:\s*px)?\s*[,;|、]\s*"
_ONE_NUMBER, _BETWEEN_NUMBERS = re.compile(_NUMBER), re.compile(_COMMA)
_UNIT, _PERCENT = re.compile(r"\s*px"), re.compile(r"\s*%")
_PAIR = rf"[\[({{<]\s*{_NUMBER}{_COMMA}{_NUMBER}"
_PAIRS = re.compile(rf"{_PAIR}(?:(?!\n\n)\D){{0,40}}?{_PAIR}(?!{_COMMA}{_NUMBER})")
_SPACED = re.compile(rf"(?<![\d.,]){_NUMBER}(?:\s+{_NUMBER}){{3}}")
_BRACKETED = re.compile(rf"[\[({{]\s*{_NUMBER}(?:\s+{_NUMBER}){{3}}\s*[\])}}]")
_TAGGED = re.compile(
    r"<(b?box|bndbox)>(.*?)(?:</\1>|\Z)|<\|box_start\|>(.*?)(?:<\|box_end\|>|\Z)|<\|det\|>(.*?)(?:<\|/det\|>|\Z)",
    re.DOTALL,
)
_WORDS = {
    "x1": "x_?1|x_?min|left", "y1": "y_?1|y_?min|top", "x2": "x_?2|x_?max|right", "y2": "y_?2|y_?max|bottom",
    "x": "x", "y": "y", "w": "w|width", "h": "h|height", "cx": "cx|x_?center|center_?x", "cy": "cy|y_?center|center_?y",
}  # fmt: skip
_KEY = re.compile(
    "|".join(rf"(?P<{key}>(?<![\w])(?:{words})(?![\w])[\"']?\s*[:=>]\s*{_NUMBER})" for key, words in _WORDS.items()),
    re.IGNORECASE,
)
_NAMED_NUMBER = {key: re.compile(words, re.IGNORECASE) for key, words in _WORDS.items()}
_NOT = re.compile(r"\b(?:not|isn't|no longer|instead of|rather than)(?: \w+){0,2}$", re.IGNORECASE)
_CORRECTION = re.compile(r"\b(?:wait|actually|correction|corrected|on second thought)\b|更正", re.IGNORECASE)
_BOX_KEY = re.compile(
    r"(?:\w+_)?(?:b|bounding_?)?box(?:es)?(?:_?2d)?|(?:bbox_|box_)?coord(?:inate)?s?|location|position|region|rect(?:angle)?"
)
_LABEL_KEY = re.compile(
    r"labels?|names?|ref|person|people|identity|object|class|category|text_content|phrase|caption|description|who|subject"
    r"|character"
)
_ANSWER_KEY = re.compile(r"(?:final_)?answer")
_TOP_LEFT, _BOTTOM_RIGHT = re.compile(r"(?:top|upper)_?left"), re.compile(r"(?:bottom|lower)_?right")
_LETTER = re.compile(r"[^\W\d_]")
# The first alternative starts at the start of a word only: a long word is searched once.
_BOX_WORD = re.compile(r"(?<!\w)\w*?box\w*|coordinates|json", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.;!?](?=\s|\Z)|[\n。;]")
_BINS = re.compile(r"bins([1-9]\d*)")
_RESIZE_OPTIONS = {"factor": 28, "min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16384}
_OUTSIDE = 0.1
"""How far coordinates may lie outside the image, as a share of its sides, before they are not of the format."""

ResizedSize = Callable[[int, int], "tuple[int, int]"]
"""``resized_size(height, width)``: height and width of the image that the model sees."""


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width to which the image processors of Qwen2-VL, Qwen2.5-VL and Qwen3-VL resize an image.

    Both are multiples of ``factor``, their product is between ``min_pixels`` and ``max_pixels``, and the aspect ratio
    is kept as far as that allows.
    """
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


class BoxFormat:
    """Text form of a box ``[x1, y1, x2, y2]``.

    - ``"qwen"``: ``<ref>Kate</ref><box>(120,40),(630,980)</box>``, 0..999 of width and height (Qwen-VL, IDA-VLM)
    - ``"thousand"``: ``[120, 40, 630, 980]``, 0..999 of width and height
    - ``"norm1000"``: ``[120, 40, 630, 980]``, 0..1000 of width and height (Qwen2-VL, Qwen3-VL, InternVL, GLM-4.1V)
    - ``"unit"``: ``[0.120, 0.040, 0.630, 0.980]``, 0..1 of width and height (LLaVA)
    - ``"square"``: ``[0.120, 0.245, 0.630, 0.715]``, 0..1 of the image padded to a centred square (IAA)
    - ``"pixels"``: ``[77, 19, 403, 470]``, pixels of the image (ground truth of MM-ID)
    - ``"resized"``: ``[77, 19, 406, 466]``, pixels of the image as :func:`smart_resize` resizes it (Qwen2.5-VL)
    - ``"gemini"``: ``[40, 120, 980, 630]``, ``[y1, x1, y2, x2]``, 0..1000 of height and width (Gemini)
    - ``"bins32"``: ``4 1 20 31``, 0..31 of width and height; any number of bins (quantised coordinates, Pix2Seq)

    The kind is a property of the model and never guessed: "[120, 40, 630, 980]" is one box in pixels and another one
    in thousandths.

    Args:
        kind: see above. ``"resized"`` has the settings of Qwen2.5-VL as released, ``factor=28``, ``min_pixels=3136``,
            ``max_pixels=12845056``; others follow a colon: ``"resized:min_pixels=200704,max_pixels=1003520"``.
        resized_size: for ``"resized"`` without settings: returns the size that the image processor resizes to.

    Raises:
        ValueError: an unknown kind or setting, or ``resized_size`` for another kind.
    """

    KINDS = ("qwen", "thousand", "norm1000", "unit", "square", "pixels", "resized", "gemini")

    def __init__(self, kind: str, *, resized_size: ResizedSize | None = None):
        name, colon, settings = kind.partition(":") if isinstance(kind, str) else (kind, "", "")
        bins = _BINS.fullmatch(kind) if isinstance(kind, str) else None
        if (name not in self.KINDS and (bins is None or int(bins[1]) < 2)) or (colon and name != "resized"):
            raise ValueError(
                f"box_format={kind!r} is not known; choose one of {', '.join(map(repr, self.KINDS))}, or 'bins32' (any "
                "number of bins from 2 for the 32)."
            )
        if resized_size is not None and kind != "resized":
            raise ValueError(f"resized_size is for box_format='resized', not for {kind!r}; leave it out.")
        self.kind = name
        self.num_bins = int(bins[1]) if bins else None
        self._options = _resize_options(kind, settings)
        self._resized_size = resized_size

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

    @property
    def y_first(self) -> bool:
        """Whether the vertical coordinate of a corner comes first."""
        return self.kind == "gemini"

    def around_name(self, box: Sequence[float], image_size: Sequence[int]) -> tuple[str, str]:
        """Return the text of ``box`` before and after the name. All of it is after the name if it holds no name."""
        size, shift = self._frame(image_size)
        unit = [(value + offset) / side for value, offset, side in zip(box, shift * 2, size * 2, strict=True)]
        unit = [min(max(value, 0.0), 1.0) for value in unit]
        if self.kind in ("unit", "square"):
            return "", "[" + ", ".join(f"{value:.3f}" for value in unit) + "]"
        x1, y1, x2, y2 = (round(value * steps) for value, steps in zip(unit, self._steps(image_size) * 2, strict=True))
        if self.kind == "qwen":
            return "<ref>", f"</ref><box>({x1},{y1}),({x2},{y2})</box>"
        if self.y_first:
            return "", f"[{y1}, {x1}, {y2}, {x2}]"
        return "", f"{x1} {y1} {x2} {y2}" if self.num_bins else f"[{x1}, {y1}, {x2}, {y2}]"

    def parse(self, text: str, image_size: Sequence[int] | None, *, name: str = "") -> list[float] | None:
        """The box in ``text`` in pixels, or None, see :meth:`read`."""
        return self.read(text, image_size, name=name)[0]

    def read(
        self, text: str, image_size: Sequence[int] | None, *, name: str = "", other_names: Sequence[str] = ()
    ) -> tuple[list[float] | None, str | None]:
        """Find a box in ``text``, and say why there is none.

        Of several boxes, the one that the answer assigns to ``name`` counts, otherwise the first. Exchanged corners are
        sorted, and the part outside the image is cut off. Numbers that cannot be of this kind (0.3 in thousandths or
        pixels, 300 in 0..1, more than a tenth outside the image) are no box and never interpreted as another kind.

        Args:
            text: the answer of a model; see :func:`find_boxes` for the forms that are recognised.
            image_size: height and width of the image. None is allowed for ``"pixels"``; the box is not cut off then.
            name: identity that the question is about.
            other_names: names of other identities. A box that the answer assigns to one of them does not count.

        Returns:
            ``[x1, y1, x2, y2]`` in pixels and None; or None and the reason: ``"none"`` (no box in text), ``"empty"``
            (nothing of it lies in the image) or ``"convention"`` (the numbers cannot be of this kind).

        Raises:
            ValueError: ``image_size`` is None although the kind needs it.
        """
        numbers = _of_name(self._find(text, image_size), name, other_names)
        return (None, "none") if numbers is None else self._box_in_image(numbers, image_size)

    def read_boxes(self, text: str, image_size: Sequence[int] | None) -> tuple[list[list[float]], str | None]:
        """Find all boxes in ``text``, whatever names the answer assigns to them.

        Args:
            text, image_size: as in :meth:`read`.

        Returns:
            The boxes that can be read, in the order of the text, in pixels; and the reason why there are no more: None
            if all were read, ``"none"`` if the text has none, otherwise the reason for the first one that is left out.

        Raises:
            ValueError: as in :meth:`read`.
        """
        found = [self._box_in_image(numbers, image_size) for _, numbers in self._find(text, image_size)]
        reasons = [reason for _, reason in found if reason is not None]
        return [box for box, _ in found if box is not None], next(iter(reasons), None if found else "none")

    def _find(self, text: str, image_size: Sequence[int] | None) -> "list[tuple[str, Numbers]]":
        """The labels and numbers of the boxes in ``text``."""
        if image_size is None and self.kind != "pixels":
            raise ValueError(
                f"image_size=None, but boxes of kind {self.kind!r} are relative to the image; pass its height and "
                "width."
            )
        return find_boxes(text, spaced=self.num_bins is not None, y_first=self.y_first)

    def _box_in_image(
        self, numbers: "Numbers", image_size: Sequence[int] | None
    ) -> tuple[list[float] | None, str | None]:
        """The box in pixels and None, or None and the reason, see :meth:`read`."""
        if not all(map(math.isfinite, numbers)) or not self._is_plausible(numbers, image_size):
            return None, "convention"
        pixels = self._to_pixels(numbers, image_size)
        x1, x2 = sorted((pixels[0], pixels[2]))
        y1, y2 = sorted((pixels[1], pixels[3]))
        height, width = image_size if image_size is not None else (float("inf"),) * 2
        x1, x2 = max(x1, 0.0), min(x2, float(width))
        y1, y2 = max(y1, 0.0), min(y2, float(height))
        return ([x1, y1, x2, y2], None) if x1 < x2 and y1 < y2 else (None, "empty")

    def _steps(self, image_size: Sequence[int] | None) -> list[float]:
        """Largest coordinate across and down."""
        if self.kind == "pixels":
            return [float("inf")] * 2 if image_size is None else [image_size[1], image_size[0]]
        if self.kind == "resized":
            resize = self._resized_size or (lambda height, width: smart_resize(height, width, **self._options))
            height, width = resize(*image_size)
            return [width, height]
        if self.num_bins:
            return [self.num_bins - 1] * 2
        return [{"unit": 1, "square": 1, "norm1000": 1000, "gemini": 1000}.get(self.kind, 999)] * 2

    def _is_plausible(self, numbers: Sequence[float], image_size: Sequence[int] | None) -> bool:
        steps = self._steps(image_size)
        if not all(-_OUTSIDE <= number / side <= 1 + _OUTSIDE for number, side in zip(numbers, steps * 2, strict=True)):
            return False
        is_unit = 0 < max(numbers) <= 1 and (min(steps) > 100 or any(not number.is_integer() for number in numbers))
        return self.kind in ("unit", "square") or not is_unit

    def _to_pixels(self, numbers: Sequence[float], image_size: Sequence[int] | None) -> list[float]:
        if self.kind == "pixels":
            return list(numbers)
        size, shift = self._frame(image_size)
        unit = [number / steps for number, steps in zip(numbers, self._steps(image_size) * 2, strict=True)]
        return [value * side - offset for value, offset, side in zip(unit, shift * 2, size * 2, strict=True)]

    def _frame(self, image_size: Sequence[int]) -> tuple[list[float], list[float]]:
        """Return the width and height that coordinates refer to, and the offset of the image in that frame."""
        height, width = image_size
        if self.kind != "square":
            return [width, height], [0.0, 0.0]
        side = max(height, width)
        return [side, side], [(side - width) / 2, (side - height) / 2]


def _resize_options(kind: str, settings: str) -> dict[str, int]:
    options = dict(_RESIZE_OPTIONS)
    for setting in filter(None, settings.split(",")):
        name, _, value = setting.partition("=")
        if name.strip() not in options or not value.strip().isdecimal() or int(value) < 1:
            raise ValueError(
                f"box_format={kind!r}: {setting.strip()!r} is not a setting; expected for example "
                f"'resized:{','.join(f'{name}={default}' for name, default in _RESIZE_OPTIONS.items())}'."
            )
        options[name.strip()] = int(value)
    return options


def box_iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes ``[x1, y1, x2, y2]``; 0 if either is empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return width * height / (sum(areas) - width * height)


Numbers = tuple[float, ...]


def find_boxes(text: str, *, spaced: bool = False, y_first: bool = False) -> list[tuple[str, Numbers]]:
    """Find the four numbers of each box in the answer of a model, whatever the text around them.

    JSON is read as JSON: boxes are lists of four numbers (a fifth one below 1 is a score), pairs of corners, and named
    numbers (``x1, y1, x2, y2``; ``x, y, width, height``); their label is next to them. Other text may hold
    ``<box>(1,2),(3,4)</box>`` and the tags of other models, ``[1, 2, 3, 4]``, ``(1, 2) to (3, 4)``, ``1, 2, 3, 4``,
    ``[1 2 3 4]``, rows of tables, and named numbers. If it has box tags, only their content counts. If a final answer
    (``<answer>``, "the answer is") holds a box, the rest of the text does not count. "not [1, 2, 3, 4]" does not count
    if there is another box, nor does what is before "wait" or "correction".

    Args:
        text: the answer of a model.
        spaced: whether four numbers that are separated by spaces only are a box, wherever they occur.
        y_first: whether positional numbers are ``y1, x1, y2, x2``.

    Returns:
        For each box its label (the text that may name the identity) and its numbers ``x1, y1, x2, y2``.
    """
    for part in answer_parts(plain_answer(text)):
        found = _json_boxes(part, y_first) or _text_boxes(part, spaced, y_first)
        if found:
            return found
    return []


def _of_name(found: Sequence[tuple[str, Numbers]], name: str, other_names: Sequence[str]) -> Numbers | None:
    """The box whose label is the name, otherwise the first whose label contains it, otherwise the first without any."""
    wanted = normal_name(name)
    names = [set(name_matches(label, [name, *other_names])) for label, _ in found]
    exact = [numbers for label, numbers in found if name and normal_name(label) == wanted]
    named = exact or [numbers for (_, numbers), of in zip(found, names, strict=True) if name in of]
    return next(iter(named or [numbers for (_, numbers), of in zip(found, names, strict=True) if not of]), None)


def _json_boxes(text: str, y_first: bool) -> list[tuple[str, Numbers]]:
    """Boxes of the JSON objects in ``text``; lists of numbers alone are read as text."""
    values = [(start, end, list(_boxes_in(value, None, y_first))) for start, end, value in find_json(text)]
    values = [(start, end, found) for start, end, found in values if any(label is not None for label, _ in found)]
    around = _labels(text, [(start, end) for start, end, _ in values])
    return [
        (label or around_label, numbers)
        for (_, _, found), around_label in zip(values, around, strict=True)
        for label, numbers in found
    ]


def _boxes_in(value: Any, label: str | None, y_first: bool) -> Iterator[tuple[str | None, Numbers]]:
    """Boxes in a JSON value with their labels; the label is None outside objects and "" where an object has none."""
    if isinstance(value, list):
        numbers = _positional(value, y_first)
        if numbers is not None:
            yield label, numbers
            return
        strings = [entry for entry in value if isinstance(entry, str)]
        for entry in value:
            yield from _boxes_in(entry, strings[0] if len(strings) == 1 and len(value) == 2 else label, y_first)
        return
    if not isinstance(value, dict):
        return
    fields = [(re.sub(r"[\s-]", "_", key.lower()), content) for key, content in value.items()]
    answers = [content for key, content in fields if _ANSWER_KEY.fullmatch(key) and content]
    if answers:
        yield from _boxes_in(answers[-1], label or "", y_first)
        return
    own = [content for key, content in fields if _LABEL_KEY.fullmatch(key)]
    texts = [content for content in own if isinstance(content, str)]
    lists = [content for content in own if isinstance(content, list)]
    label = texts[0] if texts else label or ""
    numbers = _named_numbers(fields, y_first)
    if numbers is not None:
        yield label, numbers
        return
    for (key, content), original in zip(fields, value, strict=True):
        is_box = _BOX_KEY.fullmatch(key) is not None
        if is_box and isinstance(content, str):
            yield from ((label, numbers) for _, numbers in _text_boxes(content, True, y_first))
        elif is_box and lists and isinstance(content, list) and len(lists[0]) == len(content):
            for entry, entry_label in zip(content, lists[0], strict=True):
                yield from _boxes_in(entry, str(entry_label), y_first)
        elif isinstance(content, (dict, list)):
            yield from _boxes_in(content, label if is_box or texts else original, y_first)


def _positional(value: list, y_first: bool) -> Numbers | None:
    """The box of a list of four numbers, four and a score, or two corners."""
    if len(value) == 2 and all(isinstance(corner, list) and len(corner) == 2 for corner in value):
        value = [*value[0], *value[1]]
    try:
        numbers = tuple(float(entry) for entry in value if not isinstance(entry, (bool, list, dict, type(None))))
    except ValueError:
        return None
    if len(numbers) != len(value) or not (len(numbers) == 4 or (len(numbers) == 5 and isinstance(value[4], float))):
        return None
    if len(numbers) == 5 and not 0 <= numbers[4] <= 1:
        return None
    return _x_first(numbers[:4], y_first)


def _named_numbers(fields: Sequence[tuple[str, Any]], y_first: bool) -> Numbers | None:
    """The box of an object whose numbers or corners have names."""
    value: dict[str, float] = {}
    for key, content in fields:
        if isinstance(content, (int, float)) and not isinstance(content, bool):
            name = next((name for name, words in _NAMED_NUMBER.items() if words.fullmatch(key)), None)
            value |= {name: float(content)} if name else {}
    corners = [
        [content.get("x"), content.get("y")] if isinstance(content, dict) else content
        for pattern in (_TOP_LEFT, _BOTTOM_RIGHT)
        for key, content in fields
        if pattern.fullmatch(key)
    ]
    return _positional(corners, y_first) if len(corners) == 2 else _corners(value)


def _corners(value: dict[str, float]) -> Numbers | None:
    """``x1, y1, x2, y2`` of named numbers: corners, or a corner or centre with width and height."""
    value = {"x": value.get("x1"), "y": value.get("y1")} | value if "w" in value and "x2" not in value else value
    if {"x1", "y1", "x2", "y2"} <= value.keys():
        return value["x1"], value["y1"], value["x2"], value["y2"]
    if {"cx", "cy", "w", "h"} <= value.keys():
        x, y = value["cx"] - value["w"] / 2, value["cy"] - value["h"] / 2
        return x, y, x + value["w"], y + value["h"]
    if {"x", "y", "w", "h"} <= value.keys() and None not in (value["x"], value["y"]):
        return value["x"], value["y"], value["x"] + value["w"], value["y"] + value["h"]
    return None


def _x_first(numbers: Numbers, y_first: bool) -> Numbers:
    return (numbers[1], numbers[0], numbers[3], numbers[2]) if y_first else numbers


def _text_boxes(text: str, spaced: bool, y_first: bool) -> list[tuple[str, Numbers]]:
    """Boxes outside JSON, with the text that belongs to each."""
    tags = list(_TAGGED.finditer(text))
    if tags:
        contents = [(tag.start(), tag.end(), tag[2] or tag[3] or tag[4] or "") for tag in tags]
        contents = [(start, end, _find_numbers(inside, True, y_first)) for start, end, inside in contents]
        spans = [(start, end, inside[0][2]) for start, end, inside in contents if inside]
    else:
        spans = _find_numbers(text, spaced, y_first)
    ends = [0, *(end for _, end, _ in spans)]
    between = [text[end:start] for end, (start, _, _) in zip(ends, spans, strict=False)]
    first = max((number for number, before in enumerate(between) if number and _CORRECTION.search(before)), default=0)
    spans, between = spans[first:], between[first:]
    labels = _labels(text, [(start, end) for start, end, _ in spans])
    found = [(label, numbers) for label, (_, _, numbers) in zip(labels, spans, strict=True)]
    affirmed = [box for box, before in zip(found, between, strict=True) if not _is_denied(before)]
    return affirmed or found


def _labels(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """The text that belongs to the box at each span.

    That is the sentence or line of the box if no other box is in it and it has words. Otherwise it is the text between
    the boxes: what follows if the line of the first box starts with the box and words follow the last box, what is
    before otherwise. Words such as "bbox:" do not count.
    """
    if not spans:
        return []
    ends, starts = [0, *(end for _, end in spans)], [*(start for start, _ in spans), len(text)]
    gaps = [text[end:start] for end, start in zip(ends, starts, strict=True)]
    words = [_BOX_WORD.sub("", without_markdown(gap)) for gap in gaps]
    follows = not _LETTER.search(words[0].rpartition("\n")[2]) and _LETTER.search(words[-1]) is not None
    labels = gaps[1:] if follows else gaps[:-1]
    marks = [0, *(mark.end() for mark in _SENTENCE_END.finditer(text)), len(text)]
    sentences = [(bisect_right(marks, start), bisect_left(marks, end)) for start, end in spans]
    for number, (first, last) in enumerate(sentences):
        if number > 0 and sentences[number - 1][1] >= first:
            continue
        if number + 1 < len(spans) and sentences[number + 1][0] <= last:
            continue
        around = text[marks[first - 1] : spans[number][0]] + " " + text[spans[number][1] : marks[last]]
        if _LETTER.search(_BOX_WORD.sub("", around)):
            labels[number] = around
    return labels


def _is_denied(before: str) -> bool:
    """Whether the text before a box ends with "not", or with "not" and one or two words, and with a space."""
    text = before.rstrip("[(<{" + string.whitespace)
    return before[len(text) : len(text) + 1].isspace() and _NOT.search(" ".join(text.split()[-4:])) is not None


def _find_numbers(text: str, spaced: bool, y_first: bool) -> list[tuple[int, int, Numbers]]:
    """Return start, end and numbers of each box in text without tags."""
    spans = _runs(text) + _spans(text, _PAIRS, _BRACKETED)
    if not spans and (named := _named(text)):
        return named
    if not spans and (spaced or _SPACED.fullmatch(text.strip(" .\n"))):
        spans = _spans(text, _SPACED)
    return sorted((start, end, _x_first(numbers, y_first)) for start, end, numbers in spans)


def _runs(text: str) -> list[tuple[int, int, Numbers]]:
    """Find four numbers that are separated by commas and are not percentages; a fifth one may be a score."""
    runs: list[list[re.Match]] = []
    for number in _ONE_NUMBER.finditer(text):
        if runs and _BETWEEN_NUMBERS.fullmatch(text, runs[-1][-1].end(), number.start()):
            runs[-1].append(number)
        else:
            runs.append([number])
    spans = []
    for run in runs:
        end = run[-1].end()
        has_score = len(run) == 5 and "." in run[4][0] and 0 <= float(run[4][0]) <= 1
        if (len(run) == 4 or has_score) and not _PERCENT.match(text, end):
            unit = _UNIT.match(text, end)
            numbers = tuple(float(number[0]) for number in run[:4])
            spans.append((run[0].start(), unit.end() if unit else end, numbers))
    return spans


def _spans(text: str, *forms: re.Pattern) -> list[tuple[int, int, Numbers]]:
    matches = [match for form in forms for match in form.finditer(text)]
    spans = [(match.start(), match.end(), _numbers(match[0])) for match in matches]
    return [span for span in spans if len(span[2]) == 4]


def _named(text: str) -> list[tuple[int, int, Numbers]]:
    """Find boxes whose numbers have names. A name that occurs again starts the next box."""
    boxes: list[dict[str, re.Match]] = [{}]
    for match in _KEY.finditer(text):
        if match.lastgroup in boxes[-1]:
            boxes.append({})
        boxes[-1][match.lastgroup] = match
    spans = []
    for box in boxes:
        numbers = _corners({key: _numbers(match[0])[-1] for key, match in box.items()})
        if numbers is not None:
            spans.append((min(m.start() for m in box.values()), max(m.end() for m in box.values()), numbers))
    return spans


def _numbers(text: str) -> Numbers:
    return tuple(float(number) for number in re.findall(_NUMBER, text))
