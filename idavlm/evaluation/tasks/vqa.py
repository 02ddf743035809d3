"""LLaVA's VQA files: free answers, right words, and facts about people that a model has been taught."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from idavlm.data.errors import DataError
from idavlm.evaluation.answers import Answer
from idavlm.evaluation.metrics import word_f1, words
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.evaluation.scoring import ParseBox
from idavlm.evaluation.tasks.questions import field, images_of, question, records_of
from idavlm.evaluation.tasks.task import EvaluationTask, Item
from idavlm.utils import plain_answer


def load_vqa(data: Path, images: Path | None) -> list[Item]:
    """Records ``{"question_id", "image", "text", "category"}``, with what the answer is scored by.

    ``answer`` (or ``answers``, any of which is right) are short right answers; ``facts`` what the model has been taught
    and should say: a list of texts, or of lists of wordings of one fact. Records with neither are asked, not scored.
    ``identities`` (the schema's) introduce people by photos.
    """
    root = images if images is not None else data.parent / "images"
    items = []
    for record, where in records_of(data):
        name = str(field(record, ("question_id", "id"), where, kind=(str, int)))
        right = record.get("answers", record.get("answer", []))
        right = [right] if isinstance(right, str) else right
        facts = [[one] if isinstance(one, str) else one for one in record.get("facts", [])]
        if not all(isinstance(text, str) for text in right):
            raise DataError(f"answers={right} must be texts.", where=where)
        if not all(fact and all(isinstance(text, str) for text in fact) for fact in facts):
            raise DataError(f"facts={record['facts']} must be texts, or lists of wordings of one fact.", where=where)
        sample = question(
            name,
            field(record, ("text", "question"), where),
            images_of(record, where),
            type="vqa",
            where=where,
            root=root,
            answer=right[0] if right else "; ".join(fact[0] for fact in facts),
            identities=record.get("identities", ()),
        )
        groups = {"category": str(record.get("category", "all"))}
        items.append(Item(sample, groups, {"answers": right, "facts": facts}))
    return items


def score_vqa(items: Sequence[Item], answers: Sequence[Answer], parse_box: ParseBox | None) -> EvaluationResult:
    """``fact_recall`` where there are facts; ``contains`` and ``word_f1`` where there are right answers.

    ``fact_recall``: share of the facts of which some wording stands in the answer, word by word but for case,
    punctuation and articles. ``contains``: whether a right answer stands so in it. ``word_f1``: words in common
    with the right answer that is closest.
    """
    predictions = []
    for item, answer in zip(items, answers, strict=True):
        text, right, facts = answer.prediction or "", item.extra["answers"], item.extra["facts"]
        scores = {}
        if facts:
            scores["fact_recall"] = sum(any(says(text, one) for one in fact) for fact in facts) / len(facts)
        if right:
            scores["contains"] = float(any(says(text, one) for one in right))
            scores["word_f1"] = max(word_f1(plain_answer(text), one) for one in right)
        predictions.append(Prediction(item.sample.id, "vqa", text, item.sample.answer, scores))
    return EvaluationResult(predictions)


def says(text: str, wording: str) -> bool:
    """Whether the words of ``wording`` stand in ``text`` one after another; no case, punctuation, articles."""
    return re.search(rf"(?<!\S){re.escape(_plain(wording))}(?!\S)", _plain(text)) is not None


def write_llava_answers(path: Path, items: Sequence[Item], answers: Sequence[Answer], model: str) -> None:
    """LLaVA's answers file: ``{"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}`` lines."""
    with path.open("w", encoding="utf-8") as file:
        for item, answer in zip(items, answers, strict=True):
            line = {"question_id": item.sample.id, "prompt": answer.question, "text": answer.prediction or ""}
            line |= {"answer_id": item.sample.id, "model_id": model, "metadata": {}}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _plain(text: str) -> str:
    return " ".join(word for word in words(plain_answer(text)) if word not in ("a", "an", "the"))


VQA = EvaluationTask(
    name="vqa",
    about="LLaVA's VQA jsonl, with right answers or facts about people",
    load=load_vqa,
    score=score_vqa,
    judged=("vqa",),
    write=write_llava_answers,
    max_new_tokens=256,
)
