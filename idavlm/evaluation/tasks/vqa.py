"""LLaVA's VQA files: free answers, scored by right answers or by facts about identities that a model was trained on."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from idavlm.data.errors import DataError
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.evaluation.scoring import ParseBox, word_f1, words
from idavlm.evaluation.tasks.base import EvaluationTask, Item
from idavlm.evaluation.tasks.benchmark_records import iterate_records, question_sample
from idavlm.utils import plain_answer


def load_vqa(data: Path, images: Path | None) -> list[Item]:
    """Load records ``{"question_id", "image", "text", "category"}``.

    ``answer`` (or a list ``answers``, each of which is right) is a short right answer. ``facts`` lists facts that the
    answer should state; each is a text, or a list of alternative wordings. Records with neither are answered but not
    scored. ``identities``, as in the schema of idavlm, introduces identities by references.
    """
    root = images if images is not None else data.parent / "images"
    items = []
    for record, where in iterate_records(data):
        right = record.get("answers", record.get("answer", []))
        right = [right] if isinstance(right, str) else right
        facts = [[fact] if isinstance(fact, str) else fact for fact in record.get("facts", [])]
        if not all(isinstance(text, str) for text in right):
            raise DataError(f"answers={right} must be texts.", where=where)
        if not all(fact and all(isinstance(text, str) for text in fact) for fact in facts):
            raise DataError(f"facts={record['facts']} must be texts, or lists of wordings of one fact.", where=where)
        answer = right[0] if right else "; ".join(fact[0] for fact in facts)
        sample = question_sample(record, where, root=root, task="vqa", answer=answer)
        groups = {"category": str(record.get("category", "all"))}
        items.append(Item(sample, groups, {"answers": right, "facts": facts}))
    return items


def score_vqa(items: Sequence[Item], answers: Sequence[Answer], parse_box: ParseBox | None) -> EvaluationResult:
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
        predictions.append(Prediction(item.sample.id, "vqa", text, item.sample.answer, scores))
    return EvaluationResult(predictions)


def says(text: str, wording: str) -> bool:
    """Whether ``wording`` occurs in ``text`` as consecutive words, ignoring case, punctuation and articles."""
    return re.search(rf"(?<!\S){re.escape(_plain(wording))}(?!\S)", _plain(text)) is not None


def write_llava_answers(path: Path, items: Sequence[Item], answers: Sequence[Answer], model: str) -> None:
    """Write LLaVA's answer file: ``{"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}`` lines."""
    with path.open("w", encoding="utf-8") as file:
        for item, answer in zip(items, answers, strict=True):
            line = {
                "question_id": item.sample.id,
                "prompt": answer.question,
                "text": answer.prediction or "",
                "answer_id": item.sample.id,
                "model_id": model,
                "metadata": {},
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _plain(text: str) -> str:
    return " ".join(word for word in words(plain_answer(text)) if word not in ("a", "an", "the"))


VQA = EvaluationTask(
    name="vqa",
    description="LLaVA's VQA JSONL files with right answers, or facts about identities",
    load=load_vqa,
    score=score_vqa,
    judged=("vqa",),
    write=write_llava_answers,
    max_new_tokens=256,
)
