"""Draw docs/figures/id_former.png: what the ID-Former computes for the three roles of images.

python docs/figures/id_former.py        # needs matplotlib, which the extras dev and eval install
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

FEATURES, STEP, ATTENTION, TOKENS = "#e8eef7", "#f4f4f4", "#fde6c8", "#d9f0dd"


def box(ax, x, y, text, colour, width=2.6, height=0.8):
    """Draw a rounded box centred at (x, y)."""
    style = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.02", fc=colour, ec="#444"
    )
    ax.add_patch(style)
    ax.text(x, y, text, ha="center", va="center", fontsize=8.5)


def arrow(ax, start, end, text="", offset=(0.1, 0), style="-"):
    """Draw an arrow with an optional label beside it."""
    ax.annotate(
        "", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "lw": 1.3, "color": "#444", "linestyle": style}
    )
    if text:
        middle = ((start[0] + end[0]) / 2 + offset[0], (start[1] + end[1]) / 2 + offset[1])
        ax.text(*middle, text, fontsize=8, color="#444", va="center")


def main() -> None:
    figure, ax = plt.subplots(figsize=(11.5, 6.4))
    for x, name, symbol in (
        (0, "general images", "x"),
        (4, "references of sample n", "x"),
        (9, "scenes of sample n", "x"),
    ):
        box(ax, x, 0, f"{name}\nimage_features [., P, Cv]", FEATURES, width=3.4)
        box(ax, x, 1.5, "input_proj, input_norm", STEP, width=3.4)
        arrow(ax, (x, 0.42), (x, 1.08))
        box(ax, x, 5.0, "attention of Q learned queries\nk = x + position, v = x", ATTENTION, width=3.4)
        box(ax, x, 6.8, "image tokens [., Q, C]", TOKENS, width=3.4)
        arrow(ax, (x, 5.42), (x, 6.38))
        if x != 9:
            arrow(ax, (x, 1.92), (x, 4.58), symbol)
    box(ax, 9, 3.0, "identity layer\nx + attention(x + position, t, t)", ATTENTION, width=3.4)
    arrow(ax, (9, 1.92), (9, 2.58), "x")
    arrow(ax, (9, 3.42), (9, 4.58), "x with identity")
    ax.plot([5.72, 6.2, 6.2], [6.8, 6.8, 3.0], color="#444", lw=1.3, ls="--")
    arrow(ax, (6.2, 3.0), (7.28, 3.0), style="--")
    ax.text(6.3, 4.0, "t: all tokens\nof the sample's\nreferences,\nno gradient", fontsize=8, color="#444", va="center")
    ax.text(9, 7.5, "same queries and weights in all three columns", fontsize=8, ha="right", color="#444")
    ax.annotate("identity map\n[P, G + 1]", xy=(10.72, 3.0), xytext=(11.3, 3.0), fontsize=9, va="center",
                arrowprops={"arrowstyle": "<-", "lw": 1.3, "color": "#444"})  # fmt: skip
    ax.set_xlim(-1.8, 12.6)
    ax.set_ylim(-0.6, 7.8)
    ax.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
