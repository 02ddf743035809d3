"""Scores of the identity map alone: what the ID-Former finds before a language model reads its tokens."""

import time
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor, nn

from idavlm.data.schema import Box, Sample
from idavlm.evaluation.baselines import with_wrong_references
from idavlm.evaluation.generation import evaluating, model_inputs
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.evaluation.scoring import score_box
from idavlm.modules.identity_map import cell_overlap, connected_cells
from idavlm.modules.positions import square_grid
from idavlm.utils import ImageRole, check_choice, check_positive
from idavlm.utils.answer_parsing import parse_image_number

NUM_STRONGEST = 8
"""An image of a matching record scores the mean of this many largest shares of attention."""


def score_identity_maps(
    model: nn.Module,
    processor,
    samples: Sequence[Sample],
    *,
    references: str = "right",
    batch_size: int = 32,
) -> EvaluationResult:
    """Answer records of matching and location from the identity map of the last identity layer, without text.

    - matching: the chosen image is the one whose eight strongest patches attend most to the references. ``accuracy``.
    - location: the box is drawn around the patches that are connected with the strongest one and have at least half of
      its share of attention. ``mean_iou`` and ``acc@0.5``. ``right_box`` is 1 if, of all annotated boxes of the scene,
      that of the target has the highest mean share.

    Chance is a random choice among the images, and among the annotated boxes of the scene. A tie counts as wrong.

    Args:
        model: an :class:`idavlm.IDAVLMForConditionalGeneration` with an ID-Former.
        processor: its processor.
        samples: evaluation samples. Scored are records of matching that introduce one identity, and records of location
            with one scene that shows the target, and with boxes in pixels. Others are left out.
        references: ``"right"`` or ``"wrong"`` (of other identities). Without references there is no map.
        batch_size: samples per batch.

    Returns:
        One prediction for each scored record, in order.

    Raises:
        ValueError: the model has no ID-Former, or too few identities for wrong references.
    """
    check_choice("references", references, ("right", "wrong"))
    check_positive(batch_size=batch_size)
    if getattr(model, "id_former", None) is None:
        raise ValueError(f"model={type(model).__name__} has no ID-Former, so it has no identity maps.")
    start = time.perf_counter()
    scored = [sample for sample in samples if _is_scored(sample)]
    shown = scored if references == "right" else with_wrong_references(scored)
    predictions = []
    with evaluating(model):
        for first in range(0, len(scored), batch_size):
            chosen = slice(first, first + batch_size)
            predictions += _score_batch(model, processor, scored[chosen], shown[chosen])
    return EvaluationResult(predictions, time.perf_counter() - start)


def _is_scored(sample: Sample) -> bool:
    if sample.task == "matching":
        return len(sample.identities) == 1 and len(sample.message_images) > 1
    has_box = sample.task == "location" and len(sample.message_images) == 1 and sample.target_box is not None
    is_introduced = sample.target in [identity.name for identity in sample.identities]
    return has_box and is_introduced and not any(box.relative for box in sample.boxes)


def _score_batch(model: nn.Module, processor, samples: list[Sample], shown: list[Sample]) -> list[Prediction]:
    batch = processor.collate([processor.encode(sample, add_generation_prompt=True) for sample in shown])
    inputs = model_inputs(model, batch)
    names = ("pixel_values", "image_features", "image_roles", "sample_index", "identity_index")
    _, maps, grid_size = model.encode_images(
        **{name: inputs[name] for name in names if name in inputs}, output_identity_maps=True
    )
    shares = maps[-1].float().cpu()  # [I, P, G + 1]
    grid_size = grid_size or square_grid("P, the number of patches,", shares.shape[1])
    is_scene, sample_index = (batch[name].cpu() for name in ("image_roles", "sample_index"))
    is_scene = is_scene == ImageRole.SCENE
    found = []
    for number, sample in enumerate(samples):
        rows = (is_scene & (sample_index == number)).nonzero().flatten()
        if sample.task == "matching":
            found.append(_score_matching(sample, shares[rows, :, 0]))
        else:
            column = [identity.name for identity in sample.identities].index(sample.target)
            size = batch["image_sizes"][rows[0]].tolist()
            found.append(_score_location(sample, shares[rows[0], :, column].view(grid_size), size))
    return found


def _score_matching(sample: Sample, shares: Tensor) -> Prediction:
    """``shares`` ``[images, P]``: attention of the patches of each image to the identity."""
    strength = shares.topk(min(NUM_STRONGEST, shares.shape[1])).values.mean(1)
    chosen = _largest(strength)
    accuracy = float(chosen is not None and chosen + 1 == parse_image_number(sample.answer))
    text = "" if chosen is None else f"Picture {chosen + 1}"
    chance = {"accuracy": 1 / len(shares)}
    return Prediction(sample.id, "matching", text, sample.answer, {"accuracy": accuracy}, chance)


def _score_location(sample: Sample, shares: Tensor, size: tuple[int, int]) -> Prediction:
    """``shares`` ``[rows, columns]``: attention of the patches to the target; ``size``: height, width of the scene."""
    gold = sample.target_box
    boxes: list[Box] = [each for each in sample.boxes if each.image == gold.image]
    means = torch.stack([_mean_in_box(shares, each.box, size) for each in boxes])
    chosen = _largest(means)
    box = box_of_strongest(shares, size)
    ious = [score_box(each.box, gold.box) for each in boxes]
    chance = {metric: fmean(scores[metric] for scores in ious) for metric in ious[0]} if len(boxes) > 1 else {}
    scores = {**score_box(box, gold.box), "right_box": float(chosen is not None and boxes[chosen] == gold)}
    chance |= {"right_box": 1 / len(boxes)} if len(boxes) > 1 else {}
    gold_box = [float(edge) for edge in gold.box]
    return Prediction(sample.id, "location", "", sample.answer, scores, chance, box=box, gold_box=gold_box)


def box_of_strongest(shares: Tensor, size: Sequence[int]) -> list[float]:
    """Box around the strongest patch and the patches connected with it that have at least half of its share.

    Args:
        shares: ``[rows, columns]``.
        size: height and width of the image in pixels.

    Returns:
        ``[x1, y1, x2, y2]`` in pixels.
    """
    rows, columns = shares.shape
    region = connected_cells(shares >= shares.max() / 2, int(shares.argmax()), diagonals=False)
    found_rows, found_columns = (region.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
    height, width = size[0] / rows, size[1] / columns
    return [
        found_columns[0] * width,
        found_rows[0] * height,
        (found_columns[-1] + 1) * width,
        (found_rows[-1] + 1) * height,
    ]


def _mean_in_box(shares: Tensor, box: Sequence[float], size: Sequence[int]) -> Tensor:
    """Mean share in a box of pixels; a patch counts as much as the box covers of it."""
    height, width = size
    x1, y1, x2, y2 = (torch.tensor(box, dtype=shares.dtype) / torch.tensor([width, height, width, height])).split(1)
    weights = cell_overlap(y1, y2, shares.shape[0])[0][:, None] * cell_overlap(x1, x2, shares.shape[1])[0]
    return (weights * shares).sum() / weights.sum()


def _largest(values: Tensor) -> int | None:
    """Index of the largest value; None in case of a tie."""
    best = values.max()
    return int(values.argmax()) if (values == best).sum() == 1 else None
