"""From the text a model wrote to scores in 0..1, one function a kind of task."""

import re
from collections.abc import Iterable, Sequence

Box = Sequence[float]
"""Pixels ``[x1, y1, x2, y2]``."""

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_PICTURE = re.compile(rf"\b(?:picture|image|photo)s?\s*#?\s*(\d+|{'|'.join(_NUMBERS)})\b", re.IGNORECASE)
_BARE_NUMBER = re.compile(r"\s*#?(\d+)\s*\.?\s*")
_END_OF_CLAUSE = re.compile(r"[.;,!?\n]|\band\b")


def parse_picture(text: str) -> int | None:
    """Number of the first picture that ``text`` names, None where it names none.

    "Picture 3", "image three" and "photo #3" are 3, and so is a text that is nothing but the number. "Image 4, not
    Image 1" is 4.
    """
    named = _PICTURE.search(text)
    if named is None:
        bare = _BARE_NUMBER.fullmatch(text)
        return int(bare[1]) if bare else None
    number = named[1].lower()
    return _NUMBERS.index(number) + 1 if number in _NUMBERS else int(number)


def box_iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes; 0 where either is empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return width * height / (sum(areas) - width * height)


def names_in(text: str, names: Iterable[str]) -> set[str]:
    """Those of ``names`` that stand in ``text`` as whole words; "Elvish Ranger" is not also "Ranger".

    Upper and lower case count: "Rose" is a name, "rose" is not.
    """
    longest_first = sorted(set(names), key=len, reverse=True)
    if not longest_first:
        return set()
    return set(re.findall(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", text))


def score_picture(text: str, answer: str) -> dict[str, float] | None:
    """``accuracy`` of a matching answer; None where ``text`` names no picture.

    Raises:
        ValueError: the right answer names no picture.
    """
    right = parse_picture(answer)
    if right is None:
        raise ValueError(f"answer={answer!r} names no picture; expected the likes of 'Picture 3'.")
    chosen = parse_picture(text)
    return None if chosen is None else {"accuracy": float(chosen == right)}


def score_box(predicted: Box, gold: Box) -> dict[str, float]:
    """``mean_iou`` and ``acc@0.5`` of one box."""
    iou = box_iou(predicted, gold)
    return {"mean_iou": iou, "acc@0.5": float(iou >= 0.5)}


def score_description(text: str, answer: str, names: Iterable[str]) -> dict[str, float]:
    """How well a description tells who is there, and who does what.

    ``name_precision``: share of the names in ``text`` that the right answer has too. Who names nobody where somebody
    is known has precision 0. ``name_recall``: share of the answer's names that ``text`` has. Both are full for a
    model that repeats the names it was given and looks at nothing, therefore ``clause_recall``: share of the answer's
    clauses with a name ("Kate is waving") that ``text`` has literally and of the same picture, whatever their order.

    Args:
        text: what the model wrote.
        answer: the right answer.
        names: every name that counts; of all records, so that one of another record is an error.
    """
    names = list(names)
    said, known = names_in(text, names), names_in(answer, names)
    told = set(_clauses(text))
    clauses = [clause for clause in _clauses(answer) if names_in(clause[1], names)]
    return {
        "name_precision": _share(len(said & known), len(said), empty=not known),
        "name_recall": _share(len(said & known), len(known), empty=True),
        "clause_recall": _share(sum(clause in told for clause in clauses), len(clauses), empty=True),
    }


def _clauses(text: str) -> list[tuple[int | None, str]]:
    """Clauses, each with the number of the picture ("Picture 2: ...") it speaks of."""
    found, picture = [], None
    for clause in _END_OF_CLAUSE.split(text):
        head, colon, rest = clause.partition(":")
        if colon and parse_picture(head) is not None:
            picture, clause = parse_picture(head), rest
        if clause.strip():
            found.append((picture, " ".join(clause.split())))
    return found


def _share(part: int, whole: int, *, empty: bool) -> float:
    return part / whole if whole else float(empty)
