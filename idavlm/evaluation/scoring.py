"""From an evaluation sample and an answer to a scored prediction."""

from collections.abc import Callable, Sequence
from statistics import fmean

from idavlm.data.schema import Sample
from idavlm.evaluation.metrics import score_box, score_description, score_picture
from idavlm.evaluation.results import Prediction

CHOICE_TASKS = ("qa_single", "qa_multi")
"""Tasks whose answer is chosen among the right and the false ones; the others are written freely."""


def score_answer(
    sample: Sample,
    text: str,
    *,
    image_size: tuple[int, int],
    parse_box: Callable[[str, tuple[int, int]], list[float] | None],
    names: Sequence[str],
) -> Prediction:
    """Score ``text`` as the answer to ``sample``.

    Guessing means: for matching and questions, one of the answers; for location, one of the persons with a box.

    Args:
        sample: with its right answer.
        text: what the model wrote or chose.
        image_size: height and width of the last picture.
        parse_box: from text and image size to pixels ``[x1, y1, x2, y2]``, or None where the text holds no box.
        names: see :func:`idavlm.evaluation.score_description`.
    """
    if sample.type == "location":
        return _score_location(sample, text, parse_box(text, image_size))
    chance = {}
    if sample.type.startswith("caption"):
        scores = score_description(text, sample.answer, names)
    else:
        matching = sample.type == "matching"
        scores = score_picture(text, sample.answer) if matching else {"accuracy": float(text == sample.answer)}
        if sample.false_answers:
            chance = {"accuracy": 1 / (1 + len(sample.false_answers))}
    return Prediction(
        id=sample.id,
        type=sample.type,
        text=text,
        answer=sample.answer,
        scores=scores or {"accuracy": 0.0},
        chance=chance,
        parsed=scores is not None,
    )


def _score_location(sample: Sample, text: str, box: list[float] | None) -> Prediction:
    gold = sample.target_box
    persons = [score_box(other.box, gold.box) for other in sample.boxes if other.image == gold.image]
    return Prediction(
        id=sample.id,
        type=sample.type,
        text=text,
        answer=sample.answer,
        # No box has no area in common with any.
        scores=score_box(box or (0, 0, 0, 0), gold.box),
        chance={metric: fmean(person[metric] for person in persons) for metric in persons[0]},
        box=None if box is None else [float(edge) for edge in box],
        gold_box=[float(edge) for edge in gold.box],
        parsed=box is not None,
    )
