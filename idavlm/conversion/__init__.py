"""Convert released checkpoints to models of idavlm."""

from idavlm.conversion.checkpoint_files import ConversionError
from idavlm.conversion.converter import convert

__all__ = ["ConversionError", "convert"]
