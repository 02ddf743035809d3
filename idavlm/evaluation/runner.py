"""Ask a model every question of an evaluation set and score what it answers, in memory."""

import time
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from idavlm.data.schema import Sample
from idavlm.evaluation.generation import generate_answers
from idavlm.evaluation.results import EvaluationResult
from idavlm.evaluation.scoring import score_answers


def evaluate(
    model: nn.Module,
    processor,
    samples: Sequence[Sample],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    references: str = "right",
) -> EvaluationResult:
    """:func:`generate_answers`, then :func:`score_answers`: for evaluation in and after training.

    Matching, location and descriptions are generated. Questions with false answers are multiple choice: the answer is
    the candidate of highest likelihood (sum over its tokens), and a tie is wrong.

    Args:
        model: as in :func:`generate_answers`.
        processor: the same, with ``parse_box(text, image_size, name=...)``.
        samples: evaluation samples: a list, or a :class:`idavlm.data.RecordDataset`. Ids may repeat.
        batch_size: rows at once.
        max_new_tokens: longest answer.
        references: what the model is shown: the ``"right"`` photos, ``"none"``, or the ``"wrong"`` ones, of other
            persons. Scored is always by ``samples``.

    Returns:
        Predictions in the order of ``samples``.

    Raises:
        ValueError: a training sample, or a question without false answers.
    """
    start = time.perf_counter()
    samples = list(samples)
    numbered = [replace(sample, id=str(number)) for number, sample in enumerate(samples)]
    options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "references": references}
    answers = generate_answers(model, processor, numbered, **options)
    result = score_answers(numbered, answers, parse_box=processor.parse_box)
    predictions = [
        replace(prediction, id=sample.id) for prediction, sample in zip(result.predictions, samples, strict=True)
    ]
    return EvaluationResult(predictions, time.perf_counter() - start)
