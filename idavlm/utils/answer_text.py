"""Normalise a model's answer: remove reasoning, unify characters, find the text after "the answer is"."""

import re
import unicodedata

_THINKING = re.compile(r"<(think|thinking|reasoning)>.*?(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_PLAIN = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-", "\u2212": "-"}
    | {"\ufe0f": None, "\u20e3": None}  # the code points that turn a digit into an emoji
)
_MARKER = re.compile(r"\banswer\s*(?:is\b\s*:?|:)|答案\s*(?:是|为|:)", re.IGNORECASE)


def plain_answer(text: str) -> str:
    """``text`` without ``<think>`` blocks, with full-width digits, brackets and quotes replaced by ASCII ones."""
    return unicodedata.normalize("NFKC", _THINKING.sub(" ", text)).translate(_PLAIN)


def last_answer(text: str) -> str:
    """The text after the last "answer:", "the answer is" or 答案是; "" if there is no such marker."""
    found = list(_MARKER.finditer(text))
    return text[found[-1].end() :] if found else ""
