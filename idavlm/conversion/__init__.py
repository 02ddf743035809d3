"""Released checkpoints to models of idavlm."""

from idavlm.conversion.errors import ConversionError
from idavlm.conversion.running import convert

__all__ = ["ConversionError", "convert"]
