"""Figures of matplotlib without pyplot: they need no display and change no global state."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1b6ca8", "#e08e45", "#7a9e7e", "#b07aa1", "#c75146", "#5b5f97", "#8c7853")
"""Colours of lines, bars and boxes."""

INK, FAINT = "#2b2d33", "#d9dce1"


def new_figure(width: float, height: float) -> "Figure":
    """A white figure of ``width`` x ``height`` inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with: pip install 'idavlm[eval]'") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save(figure: "Figure", path: str | Path) -> Path:
    """Write ``figure`` as PNG; missing folders are created."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def tidy(ax: "Axes") -> None:
    """Axes with a faint grid, and lines at the left and at the bottom only."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#9a9da5")
    ax.grid(axis="y", color=FAINT, lw=0.7, zorder=0)
    ax.set_axisbelow(True)
    ax.tick_params(colors=INK, labelsize=9)
