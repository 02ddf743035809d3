"""Draw docs/figures/flow.png: the path of one sample through idavlm.

python docs/figures/flow.py        # needs matplotlib, which the extras dev and eval install
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

DATA, VISION, IDENTITY, LANGUAGE, OUTPUT = "#eef1f5", "#dfe9f7", "#fde6c8", "#d9f0dd", "#f7dfe3"
EDGE = "#444444"


def box(ax, x, y, title, text, colour, width=2.5, height=1.25):
    """Draw a rounded box with a bold title and a line of explanation, centred at (x, y)."""
    corner = (x - width / 2, y - height / 2)
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0.03", fc=colour, ec=EDGE))
    ax.text(x, y + 0.3, title, ha="center", va="center", fontsize=12, weight="bold")
    ax.text(x, y - 0.2, text, ha="center", va="center", fontsize=9.5)


def arrow(ax, start, end, text="", offset=(0.0, 0.15), align="center"):
    """Draw an arrow with an optional label at its middle."""
    ax.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "lw": 1.4, "color": EDGE})
    if text:
        middle = ((start[0] + end[0]) / 2 + offset[0], (start[1] + end[1]) / 2 + offset[1])
        ax.text(*middle, text, fontsize=9.5, color=EDGE, ha=align, va="center", style="italic")


def main() -> None:
    figure, ax = plt.subplots(figsize=(12.6, 6.6))

    box(ax, 0, 6, "record", "JSON: identities,\nmessages, boxes", DATA)
    box(ax, 3.9, 6, "Sample", "parsed and checked", DATA)
    box(ax, 7.8, 6, "encoded sample", "text, images, roles", DATA)
    box(ax, 11.7, 6, "batch", "one row of images\nfor all samples", DATA)
    arrow(ax, (1.32, 6), (2.58, 6), "reader")
    arrow(ax, (5.22, 6), (6.48, 6), "processor")
    arrow(ax, (9.12, 6), (10.38, 6), "collator")

    box(ax, 11.7, 3.4, "vision tower", "patches [I, P, Cv]", VISION)
    arrow(ax, (11.7, 5.38), (11.7, 4.02), "pixel_values", (0.15, 0), "left")

    box(ax, 7.8, 3.4, "ID-Former", "scene patches attend\nto reference tokens", IDENTITY)
    arrow(ax, (10.38, 3.4), (9.12, 3.4), "features")
    ax.annotate(
        "",
        xy=(8.4, 4.02),
        xytext=(11.0, 5.38),
        arrowprops={"arrowstyle": "->", "lw": 1.2, "color": EDGE, "linestyle": "--"},
    )
    labels = "image_roles\nsample_index\nidentity_index"
    ax.text(9.1, 4.62, labels, fontsize=9.5, color=EDGE, ha="right", style="italic")

    box(ax, 3.9, 3.4, "scatter", "image tokens replace\nplaceholders", LANGUAGE)
    arrow(ax, (6.48, 3.4), (5.22, 3.4), "[I, Q, C]")
    box(ax, 0, 3.4, "language model", "any causal decoder", LANGUAGE)
    arrow(ax, (2.58, 3.4), (1.32, 3.4), "[B, T, C]")

    box(ax, 7.8, 0.9, "identity map", "[P, G + 1] per scene:\nwho is where", OUTPUT)
    arrow(ax, (7.8, 2.78), (7.8, 1.52), "attention shares", (0.15, 0), "left")
    box(ax, 0, 0.9, "answer", '"Kate is pouring tea."', OUTPUT)
    arrow(ax, (0, 2.78), (0, 1.52))
    box(ax, 3.9, 0.9, "loss", "language loss\n+ identity map loss", OUTPUT)
    arrow(ax, (1.32, 0.9), (2.58, 0.9), "labels")
    arrow(ax, (6.48, 0.9), (5.22, 0.9), "boxes")

    ax.set_xlim(-1.5, 13.2)
    ax.set_ylim(0.1, 6.8)
    ax.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
