"""A contact sheet: what the model was shown, what it was asked, what it said, and where it looked."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from idavlm.evaluation.plots import INK, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRUE, PREDICTED, WRONG = "#1a9850", "#f58b1f", "#c0392b"
_TILE = 256  # pixels a side of one picture of a cell
_CELL, _GAP, _TEXT, _HEAD = 1.75, 0.14, 2.75, 0.3  # inches


@dataclass(frozen=True)
class Example:
    """One row of the sheet.

    Attributes:
        references: ``(name, photo)`` in the order the model saw them; photos of one name follow each other.
        pictures: the pictures the question is about.
        question, answer, gold: texts; ``gold`` may be "" where the right answer is a box.
        right: whether the answer counts as right.
        true_box, predicted_box: pixels ``[x1, y1, x2, y2]`` of the last picture.
        true_picture, predicted_picture: numbers from 1, for matching.
        attention: identity maps ``[P, G + 1]``, one a picture, patches row by row, the last column nobody's.
        grid_size: rows and columns of patches; patches cover the whole picture.
    """

    references: Sequence[tuple[str, Image.Image]]
    pictures: Sequence[Image.Image]
    question: str
    answer: str
    gold: str
    right: bool
    true_box: Sequence[float] | None = None
    predicted_box: Sequence[float] | None = None
    true_picture: int | None = None
    predicted_picture: int | None = None
    attention: Sequence[np.ndarray] | None = None
    grid_size: tuple[int, int] | None = None

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.references))

    def shares(self) -> list[np.ndarray] | None:
        """``[G + 1, rows, columns]`` a picture, or None without maps.

        Raises:
            ValueError: maps that do not fit the pictures or ``grid_size``.
        """
        if self.attention is None:
            return None
        shapes = [np.shape(one) for one in self.attention]
        if self.grid_size is None or any(shape[:-1] != (self.grid_size[0] * self.grid_size[1],) for shape in shapes):
            raise ValueError(f"attention has shapes {shapes} and grid_size={self.grid_size}; expected [P, G + 1] maps.")
        if len(shapes) != len(self.pictures):
            raise ValueError(f"attention has {len(shapes)} maps for {len(self.pictures)} pictures; give one a picture.")
        return [np.asarray(one, np.float32).T.reshape(-1, *self.grid_size) for one in self.attention]


def draw_contact_sheet(path: str | Path, examples: Sequence[Example]) -> Path:
    """One row an example: references, pictures with boxes, a heat map for each identity, question and answer.

    The true box or picture is framed green, the predicted one orange and dashed. Heat maps run from grey (no
    attention) to yellow (all of a patch's attention), the same scale everywhere.
    """
    shares = [example.shares() for example in examples]
    maps = max((len(example.names) for example, one in zip(examples, shares, strict=True) if one), default=0)
    lefts = [_GAP + number * (_CELL + _GAP) + (_TEXT - _CELL if number > 2 else 0) for number in range(3 + maps)]
    width = lefts[-1] + (_CELL if maps else _TEXT) + _GAP
    line = _CELL + _HEAD + _GAP
    height = len(examples) * line + _HEAD + _GAP
    figure = new_figure(width, height)
    figure.set_layout_engine("none")

    def cell(row: int, column: int, title: str) -> "Axes":
        bottom, inches = height - (row + 1) * line - _HEAD + _GAP, _TEXT if column == 2 else _CELL
        ax = figure.add_axes((lefts[column] / width, bottom / height, inches / width, _CELL / height))
        ax.set_axis_off()
        ax.set_title(title, fontsize=8.5, color=INK, loc="left", pad=3, parse_math=False)
        return ax

    _draw_legend(cell(-1, 0, ""), heat=maps > 0)
    for row, (example, one) in enumerate(zip(examples, shares, strict=True)):
        _draw_references(cell(row, 0, "references"), example)
        scene = cell(row, 1, "scene" if len(example.pictures) == 1 else "pictures")
        _draw_frames(scene, example, _show(scene, example.pictures))
        _write(cell(row, 2, ""), example)
        for column, name in enumerate(example.names if one else ()):
            heat = [_lit(picture, map_[column]) for picture, map_ in zip(example.pictures, one, strict=True)]
            _show(cell(row, 3 + column, f"attention to {_short(name, 16)}"), heat, numbers=False)
    return save(figure, path)


def _draw_legend(ax: "Axes", *, heat: bool) -> None:
    entries = [(0, "— right place", TRUE), (0.62, "- - place the model gave", PREDICTED)]
    if heat:
        entries.append((1.9, "glow: share of a patch's attention, yellow = all of it", INK))
    for x, text, colour in entries:
        ax.text(x, -0.06, text, fontsize=8.5, color=colour, weight="bold", transform=ax.transAxes)


def _draw_references(ax: "Axes", example: Example) -> None:
    """A line of photos an identity, its name on the first."""
    lines = [[photo for name, photo in example.references if name == wanted] for wanted in example.names]
    side = max([1, len(lines), *map(len, lines)])
    ax.set(xlim=(0, side), ylim=(side, 0), aspect="equal")
    for row, (name, photos) in enumerate(zip(example.names, lines, strict=True)):
        top = row + (side - len(lines)) / 2
        for column, photo in enumerate(photos):
            left = column + (side - len(photos)) / 2
            ax.imshow(_square(photo)[0], extent=(left + 0.02, left + 0.98, top + 0.98, top + 0.02))
        left = (side - len(photos)) / 2
        _label(ax, left + 0.02, top + 0.98, _short(name, 26 // side))
    ax.set(xlim=(0, side), ylim=(side, 0))


def _show(ax: "Axes", pictures: Sequence[Image.Image], numbers: bool = True) -> list[tuple[float, float, float]]:
    """Draw pictures in a square of tiles; returns left, top and scale of each, for boxes in its pixels."""
    columns = int(np.ceil(np.sqrt(len(pictures))))
    step, empty = _TILE + 8, columns - int(np.ceil(len(pictures) / columns))
    placed = []
    for number, picture in enumerate(pictures):
        tile, dx, dy, scale = _square(picture)
        left, top = number % columns * step, (number // columns + empty / 2) * step
        ax.imshow(tile, extent=(left, left + _TILE, top + _TILE, top), interpolation="lanczos")
        placed.append((left + dx, top + dy, scale))
        if numbers and len(pictures) > 1:
            _label(ax, left + dx, top + _TILE - dy, str(number + 1))
    end = columns * step - 8
    ax.set(xlim=(-2, end + 2), ylim=(end + 2, -2), aspect="equal")
    return placed


def _draw_frames(ax: "Axes", example: Example, placed: Sequence[tuple[float, float, float]]) -> None:
    from matplotlib.patches import Rectangle

    def frame(picture: int, box: Sequence[float], **style) -> None:
        left, top, scale = placed[picture]
        x1, y1, x2, y2 = (scale * edge for edge in box)
        ax.add_patch(Rectangle((left + x1, top + y1), x2 - x1, y2 - y1, fill=False, clip_on=False, **style))

    true, predicted = {"ec": TRUE, "lw": 2.4}, {"ec": PREDICTED, "lw": 1.8, "ls": (0, (4, 2))}
    for box, style in ((example.true_box, true), (example.predicted_box, predicted)):
        if box is not None:
            frame(len(placed) - 1, box, **style)
    for number, style in ((example.true_picture, true), (example.predicted_picture, predicted)):
        if number is not None and 1 <= number <= len(placed):
            frame(number - 1, (0, 0, *example.pictures[number - 1].size), **style)


def _write(ax: "Axes", example: Example) -> None:
    """Question, answer in the colour of right or wrong, and the right answer where it is another text."""
    ax.set(xlim=(0, 1), ylim=(1, 0))
    blocks = [(example.question, INK, "normal")]
    blocks.append((example.answer or "(nothing)", TRUE if example.right else WRONG, "bold"))
    if example.gold and example.gold != example.answer:
        blocks.append((f"right: {example.gold}", TRUE, "normal"))
    small = sum(len(text) for text, _, _ in blocks) > 220
    size, letters, most = (7, 49, 6) if small else (8.5, 40, 4)
    y = 0.0
    for text, colour, weight in blocks:
        width = int(letters * (0.88 if weight == "bold" else 1))
        lines = textwrap.wrap(_printable(text), width, max_lines=most, placeholder=" ...")
        style = {"fontsize": size, "linespacing": 1.25, "va": "top", "parse_math": False}
        ax.text(0.02, y, "\n".join(lines), color=colour, weight=weight, **style)
        y += 0.01 * size * len(lines) + 0.04


def _label(ax: "Axes", left: float, bottom: float, text: str) -> None:
    style = {"fc": "white", "ec": "none", "alpha": 0.82, "pad": 1.5}
    ax.annotate(
        text, (left, bottom), (3, 3.5), textcoords="offset points", fontsize=7.5, color=INK, bbox=style, zorder=5,
        parse_math=False,
    )  # fmt: skip


def _square(picture: Image.Image) -> tuple[Image.Image, float, float, float]:
    """``picture`` in the middle of a white square, with left, top and scale of it there."""
    picture = picture.convert("RGB")
    scale = _TILE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    tile = Image.new("RGB", (_TILE, _TILE), "white")
    left, top = (_TILE - width) // 2, (_TILE - height) // 2
    tile.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (left, top))
    return tile, left, top, scale


def _lit(picture: Image.Image, share: np.ndarray) -> Image.Image:
    """``picture`` in grey, glowing where ``share`` (0..1) is high."""
    from matplotlib import colormaps

    size = (_TILE, max(1, round(_TILE * picture.height / picture.width)))
    grey = np.asarray(picture.convert("L").resize(size), np.float32)[..., None] / 255
    share = np.asarray(Image.fromarray(share).resize(size, Image.Resampling.BILINEAR)).clip(0, 1)
    glow = colormaps["inferno"](0.25 + 0.7 * share)[..., :3]
    weight = (0.7 * share)[..., None]
    lit = (0.25 + 0.7 * grey) * (1 - weight) + glow * weight
    return Image.fromarray((255 * lit.clip(0, 1)).astype(np.uint8))


def _printable(text: str) -> str:
    """One line, without the control characters that a model that has learnt little may write."""
    return "".join(letter if letter.isprintable() else "\u00b7" for letter in " ".join(text.split()))


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
