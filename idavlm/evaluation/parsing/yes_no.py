"""Whether an answer says yes or no."""

import re

from idavlm.utils import last_answer, plain_answer

_YES = r"yes|yeah|yep|true|correct|是的|是|对|有"
_NO = r"no|nope|not|false|incorrect|isn't|aren't|doesn't|don't|cannot|can't|不是|不|没有|否"
_WORD = re.compile(rf"(?<![a-z])(?:(?P<no>{_NO})|(?P<yes>{_YES}))(?![a-z])", re.IGNORECASE)


def parse_yes_no(text: str) -> bool | None:
    """True for yes, False for no, None where ``text`` says neither.

    The first word of either kind decides ("Yes, that is Kate, not Tom" is yes; "I don't see her" is no); where the text
    says "the answer is", what follows that goes first.
    """
    text = plain_answer(text)
    for part in (last_answer(text), text):
        word = _WORD.search(part)
        if word:
            return word["yes"] is not None
    return None
