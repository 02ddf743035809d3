"""Evaluate a model on evaluation samples in memory, during or after training."""

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
    """Generate answers with :func:`generate_answers` and score them with :func:`score_answers`.

    Matching, location and descriptions are generated greedily. Questions with false answers are multiple choice: the
    answer is the candidate with the highest log-likelihood (sum over its tokens); a tie counts as wrong.

    Args:
        model: as in :func:`generate_answers`.
        processor: as in :func:`generate_answers`, with ``read_box(text, image_size, name=..., other_names=...)``.
        samples: evaluation samples: a list, or a :class:`idavlm.data.RecordDataset`. Ids may repeat.
        batch_size: samples per batch.
        max_new_tokens: maximum length of an answer.
        references: references that the model receives: ``"right"``, ``"none"``, or ``"wrong"`` (of other identities).
            Scores always refer to the right answers. Whether ``samples`` suffice for ``"wrong"`` is checked before the
            first answer; :func:`check_wrong_references` checks it before a training run.

    Returns:
        One prediction per sample, in the same order.

    Raises:
        ValueError: a training sample, a question without false answers, or too few identities for wrong references.
    """
    start = time.perf_counter()
    samples = list(samples)
    numbered = [replace(sample, id=str(number)) for number, sample in enumerate(samples)]
    options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "references": references}
    answers = generate_answers(model, processor, numbered, **options)
    result = score_answers(numbered, answers, read_box=processor.read_box)
    predictions = [
        replace(prediction, id=sample.id) for prediction, sample in zip(result.predictions, samples, strict=True)
    ]
    return EvaluationResult(predictions, time.perf_counter() - start)
