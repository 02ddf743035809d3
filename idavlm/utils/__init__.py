"""Floor 0: small things every floor may use."""

from idavlm.utils.checks import check_choice, check_positive
from idavlm.utils.compiling import outside_compile
from idavlm.utils.image_roles import ImageRole

__all__ = ["ImageRole", "check_choice", "check_positive", "outside_compile"]
