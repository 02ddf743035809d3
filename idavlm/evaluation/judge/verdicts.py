"""From what a judge wrote to a score or a winner, exactly: "10/10" is 10."""

import re

from idavlm.utils import plain_answer

_NUMBER = r"(?<![\d.,])(\d{1,2}(?:\.\d+)?)(?![\d.]*\d)"
_OUT_OF_TEN = re.compile(rf"{_NUMBER}\s*(?:/|out of)\s*(?:10|ten)\b(?!\.\d)", re.IGNORECASE)
_OUT_OF_OTHER = re.compile(r"(?<![\d.])\d+(?:\.\d+)?\s*(?:/|out of)\s*\d+", re.IGNORECASE)
_NAMED = re.compile(
    r"(?:score|rating|grade|评分|得分|分数)(?:\s*\(\s*1\s*(?:-|to)\s*10\s*\))?[\s\"'*_]*(?:is|of|为|是)?[\s\"'*_:=\[(]*"
    rf"{_NUMBER}(?!\s*(?:-|to\b|/))",
    re.IGNORECASE,
)
_ALONE = re.compile(rf"[\s\"'*\[(]*{_NUMBER}[\s\"'*\])]*(?:points?|分)?[\s.*]*", re.IGNORECASE)
_LAST_LINE = re.compile(rf"^[\s\"'*\[(]*{_NUMBER}[\s\"'*\])]*\.?$")
_WINNER = re.compile(
    r"\[\[\s*(A|B|C|tie)\s*\]\]|(?:winner|verdict|better)[\"'*]*\s*(?:is)?\s*[\"'*:=]*\s*(A|B|tie)\b", re.I
)
_WINNER_ALONE = re.compile(r"[\s\"'*\[(]*(A|B|tie)[\s\"'*\]).]*", re.IGNORECASE)


def parse_score(reply: str) -> float | None:
    """The score from 1 to 10 that ``reply`` gives; None where it gives none (a refusal), or one outside.

    Read are "7/10" and "7 out of 10", "Score: 7" (in JSON too), and a reply, or its first or last line, that is nothing
    but the number. The last of several named scores counts, as explanations come before conclusions. "The scale of 1 to
    10", "2 people" and "3/5" are no scores.
    """
    text = plain_answer(reply).strip()
    found = [float(match[1]) for match in _OUT_OF_TEN.finditer(text)]
    if not found:
        found = [float(match[1]) for match in _NAMED.finditer(_OUT_OF_OTHER.sub(" ", text))]
    if not found:
        lines = [line for line in text.splitlines() if line.strip()]
        edges = [line for line in (*lines[-1:], *lines[:1]) if _LAST_LINE.match(line)]
        alone = _ALONE.fullmatch(text) or (_LAST_LINE.match(edges[0]) if edges else None)
        found = [float(alone[1])] if alone else []
    if not found or not 1 <= found[-1] <= 10:
        return None
    return found[-1]


def parse_winner(reply: str) -> str | None:
    """``"A"``, ``"B"`` or ``"tie"``; None where ``reply`` says none of them."""
    text = plain_answer(reply)
    alone = _WINNER_ALONE.fullmatch(text)
    found = [alone[1]] if alone else [match[1] or match[2] for match in _WINNER.finditer(text)]
    if not found:
        return None
    return {"C": "tie", "TIE": "tie"}.get(found[-1].upper(), found[-1].upper())
