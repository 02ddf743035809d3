"""A judge's scores of answers, and its choice between two models' answers."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from idavlm.evaluation.answers import question_text
from idavlm.evaluation.judge.client import JudgeClient
from idavlm.evaluation.judge.prompts import pair_messages, single_messages
from idavlm.evaluation.judge.verdicts import parse_score, parse_winner
from idavlm.evaluation.results import EvaluationResult
from idavlm.evaluation.tasks.task import Item

T = TypeVar("T")


@dataclass(frozen=True)
class Judged:
    """A reply and what was read in it; ``value`` is None where it gave no verdict (a refusal)."""

    value: float | str | None
    reply: str


def judge_answers(
    client: JudgeClient,
    items: Sequence[Item],
    result: EvaluationResult,
    *,
    types: Sequence[str],
    workers: int = 4,
    progress: bool = False,
) -> EvaluationResult:
    """Add the metric ``judge``, 1 to 10, to the answers of some types.

    The judge sees question, right answer and answer. Where it gives no score (it refuses, or says nothing readable) the
    prediction has no ``judge``; ``judge_unscored`` is 1 there and 0 elsewhere, so that tables show how often.

    Args:
        client: the endpoint.
        items: what was asked, in the order of ``result.predictions``.
        result: scored predictions.
        types: types of the schema that are judged.
        workers: requests at once.
        progress: show a progress bar.
    """
    wanted = [number for number, one in enumerate(result.predictions) if one.task in types]

    def judge(number: int) -> Judged:
        sample, prediction = items[number].sample, result.predictions[number]
        reply = client.ask(single_messages(question_text(sample), sample.answer, prediction.text))
        return Judged(parse_score(reply), reply)

    predictions = list(result.predictions)
    for number, judged in zip(wanted, _at_once(judge, wanted, workers, progress), strict=True):
        scores = dict(predictions[number].scores)
        if judged.value is not None:
            scores["judge"] = judged.value
        scores["judge_unscored"] = float(judged.value is None)
        predictions[number] = replace(predictions[number], scores=scores)
    return EvaluationResult(predictions, result.seconds)


def judge_pairs(
    client: JudgeClient,
    questions: Sequence[tuple[str, str, str, str]],
    *,
    workers: int = 4,
    progress: bool = False,
) -> list[str | None]:
    """Which of two answers is better, asked in both orders.

    Args:
        client: the endpoint.
        questions: ``(question, right answer, answer of A, answer of B)``.
        workers: requests at once.
        progress: show a progress bar.

    Returns:
        ``"A"`` or ``"B"`` where both orders agree, ``"tie"`` where they do not or both say so, None where a reply gave
        no verdict.
    """
    swapped = {"A": "B", "B": "A", "tie": "tie", None: None}

    def judge(number: int) -> str | None:
        question, truth, a, b = questions[number // 2]
        if a == b:
            return "tie"
        first, second = (a, b) if number % 2 == 0 else (b, a)
        verdict = parse_winner(client.ask(pair_messages(question, truth, first, second)))
        return verdict if number % 2 == 0 else swapped[verdict]

    verdicts = _at_once(judge, range(2 * len(questions)), workers, progress)
    pairs = zip(verdicts[::2], verdicts[1::2], strict=True)
    return [None if None in pair else pair[0] if pair[0] == pair[1] else "tie" for pair in pairs]


def _at_once(function: Callable[[int], T], numbers: Iterable[int], workers: int, progress: bool) -> list[T]:
    """Results in order; the first error stops what has not begun."""
    from tqdm import tqdm

    numbers = list(numbers)
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(function, number) for number in numbers]
        try:
            return [future.result() for future in tqdm(futures, desc="judge", disable=not progress)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
