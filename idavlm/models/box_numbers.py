"""Four numbers of a box in whatever a model wrote around them; what they count in is not known here."""

import re
from dataclasses import dataclass

from idavlm.utils import last_answer, plain_answer

_NUMBER = r"-?(?:\d+(?:\.\d+)?|\.\d+)"
_RUN = re.compile(rf"{_NUMBER}(?:\s*px)?(?:\s*[,;]\s*{_NUMBER}(?:\s*px)?)*(?!\s*%)")
_SPACED = re.compile(rf"[\[({{]\s*{_NUMBER}(?:\s+{_NUMBER}){{3}}\s*[\])}}]")
_ONLY_SPACED = re.compile(rf"\s*{_NUMBER}(?:\s+{_NUMBER}){{3}}[\s.]*")
_TAGGED = re.compile(r"<box>(.*?)(?:</box>|\Z)|<\|box_start\|>(.*?)(?:<\|box_end\|>|\Z)", re.DOTALL)
_WORDS = {
    "x1": "x1|x_?min|left", "y1": "y1|y_?min|top", "x2": "x2|x_?max|right", "y2": "y2|y_?max|bottom",
    "x": "x", "y": "y", "w": "w|width", "h": "h|height",
}  # fmt: skip
_KEY = re.compile(
    "|".join(rf"(?P<{key}>(?<![\w])(?:{words})(?![\w])[\"']?\s*[:=]\s*{_NUMBER})" for key, words in _WORDS.items()),
    re.IGNORECASE,
)
_NOT = re.compile(r"\b(?:not|isn't|no longer|instead of|rather than)\s+(?:\w+\s+){0,2}[\[(<{\s]*$", re.IGNORECASE)
_GAP = 40  # letters between "top left (10, 20)" and "bottom right (30, 40)"


@dataclass(frozen=True)
class FoundNumbers:
    """Four numbers and the text between the box before them and theirs."""

    numbers: tuple[float, float, float, float]
    before: str


def find_box_numbers(text: str, *, spaced: bool = False) -> list[FoundNumbers]:
    """All boxes in ``text``, in their order.

    Read are ``<box>(1,2),(3,4)</box>``, ``[1, 2, 3, 4]``, ``(1, 2) to (3, 4)``, ``1, 2, 3, 4``, ``[1 2 3 4]``, and
    named numbers (``x1=1, y1=2, ...``, ``left: 1, top: 2, ...``; ``x, y, width, height`` are turned into corners).
    Where the text has box tags, only what stands in them counts; where it says "the answer is", what follows that, if
    it holds a box; "not [1, 2, 3, 4]" does not count where another box is given.

    Args:
        text: what a model wrote.
        spaced: whether four numbers with mere spaces between them are a box too, wherever they stand.
    """
    text = plain_answer(text)
    found = _search(last_answer(text), spaced) or _search(text, spaced)
    affirmed = [one for one in found if not _NOT.search(one.before)]
    return affirmed or found


def _search(text: str, spaced: bool) -> list[FoundNumbers]:
    tags = list(_TAGGED.finditer(text))
    if tags:
        found, end = [], 0
        for tag in tags:
            inside = _plain(next(filter(None, tag.groups()), ""), spaced)
            found += [FoundNumbers(one.numbers, text[end : tag.start()]) for one in inside[:1]]
            end = tag.end()
        return found
    return _plain(text, spaced)


def _plain(text: str, spaced: bool) -> list[FoundNumbers]:
    if _ONLY_SPACED.fullmatch(text):
        return [FoundNumbers(_numbers(text), "")]
    spans = [(match.start(), match.end(), _numbers(match[0])) for match in _SPACED.finditer(text)]
    runs = [(match.start(), match.end(), _numbers(match[0])) for match in _RUN.finditer(text)]
    spans += [run for run in runs if len(run[2]) == 4]
    pairs = [run for run in runs if len(run[2]) == 2 and text[: run[0]].rstrip()[-1:] in tuple("([{<")]
    while len(pairs) > 1:
        first, second = pairs[0], pairs[1]
        between = text[first[1] : second[0]]
        if len(between) <= _GAP and not re.search(r"\d|\n\n", between):
            spans.append((first[0], second[1], first[2] + second[2]))
            pairs = pairs[2:]
        else:
            pairs = pairs[1:]
    if not spans:
        spans = _named(text)
    if not spans and spaced:
        four = re.finditer(rf"(?<![\d.,]){_NUMBER}(?:\s+{_NUMBER}){{3}}", text)
        spans = [(match.start(), match.end(), _numbers(match[0])) for match in four]
    spans.sort()
    ends = [0, *(end for _, end, _ in spans)]
    return [FoundNumbers(numbers, text[end:start]) for end, (start, _, numbers) in zip(ends, spans, strict=False)]


def _named(text: str) -> list[tuple[int, int, tuple]]:
    """Boxes whose numbers have names; a name seen again begins the next box."""
    boxes: list[dict[str, tuple[int, int, float]]] = [{}]
    for match in _KEY.finditer(text):
        key = match.lastgroup
        if key in boxes[-1]:
            boxes.append({})
        boxes[-1][key] = (match.start(), match.end(), _numbers(match[0].split("=")[-1].split(":")[-1])[0])
    found = []
    for box in boxes:
        value = {key: number for key, (_, _, number) in box.items()}
        if {"x1", "y1", "x2", "y2"} <= value.keys():
            numbers = (value["x1"], value["y1"], value["x2"], value["y2"])
        elif {"x", "y", "w", "h"} <= value.keys():
            numbers = (value["x"], value["y"], value["x"] + value["w"], value["y"] + value["h"])
        else:
            continue
        found.append((min(s for s, _, _ in box.values()), max(e for _, e, _ in box.values()), numbers))
    return found


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in re.findall(_NUMBER, text))
