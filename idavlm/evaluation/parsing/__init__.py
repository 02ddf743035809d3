"""From what a model wrote to what it meant. Boxes are read by :class:`idavlm.models.BoxFormat`."""

from idavlm.evaluation.parsing.choices import parse_letter, parse_picture
from idavlm.evaluation.parsing.yes_no import parse_yes_no

__all__ = ["parse_letter", "parse_picture", "parse_yes_no"]
