"""Rows of the contact sheet from samples, predictions and the model that made them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from idavlm.data.images import ImageStore
from idavlm.data.schema import Sample
from idavlm.evaluation.answers import question_text
from idavlm.evaluation.contact_sheet import Example
from idavlm.evaluation.generation import evaluating, model_inputs
from idavlm.evaluation.parsing import parse_picture
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.modules.positions import square_grid
from idavlm.utils import ImageRole

_COUNT = {"location": 5, "matching": 3, "qa_single": 1, "caption_single": 1, "qa_multi": 1, "caption_multi": 1}


def pick_examples(
    model: nn.Module,
    processor,
    samples: Sequence[Sample],
    result: EvaluationResult,
    *,
    count: dict[str, int] | None = None,
) -> list[Example]:
    """The first samples of each task with their answers, right or wrong, and the model's identity attention.

    Args:
        model: the model that made ``result``, on the right references.
        processor: as in :func:`evaluate`.
        samples: those that were evaluated, with ``image_root``.
        result: of ``evaluate(model, processor, samples)``.
        count: rows of each task; by default five of location, three of matching, one of every other.

    Returns:
        Rows for :func:`write_report`; without attention where the model has no ID-Former.
    """
    rows, samples = [], list(samples)
    for task, wanted in (count or _COUNT).items():
        of_task = [pair for pair in zip(samples, result.predictions, strict=True) if pair[0].task == task]
        for sample, prediction in of_task[:wanted]:
            maps, grid_size = identity_maps(model, processor, sample)
            rows.append(make_example(sample, prediction, attention=maps, grid_size=grid_size))
    return rows


def identity_maps(
    model: nn.Module, processor, sample: Sample
) -> tuple[list[np.ndarray] | None, tuple[int, int] | None]:
    """``[P, G + 1]`` identity attention of each scene, mean over layers, and its grid; None without an ID-Former."""
    if getattr(model, "id_former", None) is None or not sample.identities:
        return None, None
    batch = processor.collate([processor.encode(sample, add_generation_prompt=True)], padding_side="left")
    inputs = model_inputs(model, batch)
    names = ("pixel_values", "image_features", "image_roles", "sample_index", "identity_index")
    with evaluating(model):
        _, maps, grid_size = model.encode_images(
            **{name: inputs[name] for name in names if name in inputs}, output_identity_maps=True
        )
    scenes = inputs["image_roles"] == ImageRole.SCENE
    grid_size = grid_size or square_grid("P, the number of patches,", maps[0].shape[1])
    return list(torch.stack(maps).float().mean(0)[scenes].cpu().numpy()), grid_size


def make_example(
    sample: Sample,
    prediction: Prediction,
    *,
    attention: Sequence[np.ndarray] | None = None,
    grid_size: tuple[int, int] | None = None,
) -> Example:
    """One row, its pictures opened below ``sample.image_root``."""
    store = ImageStore(sample.image_root)
    matching, location = sample.task == "matching", sample.task == "location"
    return Example(
        references=[(person.name, store.open(image)) for person in sample.identities for image in person.images],
        pictures=[store.open(image) for image in sample.message_images],
        question=question_text(sample),
        answer=f"{prediction.text} (IoU {prediction.scores['mean_iou']:.2f})" if location else prediction.text,
        gold=prediction.answer,
        right=prediction.main_score == 1,
        true_box=prediction.gold_box,
        predicted_box=prediction.box,
        true_picture=parse_picture(prediction.answer) if matching else None,
        predicted_picture=parse_picture(prediction.text) if matching else None,
        attention=attention,
        grid_size=grid_size,
    )
