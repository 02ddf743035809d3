"""The text forms of boxes in use, to and from pixels of the original image."""

import re
from collections.abc import Sequence

from idavlm.utils import check_choice

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_FOUR = re.compile(rf"[\[(<{{]?{_NUMBER},{_NUMBER}[)>]?\s*,?\s*[(<]?{_NUMBER},{_NUMBER}")


class BoxFormat:
    """How a box ``[x1, y1, x2, y2]`` is written.

    ============== ======================================== ======================================================
    ``kind``       example                                  coordinates
    ============== ======================================== ======================================================
    ``"qwen"``     ``<ref>Kate</ref><box>(120,40),(630,980)</box>`` 0..999 of width and height (Qwen-VL, IDA-VLM)
    ``"thousand"`` ``[120, 40, 630, 980]``                  the same
    ``"unit"``     ``[0.120, 0.040, 0.630, 0.980]``         0..1 of width and height (LLaVA)
    ``"square"``   ``[0.120, 0.245, 0.630, 0.715]``         0..1 of the image padded to a square, centred (IAA)
    ``"bins"``     ``4 1 20 31``                            0..31 of width and height, for small models
    ============== ======================================== ======================================================
    """

    KINDS = ("qwen", "thousand", "unit", "square", "bins")
    BINS = 32

    def __init__(self, kind: str):
        check_choice("box_format", kind, self.KINDS)
        self.kind = kind

    def write(self, name: str, box: Sequence[float], image_size: Sequence[int]) -> str:
        """The text of ``box`` (pixels) in an image of ``image_size`` (height, width)."""
        size, shift = self._frame(image_size)
        unit = [(value + offset) / side for value, offset, side in zip(box, shift * 2, size * 2, strict=True)]
        unit = [min(max(value, 0.0), 1.0) for value in unit]
        if self.kind in ("unit", "square"):
            return "[" + ", ".join(f"{value:.3f}" for value in unit) + "]"
        steps = self.BINS - 1 if self.kind == "bins" else 999
        x1, y1, x2, y2 = (round(value * steps) for value in unit)
        if self.kind == "qwen":
            return f"<ref>{name}</ref><box>({x1},{y1}),({x2},{y2})</box>"
        return f"{x1} {y1} {x2} {y2}" if self.kind == "bins" else f"[{x1}, {y1}, {x2}, {y2}]"

    def parse(self, text: str, image_size: Sequence[int]) -> list[float] | None:
        """The first box in ``text``, in pixels of an image of ``image_size`` (height, width); None if there is none.

        A box with its corners exchanged is put right; an empty one is none.
        """
        if self.kind == "bins":
            match = re.search(r"(\d+)\s+(\d+)\s+(\d+)\s+(\d+)", text)
        else:
            start = text.find("<box>") + len("<box>") if "<box>" in text else 0
            match = _FOUR.search(text, start)
        if match is None:
            return None
        steps = {"unit": 1, "square": 1, "bins": self.BINS - 1}.get(self.kind, 999)
        size, shift = self._frame(image_size)
        numbers = [float(group) / steps for group in match.groups()]
        pixels = [value * side - offset for value, offset, side in zip(numbers, shift * 2, size * 2, strict=True)]
        x1, x2 = sorted((pixels[0], pixels[2]))
        y1, y2 = sorted((pixels[1], pixels[3]))
        height, width = image_size
        x1, x2 = max(x1, 0.0), min(x2, float(width))
        y1, y2 = max(y1, 0.0), min(y2, float(height))
        return [x1, y1, x2, y2] if x1 < x2 and y1 < y2 else None

    def _frame(self, image_size: Sequence[int]) -> tuple[list[float], list[float]]:
        """Width and height the coordinates count in, and where the image stands in that frame."""
        height, width = image_size
        if self.kind != "square":
            return [width, height], [0.0, 0.0]
        side = max(height, width)
        return [side, side], [(side - width) / 2, (side - height) / 2]
