"""From evaluation samples and answers to scored predictions."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from idavlm.data.schema import Sample
from idavlm.evaluation.answers import Answer, candidates, likeliest
from idavlm.evaluation.generation import CHOICE_TASKS
from idavlm.evaluation.metrics import closest, name_spellings, score_box, score_description, score_picture
from idavlm.evaluation.results import EvaluationResult, Prediction

ParseBox = Callable[..., "list[float] | None"]
"""``parse_box(text, image_size, name=...)``: pixels ``[x1, y1, x2, y2]``, or None where the text holds no box."""


def score_answers(
    samples: Sequence[Sample],
    answers: Sequence[Answer],
    *,
    parse_box: ParseBox | None,
    prose: bool = False,
    names: Sequence[str] | None = None,
    image_size: Callable[[Sample], tuple[int, int] | None] = lambda sample: None,
) -> EvaluationResult:
    """Score answers, one a sample, in the same order.

    Args:
        samples: with their right answers.
        answers: of :func:`generate_answers` or :func:`load_answers`.
        parse_box: the model's way to write boxes: ``processor.parse_box``, or ``BoxFormat(kind).parse``. None will do
            where nothing asks for a box.
        prose: whether the right descriptions are free prose (MM-ID): then no ``clause_recall``, and people may be
            called by parts of their names.
        names: everybody who may be named wrongly; by default all people of ``samples``.
        image_size: height and width of a sample's last picture, for answers without.

    Raises:
        ValueError: answers that are not of these samples.
    """
    if [sample.id for sample in samples] != [answer.id for answer in answers]:
        raise ValueError(
            f"answers: {len(answers)} answers are not those to the {len(samples)} samples, in their order."
        )
    if parse_box is None and any(sample.task == "location" for sample in samples):
        raise ValueError("parse_box=None, but some samples ask for a box; say how the model writes boxes.")
    if names is None:
        names = sorted({identity.name for sample in samples for identity in sample.identities})
    predictions = []
    for sample, answer in zip(samples, answers, strict=True):
        size = answer.image_size or (image_size(sample) if sample.task == "location" else None)
        known = name_spellings([identity.name for identity in sample.identities], names) if prose else names
        predictions.append(
            score_answer(sample, answer, image_size=size, parse_box=parse_box, names=known, clauses=not prose)
        )
    return EvaluationResult(predictions)


def score_answer(
    sample: Sample,
    answer: Answer,
    *,
    image_size: tuple[int, int] | None,
    parse_box: ParseBox | None,
    names: Sequence[str] | Mapping[str, str],
    clauses: bool = True,
) -> Prediction:
    """Score ``answer`` to ``sample``.

    Guessing means: for matching and questions, one of the answers; for location, one of the persons with a box.

    Args:
        sample: with its right answer.
        answer: what the model wrote, or how likely it finds the candidates.
        image_size: height and width of the last picture.
        parse_box: see :func:`score_answers`.
        names: see :func:`idavlm.evaluation.score_description`.
        clauses: whether descriptions get ``clause_recall``.
    """
    if sample.task == "location":
        return _score_location(sample, answer.prediction or "", image_size, parse_box)
    text, scores, chance = answer.prediction or "", None, {}
    if sample.task == "matching":
        count = len(sample.false_answers) + 1 if sample.false_answers else None
        scores = score_picture(text, sample.answer, count=count, name=sample.target or "")
    elif sample.task in CHOICE_TASKS:
        scores = _score_choice(sample, answer)
        if answer.prediction is None:
            text = likeliest(sample, answer)
    else:
        scores = score_description(text, sample.answer, names, clauses=clauses)
    parsed = scores is not None
    scores = {"accuracy": 0.0} if scores is None else scores
    if sample.false_answers and not sample.task.startswith("caption"):
        chance = dict.fromkeys(scores, 1 / (1 + len(sample.false_answers)))
    return Prediction(sample.id, sample.task, text, sample.answer, scores, chance, parsed=parsed)


def _score_choice(sample: Sample, answer: Answer) -> dict[str, float]:
    """By likelihood, by what the text comes closest to, or both; nothing where there is nothing to choose among."""
    scores: dict[str, float] = {}
    if answer.likelihoods and sample.false_answers:
        scores["accuracy"] = float(likeliest(sample, answer) == sample.answer)
    if answer.prediction is not None and sample.false_answers:
        scores["closest_accuracy"] = float(closest(answer.prediction, candidates(sample)) == sample.answer)
    return scores


def _score_location(sample: Sample, text: str, image_size: tuple[int, int] | None, parse_box: ParseBox) -> Prediction:
    box, gold = parse_box(text, image_size, name=sample.target), sample.target_box
    persons = [score_box(other.box, gold.box) for other in sample.boxes if other.image == gold.image]
    chance = {metric: fmean(person[metric] for person in persons) for metric in persons[0]} if len(persons) > 1 else {}
    return Prediction(
        id=sample.id,
        type=sample.task,
        text=text,
        answer=sample.answer,
        # No box has no area in common with any.
        scores=score_box(box or (0, 0, 0, 0), gold.box),
        chance=chance,
        box=None if box is None else [float(edge) for edge in box],
        gold_box=[float(edge) for edge in gold.box],
        parsed=box is not None,
    )
