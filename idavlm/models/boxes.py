"""The text forms of boxes in use, to and from pixels of the original image."""

from collections.abc import Sequence
from dataclasses import dataclass

from idavlm.models.box_numbers import find_box_numbers
from idavlm.utils import check_choice


@dataclass(frozen=True)
class BoxReading:
    """What was read: ``box`` in pixels, or None and why (``"none"``, ``"empty"``, ``"convention"``)."""

    box: list[float] | None
    problem: str = ""


class BoxFormat:
    """How a box ``[x1, y1, x2, y2]`` is written.

    ============== ======================================== ======================================================
    ``kind``       example                                  coordinates
    ============== ======================================== ======================================================
    ``"qwen"``     ``<ref>Kate</ref><box>(120,40),(630,980)</box>`` 0..999 of width and height (Qwen-VL, IDA-VLM)
    ``"thousand"`` ``[120, 40, 630, 980]``                  the same
    ``"unit"``     ``[0.120, 0.040, 0.630, 0.980]``         0..1 of width and height (LLaVA)
    ``"square"``   ``[0.120, 0.245, 0.630, 0.715]``         0..1 of the image padded to a square, centred (IAA)
    ``"pixels"``   ``[77, 19, 403, 470]``                   pixels of the image (Qwen2.5-VL, ground truth of MM-ID)
    ``"bins"``     ``4 1 20 31``                            0..31 of width and height, for small models
    ============== ======================================== ======================================================

    The kind is a fact of the model and never guessed: "[120, 40, 630, 980]" is one box in pixels, another in
    thousandths.
    """

    KINDS = ("qwen", "thousand", "unit", "square", "pixels", "bins")
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
        steps = size if self.kind == "pixels" else [self._steps] * 2
        x1, y1, x2, y2 = (round(value * number) for value, number in zip(unit, steps * 2, strict=True))
        if self.kind == "qwen":
            return f"<ref>{name}</ref><box>({x1},{y1}),({x2},{y2})</box>"
        return f"{x1} {y1} {x2} {y2}" if self.kind == "bins" else f"[{x1}, {y1}, {x2}, {y2}]"

    def parse(self, text: str, image_size: Sequence[int] | None, *, name: str = "") -> list[float] | None:
        """The box in ``text``, in pixels of an image of ``image_size`` (height, width); None if there is none.

        :meth:`read` says why not.
        """
        return self.read(text, image_size, name=name).box

    def read(self, text: str, image_size: Sequence[int] | None, *, name: str = "") -> BoxReading:
        """As :meth:`parse`. Of several boxes the one that ``name`` stands before, else the first.

        A box with its corners exchanged is put right; what leaves the image is cut off; what is empty then is none.
        Numbers that cannot be of this kind (0.3 in thousandths or pixels, 300 in 0..1) are none either, never another
        kind's.

        Args:
            text: what a model wrote; see :func:`idavlm.models.box_numbers.find_box_numbers` for what is read.
            image_size: height and width; None will do for ``"pixels"``, which are not cut off then.
            name: who is asked for.

        Raises:
            ValueError: ``image_size`` is needed.
        """
        if image_size is None and self.kind != "pixels":
            raise ValueError(f"image_size=None, but boxes of kind {self.kind!r} count in parts of the image; give it.")
        found = find_box_numbers(text, spaced=self.kind == "bins")
        if not found:
            return BoxReading(None, "none")
        named = [one for one in found if name and name.lower() in one.before.lower()]
        numbers = (named or found)[0].numbers
        if not self._plausible(numbers):
            return BoxReading(None, "convention")
        pixels = self._pixels(numbers, image_size)
        x1, x2 = sorted((pixels[0], pixels[2]))
        y1, y2 = sorted((pixels[1], pixels[3]))
        height, width = image_size if image_size is not None else (float("inf"),) * 2
        x1, x2 = max(x1, 0.0), min(x2, float(width))
        y1, y2 = max(y1, 0.0), min(y2, float(height))
        return BoxReading([x1, y1, x2, y2]) if x1 < x2 and y1 < y2 else BoxReading(None, "empty")

    @property
    def _steps(self) -> int:
        return {"unit": 1, "square": 1, "bins": self.BINS - 1}.get(self.kind, 999)

    def _plausible(self, numbers: Sequence[float]) -> bool:
        if self.kind in ("unit", "square"):
            return max(numbers) <= 10
        fractions = any(not number.is_integer() for number in numbers)
        return not (fractions and max(numbers) <= 1)

    def _pixels(self, numbers: Sequence[float], image_size: Sequence[int] | None) -> list[float]:
        if self.kind == "pixels":
            return list(numbers)
        size, shift = self._frame(image_size)
        unit = [number / self._steps for number in numbers]
        return [value * side - offset for value, offset, side in zip(unit, shift * 2, size * 2, strict=True)]

    def _frame(self, image_size: Sequence[int]) -> tuple[list[float], list[float]]:
        """Width and height the coordinates count in, and where the image stands in that frame."""
        height, width = image_size
        if self.kind != "square":
            return [width, height], [0.0, 0.0]
        side = max(height, width)
        return [side, side], [(side - width) / 2, (side - height) / 2]
