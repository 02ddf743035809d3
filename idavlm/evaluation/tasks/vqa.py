"""LLaVA's VQA files: free answers, scored by right answers or by facts about identities that a model was trained on."""

import json
from collections.abc import Sequence
from pathlib import Path

from idavlm.data.errors import DataError, quote
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.evaluation.scoring import ReadBox, word_f1, words
from idavlm.evaluation.tasks.base import EvaluationTask, Item
from idavlm.evaluation.tasks.benchmark_records import iterate_records, optional_field, question_sample
from idavlm.utils import plain_answer, write_text
from idavlm.utils.answer_parsing import is_refusal


def load_vqa(data: Path, images: Path | None) -> list[Item]:
    """Load records ``{"question_id", "image", "text", "category"}``.

    ``answer`` (or a list ``answers``, each of which is right) is a short right answer, as a text. ``facts`` lists
    facts that the answer should state; each is a text, or a list of alternative wordings. Records with neither are
    answered but not scored. ``identities``, as in the schema of idavlm, introduces identities by references.
    """
    root = images if images is not None else data.parent / "images"
    items = []
    for record, where in iterate_records(data):
        right = optional_field(record, ("answers", "answer"), where, kinds=(str, list))
        right = [] if right is None else [right] if isinstance(right, str) else right
        facts = optional_field(record, ("facts",), where, kinds=(list,)) or []
        facts = [fact if isinstance(fact, list) else [fact] for fact in facts]
        if not all(map(_is_wording, right)):
            raise DataError(f"answers={quote(right)} must be texts with a word or number.", where=where)
        if not all(fact and all(map(_is_wording, fact)) for fact in facts):
            raise DataError(
                f"facts={quote(record['facts'])} must be texts, or lists of wordings of one fact.", where=where
            )
        answer = right[0] if right else "; ".join(fact[0] for fact in facts)
        sample = question_sample(record, where, root=root, task="vqa", answer=answer)
        category = optional_field(record, ("category",), where, kinds=(str, int))
        groups = {"category": "all" if category is None else str(category)}
        items.append(Item(sample, groups, {"answers": right, "facts": facts}))
    return items


def _is_wording(value: object) -> bool:
    """Whether a value is a text that :func:`says` can find."""
    return isinstance(value, str) and bool(words(plain_answer(value)))


def score_vqa(items: Sequence[Item], answers: Sequence[Answer], read_box: ReadBox | None) -> EvaluationResult:
    """Score records with facts by ``fact_recall``, records with right answers by ``contains`` and ``word_f1``.

    - ``fact_recall``: share of the facts of which any wording occurs in the answer, up to case, punctuation and
      articles.
    - ``contains``: whether a right answer occurs in the answer in this sense.
    - ``word_f1``: F1 of the words with the closest right answer.
    """
    predictions = []
    for item, answer in zip(items, answers, strict=True):
        text, right, facts = answer.prediction or "", item.extra["answers"], item.extra["facts"]
        scores = {}
        if facts:
            scores["fact_recall"] = sum(any(says(text, wording) for wording in fact) for fact in facts) / len(facts)
        if right:
            scores["contains"] = float(any(says(text, wording) for wording in right))
            scores["word_f1"] = max(word_f1(plain_answer(text), wording) for wording in right)
        says_nothing = not any(scores.get(metric) for metric in ("fact_recall", "contains"))
        problem = "refused" if says_nothing and is_refusal(text) else ""
        predictions.append(Prediction(item.sample.id, "vqa", text, item.sample.answer, scores, problem=problem))
    return EvaluationResult(predictions)


def says(text: str, wording: str) -> bool:
    """Whether ``wording`` occurs in ``text`` as consecutive words, ignoring case, punctuation and articles.

    A wording of articles only, such as the option "A", is searched with articles.
    """
    wanted = _without_articles(words(plain_answer(wording)))
    found = words(plain_answer(text))
    if wanted:
        found = _without_articles(found)
    else:
        wanted = words(plain_answer(wording))
    return bool(wanted) and any(
        found[start : start + len(wanted)] == wanted for start in range(len(found) - len(wanted) + 1)
    )


def write_llava_answers(path: Path, items: Sequence[Item], answers: Sequence[Answer], model: str) -> None:
    """Write LLaVA's answer file: ``{"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}`` lines."""
    lines = [
        {
            "question_id": item.sample.id,
            "prompt": answer.question,
            "text": answer.prediction or "",
            "answer_id": item.sample.id,
            "model_id": model,
            "metadata": {},
        }
        for item, answer in zip(items, answers, strict=True)
    ]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _without_articles(found: list[str]) -> list[str]:
    return [word for word in found if word not in ("a", "an", "the")]


VQA = EvaluationTask(
    name="vqa",
    description="LLaVA's VQA JSONL files with right answers, or facts about identities",
    load=load_vqa,
    score=score_vqa,
    judged=("vqa",),
    write=write_llava_answers,
    max_new_tokens=256,
)
