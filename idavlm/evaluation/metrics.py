"""From the text a model wrote to scores in 0..1, one function a kind of task."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from idavlm.evaluation.parsing import parse_picture

Box = Sequence[float]
"""Pixels ``[x1, y1, x2, y2]``."""

_TOKEN = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]|\w+")
_TITLES = {
    "Agent",
    "Captain",
    "Doctor",
    "Dr",
    "General",
    "King",
    "Lady",
    "Lord",
    "Major",
    "Master",
    "Miss",
    "Mr",
    "Mrs",
}
_TITLES |= {"Ms", "Prince", "Princess", "Professor", "Queen", "Sergeant", "Sir", "The", "Young", "Old", "Big", "Little"}
_PICTURE = re.compile(r"\s*(?:picture|image|photo)\s*#?\s*\w+\s*", re.IGNORECASE)
_END_OF_CLAUSE = re.compile(r"[.;,!?\n]|\band\b")


def box_iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes; 0 where either is empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return width * height / (sum(areas) - width * height)


def names_in(text: str, names: Iterable[str] | Mapping[str, str]) -> set[str]:
    """Those of ``names`` that stand in ``text`` as whole words; "Elvish Ranger" is not also "Ranger".

    Upper and lower case count: "Rose" is a name, "rose" is not. Of a mapping (:func:`name_spellings`) the keys are
    looked for, and what they stand for is returned.
    """
    spelling = names if isinstance(names, Mapping) else {name: name for name in names}
    longest_first = sorted((name for name in spelling if name in text), key=len, reverse=True)
    if not longest_first:
        return set()
    found = re.findall(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", text)
    return {spelling[one] for one in found}


def name_spellings(own: Sequence[str], all_names: Iterable[str] = ()) -> dict[str, str]:
    """Spellings of the people introduced, each with the name: "Beth Hardiment" is "Beth" too, and "Hardiment".

    A part of a name counts where it begins with a capital, is no title ("Captain") and belongs to one person of ``own``
    only. Names of ``all_names``, people of other samples, count where they have two words or more: one word ("Will",
    "Four") may be an ordinary one.
    """
    parts: dict[str, set[str]] = {}
    for name in own:
        for part in _TOKEN.findall(re.sub(r"\(.*?\)", " ", name)):
            if part[:1].isupper() and len(part) > 1 and part not in _TITLES:
                parts.setdefault(part, set()).add(name)
    spelling = {name: name for name in all_names if len(name.split()) > 1}
    spelling |= {part: next(iter(names)) for part, names in parts.items() if len(names) == 1}
    return spelling | {name: name for name in own}


def closest(text: str, texts: Sequence[str]) -> str:
    """That of ``texts`` which shares most words and pairs of words with ``text`` (F1); the first of equals.

    One that is ``text``, but for case and punctuation, is the closest whatever else there is.
    """
    said = words(text)

    def share(other: str) -> float:
        given = words(other)
        return 2.0 if given == said else _f1([*said, *pairwise(said)], [*given, *pairwise(given)])

    return max(texts, key=share)


def word_f1(text: str, answer: str) -> float:
    """F1 of the words of ``text`` and ``answer``."""
    return _f1(words(text), words(answer))


def words(text: str) -> list[str]:
    """Words in lower case; every Chinese or Japanese sign is one."""
    return _TOKEN.findall(text.lower())


def _f1(first: Sequence, second: Sequence) -> float:
    common = sum((Counter(first) & Counter(second)).values())
    return 2 * common / max(1, len(first) + len(second))


def score_picture(text: str, answer: str, *, count: int | None = None, name: str = "") -> dict[str, float] | None:
    """``accuracy`` of a matching answer; None where ``text`` names no picture, see :func:`parse_picture`.

    Raises:
        ValueError: the right answer names no picture.
    """
    right = parse_picture(answer)
    if right is None:
        raise ValueError(f"answer={answer!r} names no picture; expected the likes of 'Picture 3'.")
    chosen = parse_picture(text, count=count, name=name)
    return None if chosen is None else {"accuracy": float(chosen == right)}


def score_box(predicted: Box, gold: Box) -> dict[str, float]:
    """``mean_iou`` and ``acc@0.5`` of one box."""
    iou = box_iou(predicted, gold)
    return {"mean_iou": iou, "acc@0.5": float(iou >= 0.5)}


def score_description(
    text: str, answer: str, names: Iterable[str] | Mapping[str, str], *, clauses: bool = True
) -> dict[str, float]:
    """How well a description tells who is there, and who does what.

    ``name_precision``: share of the names in ``text`` that the right answer has too. Who names nobody where somebody
    is known has precision 0. ``name_recall``: share of the answer's names that ``text`` has. ``name_f1``: their
    harmonic mean. They are full for a model that repeats the names it was given and looks at nothing, therefore
    ``clause_recall``: share of the answer's clauses with a name ("Kate is waving") that ``text`` has literally and of
    the same picture, whatever their order.

    Args:
        text: what the model wrote.
        answer: the right answer.
        names: every name that counts; of all records, so that one of another record is an error. Or a mapping of
            spellings to names, see :func:`name_spellings`.
        clauses: whether to compute ``clause_recall``, which makes sense where answers are worded alike.
    """
    names = names if isinstance(names, Mapping) else list(names)
    said, known = names_in(text, names), names_in(answer, names)
    precision = _share(len(said & known), len(said), empty=not known)
    recall = _share(len(said & known), len(known), empty=True)
    scores = {"name_precision": precision, "name_recall": recall}
    scores["name_f1"] = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    if clauses:
        told = set(_clauses(text))
        right = [clause for clause in _clauses(answer) if names_in(clause[1], names)]
        scores["clause_recall"] = _share(sum(clause in told for clause in right), len(right), empty=True)
    return scores


def _clauses(text: str) -> list[tuple[int | None, str]]:
    """Clauses, each with the number of the picture ("Picture 2: ...") it speaks of."""
    found, picture = [], None
    for clause in _END_OF_CLAUSE.split(text):
        head, colon, rest = clause.partition(":")
        number = parse_picture(head) if colon and _PICTURE.fullmatch(head) else None
        if number is not None:
            picture, clause = number, rest
        if clause.strip():
            found.append((picture, " ".join(clause.split())))
    return found


def _share(part: int, whole: int, *, empty: bool) -> float:
    return part / whole if whole else float(empty)
