"""Released checkpoints to models of idavlm."""

from idavlm.models.conversion.errors import ConversionError
from idavlm.models.conversion.running import convert

__all__ = ["ConversionError", "convert"]
