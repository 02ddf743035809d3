"""Floor 0: small things every floor may use."""

from idavlm.utils.answer_text import last_answer, plain_answer
from idavlm.utils.checks import check_choice, check_positive
from idavlm.utils.compiling import outside_compile
from idavlm.utils.files import drop_torn_line
from idavlm.utils.ignore_index import IGNORE_INDEX
from idavlm.utils.image_roles import ImageRole

__all__ = [
    "IGNORE_INDEX",
    "ImageRole",
    "check_choice",
    "check_positive",
    "drop_torn_line",
    "last_answer",
    "outside_compile",
    "plain_answer",
]
