"""Floor 0: small things every floor may use."""

from idavlm.utils.answer_text import last_answer, plain_answer
from idavlm.utils.cache_argument import cache_in, cache_name, takes_cache
from idavlm.utils.checks import check_choice, check_positive
from idavlm.utils.compiling import outside_compile
from idavlm.utils.image_roles import ImageRole
from idavlm.utils.torn_lines import drop_torn_line

__all__ = [
    "ImageRole",
    "cache_in",
    "cache_name",
    "check_choice",
    "check_positive",
    "drop_torn_line",
    "last_answer",
    "outside_compile",
    "plain_answer",
    "takes_cache",
]
