"""Metrics of personalized models (MyVLM, arXiv 2403.14599; Yo'LLaVA, arXiv 2406.09400)."""

from collections.abc import Callable, Sequence
from pathlib import Path

from idavlm.data.errors import DataError, quote
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.evaluation.scoring import ReadBox
from idavlm.evaluation.tasks.base import EvaluationTask, Item
from idavlm.evaluation.tasks.benchmark_records import field, iterate_records, question_sample
from idavlm.utils import contains_name, markdown_table, plain_answer
from idavlm.utils.answer_parsing import is_refusal, parse_letter, parse_yes_no

PARSERS: dict[str, Callable[[str], object]] = {
    "recognition": parse_yes_no,
    "choice_v": parse_letter,
    "choice_t": parse_letter,
}
"""Parser of the answers of each kind; the answer to a ``caption`` is free text."""


def load_personal(data: Path, images: Path | None) -> list[Item]:
    """Load records ``{"id", "kind", "concept", "image", "text", "answer"}``.

    ``kind`` is ``recognition`` ("Is Kate in this photo?", answer yes or no), ``choice_v`` (a multiple-choice question
    with letters about an image), ``choice_t`` (the same without image), or ``caption`` (the answer should name
    ``concept``). ``identities``, as in the schema of idavlm, introduces the concept by references.
    """
    root = images if images is not None else data.parent / "images"
    items = []
    for record, where in iterate_records(data):
        kind, concept = field(record, ("kind",), where), field(record, ("concept",), where)
        if kind not in (*PARSERS, "caption"):
            choices = ", ".join(map(repr, (*PARSERS, "caption")))
            raise DataError(f"kind={quote(kind)} is not known; choose one of {choices}.", where=where)
        answer = concept if kind == "caption" else field(record, ("answer",), where)
        if kind != "caption" and PARSERS[kind](answer) is None:
            raise DataError(
                f"answer={quote(answer)} of kind {kind!r} cannot be parsed; expected yes, no or a letter.", where=where
            )
        sample = question_sample(record, where, root=root, task=kind, answer=answer)
        items.append(Item(sample, {"kind": kind, "concept": concept}))
    return items


def score_personal(items: Sequence[Item], answers: Sequence[Answer], read_box: ReadBox | None) -> EvaluationResult:
    """Score ``positive`` and ``negative`` recognition, ``accuracy`` of choices, ``recall`` of the name in captions.

    A refusal is neither yes nor no: it scores 0 and is counted.
    """
    predictions = []
    for item, answer in zip(items, answers, strict=True):
        kind, text, gold = item.sample.task, answer.prediction or "", item.sample.answer
        parsed, chance = True, {}
        if kind == "caption":
            has_answer = contains_name(plain_answer(text), gold)
            scores = {"recall": float(has_answer)}
        else:
            predicted, right = PARSERS[kind](text), PARSERS[kind](gold)
            parsed = has_answer = predicted is not None
            metric = "accuracy" if kind != "recognition" else "positive" if right else "negative"
            scores = {metric: float(parsed and predicted == right)}
            chance = {metric: 0.5} if kind == "recognition" else {}
        problem = "refused" if not has_answer and is_refusal(text) else ""
        predictions.append(Prediction(item.sample.id, kind, text, gold, scores, chance, parsed=parsed, problem=problem))
    return EvaluationResult(predictions)


def recognition_scores(result: EvaluationResult) -> dict[str, float]:
    """``positive``, ``negative``, and ``weighted``: the unweighted mean of both classes, as in Yo'LLaVA."""
    metrics = result.summary.get("recognition", {}).get("metrics", {})
    if {"positive", "negative"} <= metrics.keys():
        return {**metrics, "weighted": (metrics["positive"] + metrics["negative"]) / 2}
    return metrics


def _summary(items: Sequence[Item], result: EvaluationResult) -> str:
    rows = [[name, f"{score:.3f}"] for name, score in recognition_scores(result).items()]
    return "## Recognition\n\n" + markdown_table(["", "accuracy"], rows) if rows else ""


PERSONAL = EvaluationTask(
    name="personal",
    description="personalization: recognition, choice-V, choice-T, recall of names in captions",
    load=load_personal,
    score=score_personal,
    judged=("caption",),
    summary=_summary,
)
