"""Score answers: metrics in 0..1 for each kind of task, and :func:`score_answers` for whole evaluation sets."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean

from idavlm.data.schema import Sample
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.choices import CHOICE_TASKS, candidates, most_likely
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.models.boxes import box_iou
from idavlm.utils.answer_parsing import is_refusal, parse_image_number, says_absent
from idavlm.utils.answer_text import name_matches, plain_answer

MAX_EDGE = 1e9
"""Largest coordinate of a box in pixels; larger numbers are not a box."""

ReadBox = Callable[..., "tuple[list[float] | None, str | None]"]
"""``read_box(text, image_size, name=..., other_names=...)``: pixels and None, or None and the reason why there is no
box, see :meth:`idavlm.models.BoxFormat.read`."""

_TOKEN = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]|\w+")
_TITLES = (
    {"Agent", "Captain", "Doctor", "Dr", "General", "King", "Lady", "Lord", "Major", "Master", "Miss", "Mr", "Mrs"}
    | {"Ms", "Prince", "Princess", "Professor", "Queen", "Sergeant", "Sir", "The", "Young", "Old", "Big", "Little"}
)  # fmt: skip
_IMAGE_LABEL = re.compile(r"\s*(?:picture|image|photo)\s*#?\s*\w+\s*", re.IGNORECASE)
_END_OF_CLAUSE = re.compile(r"[.;,!?\n]|\band\b")


def names_in(text: str, names: Iterable[str] | Mapping[str, str]) -> set[str]:
    """The ``names`` that occur in ``text`` as whole words; "Elvish Ranger" does not count as "Ranger".

    The search is case-sensitive: "Rose" is a name, "rose" is not. Unicode normal forms do not matter. If ``names`` is a
    mapping of spellings to names (:func:`name_spellings`), spellings are searched and the corresponding names are
    returned.
    """
    spellings = names if isinstance(names, Mapping) else {name: name for name in names}
    return {spellings[spelling] for spelling in name_matches(text, spellings, ignore_case=False)}


def name_spellings(own: Sequence[str], all_names: Iterable[str] = ()) -> dict[str, str]:
    """Map spellings to names: "Beth" and "Hardiment" are spellings of "Beth Hardiment".

    Args:
        own: names of the identities of a sample. A part of a name is a spelling if it starts with a capital letter, is
            not a title ("Captain") and belongs to one name of ``own`` only.
        all_names: names of other samples. They count only if they have at least two words, because a single word
            ("Will", "Four") may be an ordinary word.
    """
    parts: dict[str, set[str]] = {}
    for name in own:
        for part in _TOKEN.findall(re.sub(r"\([^()]*\)", " ", name)):
            if part[:1].isupper() and len(part) > 1 and part not in _TITLES:
                parts.setdefault(part, set()).add(name)
    spellings = {name: name for name in all_names if len(name.split()) > 1}
    spellings |= {part: next(iter(names)) for part, names in parts.items() if len(names) == 1}
    return spellings | {name: name for name in own}


def closest(text: str, texts: Sequence[str]) -> str:
    """The element of ``texts`` with the highest F1 of words and word pairs with ``text``; the first one of a tie.

    A text that equals ``text`` up to case and punctuation is always the closest.
    """
    text_words = words(plain_answer(text))

    def similarity(other: str) -> float:
        other_words = words(other)
        if other_words == text_words:
            return 2.0
        return _f1([*text_words, *pairwise(text_words)], [*other_words, *pairwise(other_words)])

    return max(texts, key=similarity)


def word_f1(text: str, answer: str) -> float:
    """F1 of the words of ``text`` and ``answer``."""
    return _f1(words(text), words(answer))


def words(text: str) -> list[str]:
    """Words in lower case; every Chinese or Japanese character is a word."""
    return _TOKEN.findall(text.lower())


def score_matching(text: str, answer: str, *, count: int | None = None, name: str = "") -> dict[str, float] | None:
    """``accuracy`` of a matching answer; None if ``text`` chooses no image, see :func:`parse_image_number`.

    Raises:
        ValueError: ``answer`` does not name an image.
    """
    right = parse_image_number(answer)
    if right is None:
        raise ValueError(f"answer={answer!r} names no image; expected a text like 'Picture 3'.")
    chosen = parse_image_number(text, count=count, name=name)
    return None if chosen is None else {"accuracy": float(chosen == right)}


def score_box(predicted: Sequence[float], gold: Sequence[float]) -> dict[str, float]:
    """``mean_iou`` and ``acc@0.5`` of one box; both boxes are ``[x1, y1, x2, y2]``."""
    iou = box_iou(predicted, gold)
    return {"mean_iou": iou, "acc@0.5": float(iou >= 0.5)}


def score_description(
    text: str, answer: str, names: Iterable[str] | Mapping[str, str], *, clauses: bool = True
) -> dict[str, float]:
    """Score which identities a description names, and what it says about them.

    - ``name_precision``: share of the names in ``text`` that are in ``answer`` too. It is 0 if ``text`` names no
      identity but ``answer`` does.
    - ``name_recall``: share of the names in ``answer`` that are in ``text``.
    - ``name_f1``: their harmonic mean. A model that repeats the introduced names without looking at the image reaches
      1 in all three.
    - ``clause_recall``: share of the clauses of ``answer`` with a name ("Kate is waving") that occur literally in
      ``text``, in any order, about the same image.

    Args:
        text: generated description.
        answer: right description.
        names: the names that count. Include the names of all records, so that naming an identity of another record is
            an error. May be a mapping of spellings to names, see :func:`name_spellings`.
        clauses: whether to compute ``clause_recall``. It is meaningful only if right answers follow fixed wordings.
    """
    names = names if isinstance(names, Mapping) else list(names)
    text = plain_answer(text)
    predicted, right = names_in(text, names), names_in(answer, names)
    precision = _share(len(predicted & right), len(predicted), empty=not right)
    recall = _share(len(predicted & right), len(right), empty=True)
    scores = {"name_precision": precision, "name_recall": recall}
    scores["name_f1"] = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    if clauses:
        predicted_clauses = set(_clauses(text))
        right_clauses = [clause for clause in _clauses(answer) if names_in(clause[1], names)]
        hits = sum(clause in predicted_clauses for clause in right_clauses)
        scores["clause_recall"] = _share(hits, len(right_clauses), empty=True)
    return scores


def score_answers(
    samples: Sequence[Sample],
    answers: Sequence[Answer],
    *,
    read_box: ReadBox | None,
    prose: bool = False,
    names: Sequence[str] | None = None,
    image_size: Callable[[Sample], tuple[int, int] | None] = lambda sample: None,
) -> EvaluationResult:
    """Score one answer per sample, both in the same order.

    Args:
        samples: evaluation samples.
        answers: from :func:`generate_answers` or :func:`load_answers`.
        read_box: reads the boxes that the model writes: ``processor.read_box``, or ``BoxFormat(kind).read``. May be
            None if no sample asks for a box.
        prose: whether the right descriptions are free prose (MM-ID). Then ``clause_recall`` is not computed, and parts
            of names count as names.
        names: names that count in descriptions; by default the names of all samples.
        image_size: returns height and width of the last image of a sample, for answers without ``image_size``.

    Raises:
        ValueError: ``answers`` do not belong to ``samples`` or hold nothing to score, or ``read_box`` is missing.
    """
    if [sample.id for sample in samples] != [answer.id for answer in answers]:
        raise ValueError(
            f"answers: the ids of {len(answers)} answers are not those of the {len(samples)} samples, in their order; "
            "pass the answers that were generated for these samples."
        )
    for sample, answer in zip(samples, answers, strict=True):
        if answer.prediction is None and (sample.task not in CHOICE_TASKS or answer.likelihoods is None):
            raise ValueError(
                f"answers: the answer to {sample.where or sample.id} of task {sample.task!r} has no prediction; only "
                "answers to multiple-choice questions may have likelihoods instead."
            )
    if read_box is None and any(sample.task == "location" for sample in samples):
        raise ValueError(
            "read_box=None, but some samples ask for a box; pass processor.read_box or BoxFormat(kind).read."
        )
    if names is None:
        names = sorted({identity.name for sample in samples for identity in sample.identities})
    predictions = []
    for sample, answer in zip(samples, answers, strict=True):
        size = answer.image_size or (image_size(sample) if sample.task == "location" else None)
        spellings = name_spellings([identity.name for identity in sample.identities], names) if prose else names
        predictions.append(
            score_answer(sample, answer, image_size=size, read_box=read_box, names=spellings, clauses=not prose)
        )
    return EvaluationResult(predictions)


def score_answer(
    sample: Sample,
    answer: Answer,
    *,
    image_size: tuple[int, int] | None,
    read_box: ReadBox | None,
    names: Sequence[str] | Mapping[str, str],
    clauses: bool = True,
) -> Prediction:
    """Score the answer to one sample.

    The answer to a location question whose target has no box in the last image is scored by ``not_here`` (it says that
    the target is not there) and ``false_positive`` (it holds a box).

    ``Prediction.chance`` is the expected score of a uniform choice: among the candidates for matching and questions,
    among the annotated boxes of the image for location.

    Args:
        sample: evaluation sample.
        answer: generated text, likelihoods of the candidates, or both.
        image_size: height and width of the last image.
        read_box: see :func:`score_answers`.
        names: see :func:`score_description`.
        clauses: whether descriptions get ``clause_recall``.
    """
    if sample.task == "location":
        return _score_location(sample, answer.prediction or "", image_size, read_box)
    text, scores, chance, refused = answer.prediction or "", None, {}, False
    if sample.task == "matching":
        count = len(sample.false_answers) + 1 if sample.false_answers else None
        scores = score_matching(text, sample.answer, count=count, name=sample.target or "")
    elif sample.task in CHOICE_TASKS:
        scores = {}
        refused = is_refusal(text) and not any(map(is_refusal, candidates(sample)))
        if answer.likelihoods and sample.false_answers:
            scores["accuracy"] = float(most_likely(sample, answer.likelihoods) == sample.answer)
        if answer.prediction is not None and sample.false_answers:
            scores["closest_accuracy"] = float(not refused and closest(text, candidates(sample)) == sample.answer)
        if answer.prediction is None:
            text = most_likely(sample, answer.likelihoods)
    else:
        scores = score_description(text, sample.answer, names, clauses=clauses)
        refused = is_refusal(text) and not names_in(plain_answer(text), names)
    parsed = scores is not None
    scores = {"accuracy": 0.0} if scores is None else scores
    if sample.false_answers and not sample.task.startswith("caption"):
        chance = dict.fromkeys(scores, 1 / (1 + len(sample.false_answers)))
    problem = "refused" if refused or (not parsed and is_refusal(text)) else ""
    return Prediction(sample.id, sample.task, text, sample.answer, scores, chance, parsed=parsed, problem=problem)


def _score_location(sample: Sample, text: str, image_size: tuple[int, int] | None, read_box: ReadBox) -> Prediction:
    others = [identity.name for identity in sample.identities if identity.name != sample.target]
    (box, reason), gold = read_box(text, image_size, name=sample.target, other_names=others), sample.target_box
    if box is not None and not all(abs(edge) < MAX_EDGE for edge in box):
        box = None  # without the size of the image, boxes of any numbers are parsed
    problem = "other box format" if reason == "convention" else ""
    if reason == "none" and is_refusal(text):
        problem = "refused"
    if gold is None:
        # A box claims that the target is there, whatever its format.
        absent = reason == "none" and problem != "refused" and says_absent(text)
        scores = {"not_here": float(absent), "false_positive": float(reason != "none")}
        box = None if box is None else [float(edge) for edge in box]
        parsed = box is not None or absent
        return Prediction(sample.id, "location", text, sample.answer, scores, box=box, parsed=parsed, problem=problem)
    boxes = [score_box(other.box, gold.box) for other in sample.boxes if other.image == gold.image]
    chance = {metric: fmean(scores[metric] for scores in boxes) for metric in boxes[0]} if len(boxes) > 1 else {}
    scores = score_box(box or (0, 0, 0, 0), gold.box)  # an empty box has IoU 0
    return Prediction(
        sample.id,
        sample.task,
        text,
        sample.answer,
        scores,
        chance,
        box=None if box is None else [float(edge) for edge in box],
        gold_box=[float(edge) for edge in gold.box],
        parsed=box is not None,
        problem=problem,
    )


def _f1(first: Sequence, second: Sequence) -> float:
    common = sum((Counter(first) & Counter(second)).values())
    return 2 * common / max(1, len(first) + len(second))


def _clauses(text: str) -> list[tuple[int | None, str]]:
    """Clauses of ``text``, each with the number of the image ("Picture 2: ...") that it describes."""
    found, image = [], None
    for clause in _END_OF_CLAUSE.split(text):
        head, colon, rest = clause.partition(":")
        number = parse_image_number(head) if colon and _IMAGE_LABEL.fullmatch(head) else None
        if number is not None:
            image, clause = number, rest
        if clause.strip():
            found.append((image, " ".join(clause.split())))
    return found


def _share(part: int, whole: int, *, empty: bool) -> float:
    return part / whole if whole else float(empty)
