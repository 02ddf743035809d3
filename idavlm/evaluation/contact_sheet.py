"""Contact sheet of examples: references, scenes, questions, answers, boxes and identity maps in one image."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from idavlm.data.images import ImageStore
from idavlm.data.schema import Sample
from idavlm.evaluation.answer_image import PREDICTED, TRUE
from idavlm.evaluation.answers import question_text
from idavlm.evaluation.generation import evaluating, model_inputs
from idavlm.evaluation.plots import INK, new_figure, save
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.modules.positions import square_grid
from idavlm.utils import ImageRole
from idavlm.utils.answer_parsing import parse_image_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WRONG = "#c0392b"
_TILE = 256  # longest side of one image in pixels
_CELL, _GAP, _TEXT, _HEAD = 1.75, 0.14, 2.75, 0.3  # inches

EXAMPLES_PER_TASK = {
    "location": 5,
    "matching": 3,
    "qa_single": 1,
    "caption_single": 1,
    "qa_multi": 1,
    "caption_multi": 1,
}


@dataclass(frozen=True)
class Example:
    """One row of the contact sheet.

    Attributes:
        references: ``(name, image)`` in the order of the prompt; images of one name are adjacent.
        images: the images the question is about.
        question, answer, gold: texts. ``gold`` may be "" if the right answer is a box.
        right: whether the answer counts as right.
        true_box, predicted_box: pixels ``[x1, y1, x2, y2]`` of the last image.
        true_image, predicted_image: image numbers starting at 1, for matching.
        attention: one identity map ``[P, G + 1]`` per image; patches in row-major order, the last column is null.
        grid_size: rows and columns of patches. The patches cover the whole image.
    """

    references: Sequence[tuple[str, Image.Image]]
    images: Sequence[Image.Image]
    question: str
    answer: str
    gold: str
    right: bool
    true_box: Sequence[float] | None = None
    predicted_box: Sequence[float] | None = None
    true_image: int | None = None
    predicted_image: int | None = None
    attention: Sequence[np.ndarray] | None = None
    grid_size: tuple[int, int] | None = None

    @property
    def names(self) -> list[str]:
        """Names of the identities in the order of the references."""
        return list(dict.fromkeys(name for name, _ in self.references))

    def attention_grids(self) -> list[np.ndarray] | None:
        """Identity maps as ``[G + 1, rows, columns]``, one per image; None without maps.

        Raises:
            ValueError: maps that do not fit ``images`` or ``grid_size``.
        """
        if self.attention is None:
            return None
        shapes = [np.shape(map_) for map_ in self.attention]
        if self.grid_size is None or any(shape[:-1] != (self.grid_size[0] * self.grid_size[1],) for shape in shapes):
            raise ValueError(f"attention has shapes {shapes} and grid_size={self.grid_size}; expected [P, G + 1] maps.")
        if len(shapes) != len(self.images):
            raise ValueError(f"attention has {len(shapes)} maps for {len(self.images)} images; pass one per image.")
        return [np.asarray(map_, np.float32).T.reshape(-1, *self.grid_size) for map_ in self.attention]


def pick_examples(
    model: nn.Module,
    processor,
    samples: Sequence[Sample],
    result: EvaluationResult,
    *,
    count: dict[str, int] | None = None,
) -> list[Example]:
    """The first samples of each task with their answers, right or wrong, and the identity maps of the model.

    Args:
        model: the model that was evaluated with the right references.
        processor: as in :func:`evaluate`.
        samples: the evaluated samples, with ``image_root``.
        result: ``evaluate(model, processor, samples)``.
        count: number of examples per task; by default :data:`EXAMPLES_PER_TASK`.

    Returns:
        Examples for :func:`write_report`; without identity maps if the model has no ID-Former.
    """
    examples, samples = [], list(samples)
    for task, wanted in (EXAMPLES_PER_TASK if count is None else count).items():
        of_task = [pair for pair in zip(samples, result.predictions, strict=True) if pair[0].task == task]
        for sample, prediction in of_task[:wanted]:
            maps, grid_size = identity_maps(model, processor, sample)
            examples.append(make_example(sample, prediction, attention=maps, grid_size=grid_size))
    return examples


def identity_maps(
    model: nn.Module, processor, sample: Sample
) -> tuple[list[np.ndarray] | None, tuple[int, int] | None]:
    """Identity maps ``[P, G + 1]`` of the scenes of ``sample``, averaged over layers, and their grid.

    Returns:
        ``(None, None)`` if the model has no ID-Former or the sample introduces no identity.
    """
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
    """An example with the images of ``sample``, which are opened below ``sample.image_root``."""
    store = ImageStore(sample.image_root)
    is_matching = sample.task == "matching"
    iou = prediction.scores.get("mean_iou")  # of a location question whose target is in the image
    return Example(
        references=[(identity.name, store.open(path)) for identity in sample.identities for path in identity.images],
        images=[store.open(path) for path in sample.message_images],
        question=question_text(sample),
        answer=prediction.text if iou is None else f"{prediction.text} (IoU {iou:.2f})",
        gold=prediction.answer,
        right=prediction.main_score == 1,
        true_box=prediction.gold_box,
        predicted_box=prediction.box,
        true_image=parse_image_number(prediction.answer) if is_matching else None,
        predicted_image=parse_image_number(prediction.text) if is_matching else None,
        attention=attention,
        grid_size=grid_size,
    )


def draw_contact_sheet(path: str | Path, examples: Sequence[Example]) -> Path:
    """Draw one row per example: references, images with boxes, question and answer, a heat map for each identity.

    The right box or image has a green frame, the predicted one a dashed orange frame. Heat maps run from grey (no
    attention) to yellow (all attention of a patch) on one scale.

    Args:
        path: the PNG file to write.
        examples: the rows.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: identity maps that do not fit their example.
    """
    grids = [example.attention_grids() for example in examples]
    maps = max((len(example.names) for example, grid in zip(examples, grids, strict=True) if grid), default=0)
    lefts = [_GAP + number * (_CELL + _GAP) + (_TEXT - _CELL if number > 2 else 0) for number in range(3 + maps)]
    width = lefts[-1] + (_CELL if maps else _TEXT) + _GAP
    row_height = _CELL + _HEAD + _GAP
    height = len(examples) * row_height + _HEAD + _GAP
    figure = new_figure(width, height)
    figure.set_layout_engine("none")

    def cell(row: int, column: int, title: str) -> "Axes":
        bottom, inches = height - (row + 1) * row_height - _HEAD + _GAP, _TEXT if column == 2 else _CELL
        ax = figure.add_axes((lefts[column] / width, bottom / height, inches / width, _CELL / height))
        ax.set_axis_off()
        ax.set_title(title, fontsize=8.5, color=INK, loc="left", pad=3, parse_math=False)
        return ax

    legend = [(0, "— right", TRUE), (0.62, "- - predicted", PREDICTED)]
    if maps:
        legend.append((1.9, "heat map: share of the attention of a patch, yellow = all", INK))
    ax = cell(-1, 0, "")
    for x, text, colour in legend:
        ax.text(x, -0.06, text, fontsize=8.5, color=colour, weight="bold", transform=ax.transAxes)
    for row, (example, grid) in enumerate(zip(examples, grids, strict=True)):
        of_name = [[image for name, image in example.references if name == wanted] for wanted in example.names]
        _draw_images(cell(row, 0, "references"), of_name, [[name] for name in example.names])
        several = len(example.images) > 1
        numbers = [str(number) for number in range(1, len(example.images) + 1)] if several else []
        ax = cell(row, 1, "images" if several else "scene")
        _draw_frames(ax, example, _draw_images(ax, _square_grid(example.images), _square_grid(numbers)))
        _draw_texts(cell(row, 2, ""), example)
        for column, name in enumerate(example.names if grid else ()):
            heat = [_heat_map(image, maps_[column]) for image, maps_ in zip(example.images, grid, strict=True)]
            _draw_images(cell(row, 3 + column, f"attention to {_shorten(name, 16)}"), _square_grid(heat))
    return save(figure, path)


def _square_grid(elements: Sequence) -> list[Sequence]:
    """Rows of equal length, about as many as columns; the last row may be shorter."""
    columns = max(1, int(np.ceil(np.sqrt(len(elements)))))
    return [elements[start : start + columns] for start in range(0, len(elements), columns)]


def _draw_images(
    ax: "Axes", rows: Sequence[Sequence[Image.Image]], labels: Sequence[Sequence[str]] = ()
) -> list[tuple[float, float, float]]:
    """Draw rows of images in a square; returns left, top and scale of each, to place boxes in its pixels."""
    side = max([1, len(rows), *map(len, rows)])
    placed = []
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            scale = 0.97 / max(image.size)
            width, height = scale * image.width, scale * image.height
            left = column + (side - max(map(len, rows)) + 1 - width) / 2
            top = row + (side - len(rows) + 1 - height) / 2
            small = ImageOps.contain(image.convert("RGB"), (_TILE, _TILE))
            ax.imshow(small, extent=(left, left + width, top + height, top), interpolation="lanczos")
            placed.append((left, top, scale))
            if labels and column < len(labels[row]):
                text, bottom_left = _shorten(labels[row][column], 26 // side), (left, top + height)
                box = {"fc": "white", "ec": "none", "alpha": 0.82, "pad": 1.5}
                style = {"fontsize": 7.5, "color": INK, "bbox": box, "zorder": 5, "parse_math": False}
                ax.annotate(text, bottom_left, (3, 3.5), textcoords="offset points", **style)
    ax.set(xlim=(0, side), ylim=(side, 0), aspect="equal")
    return placed


def _draw_frames(ax: "Axes", example: Example, placed: Sequence[tuple[float, float, float]]) -> None:
    from matplotlib.patches import Rectangle

    true, predicted = {"ec": TRUE, "lw": 2.4}, {"ec": PREDICTED, "lw": 1.8, "ls": (0, (4, 2))}
    frames = [(len(placed), example.true_box, true), (len(placed), example.predicted_box, predicted)]
    for number, style in ((example.true_image, true), (example.predicted_image, predicted)):
        if number is not None and 1 <= number <= len(placed):
            frames.append((number, (0, 0, *example.images[number - 1].size), style))
    for number, box, style in frames:
        if box is not None:
            left, top, scale = placed[number - 1]
            x1, y1, x2, y2 = (scale * edge for edge in box)
            ax.add_patch(Rectangle((left + x1, top + y1), x2 - x1, y2 - y1, fill=False, clip_on=False, **style))


def _draw_texts(ax: "Axes", example: Example) -> None:
    """Question, answer in green or red, and the right answer if the text differs."""
    ax.set(xlim=(0, 1), ylim=(1, 0))
    blocks = [(example.question, INK, "normal")]
    blocks.append((example.answer or "(empty)", TRUE if example.right else WRONG, "bold"))
    if example.gold and example.gold != example.answer:
        blocks.append((f"right: {example.gold}", TRUE, "normal"))
    small = sum(len(text) for text, _, _ in blocks) > 220
    size, letters, most = (7, 49, 6) if small else (8.5, 40, 4)
    y = 0.0
    for text, colour, weight in blocks:
        width = int(letters * (0.88 if weight == "bold" else 1))
        # An untrained model may generate control characters.
        printable = "".join(letter if letter.isprintable() else "\u00b7" for letter in " ".join(text.split()))
        lines = textwrap.wrap(printable, width, max_lines=most, placeholder=" ...")
        style = {"fontsize": size, "linespacing": 1.25, "va": "top", "parse_math": False}
        ax.text(0.02, y, "\n".join(lines), color=colour, weight=weight, **style)
        y += 0.01 * size * len(lines) + 0.04


def _heat_map(image: Image.Image, share: np.ndarray) -> Image.Image:
    """``image`` in grey, overlaid with colour where ``share`` (0..1) is high."""
    from matplotlib import colormaps

    size = (_TILE, max(1, round(_TILE * image.height / image.width)))
    grey = np.asarray(image.convert("L").resize(size), np.float32)[..., None] / 255
    share = np.asarray(Image.fromarray(share).resize(size, Image.Resampling.BILINEAR)).clip(0, 1)
    colour = colormaps["inferno"](0.25 + 0.7 * share)[..., :3]
    weight = (0.7 * share)[..., None]
    blended = (0.25 + 0.7 * grey) * (1 - weight) + colour * weight
    return Image.fromarray((255 * blended.clip(0, 1)).astype(np.uint8))


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
