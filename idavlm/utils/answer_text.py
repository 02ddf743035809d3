"""What of a model's answer is the answer: without the thinking before it, from its last "the answer is" on."""

import re
import unicodedata

_THINKING = re.compile(r"<(think|thinking|reasoning)>.*?(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_PLAIN = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-", "\u2212": "-"}
    | {"\ufe0f": None, "\u20e3": None}  # what makes a digit an emoji
)
_MARKER = re.compile(
    r"\b(?:(?:final|my|the|correct|right)\s+)*answer\s*(?:is\b\s*:?|:)|(?:最终)?答案\s*(?:是|为|[::])", re.IGNORECASE
)


def plain_answer(text: str) -> str:
    """``text`` in ordinary digits, brackets and quotes (full-width ones are turned), without what is in ``<think>``."""
    return unicodedata.normalize("NFKC", _THINKING.sub(" ", text)).translate(_PLAIN)


def last_answer(text: str) -> str:
    """What follows the last "answer:", "the answer is" or 答案是; "" where nothing does."""
    found = list(_MARKER.finditer(text))
    return text[found[-1].end() :] if found else ""
