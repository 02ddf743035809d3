"""Convert released checkpoints to models of idavlm."""

from idavlm.conversion.converter import convert
from idavlm.conversion.errors import ConversionError

__all__ = ["ConversionError", "convert"]
