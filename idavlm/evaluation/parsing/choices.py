"""Which of several pictures (or lettered options) an answer chooses."""

import re
from dataclasses import dataclass

from idavlm.utils import last_answer, plain_answer

_ONES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_CHINESE = "一二三四五六七八九十"
_ROMAN = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii")
_VALUE = {
    **{word: number for words in (_ONES, _ORDINALS, _ROMAN, _CHINESE) for number, word in enumerate(words, 1)},
    "两": 2,
    **{letter: number for number, letter in enumerate("abcdefgh", 1)},
}
# Small letters are words more often than choices ("in the picture a woman ..."), and "I" is the pronoun.
_LETTER = r"(?:(?-i:[A-H])|(?-i:II|III|IV|V|VI|VII|VIII)|(?-i:I)(?=\s*(?:[.,;:)!]|\Z)))(?![\w'])"
_CARDINAL = rf"(?:\d{{1,2}}(?![\d.]*\d|\s*%)|{'|'.join(_ONES)})"
_NOUN = (
    r"(?:pictures?|images?|photo(?:graph)?s?|pics?|imgs?|options?|choices?|candidates?|figures?|panels?|numbers?|no\.?)"
)
_MENTION = re.compile(
    rf"\b{_NOUN}[\s_]*(?:is\s+)?(?:#|no\.?|number|:|\()?\s*[\"'(\[*]*"
    rf"(?P<noun>{_CARDINAL}(?!\w)|{_LETTER})"
    rf"|\b(?P<ordinal>{'|'.join(_ORDINALS)}|\d{{1,2}}(?:st|nd|rd|th))\b(?!\s+(?:reference|person|woman|man|character))"
    rf"|(?:图片?|图像|照片|选项|第)\s*[#:(]?\s*(?P<chinese>\d{{1,2}}|[{_CHINESE}两])(?!\d)"
    rf"|(?P<hash>#\s*\d{{1,2}})(?!\w)"
    r"|[(\[](?P<bracketed>\d{1,2}|[a-h])[)\]]",
    re.IGNORECASE,
)
_MORE = re.compile(
    rf"\s*(?:,|/|&|、|\band\b|\bor\b|\bnor\b|和|或|,\s*(?:and|or))\s*(?:and\s+|or\s+)?"
    rf"({_CARDINAL}(?!\w)|(?-i:[A-H])(?![\w'])|[{_CHINESE}](?=[、和或,\s不]))",
    re.IGNORECASE,
)
_ALONE = re.compile(rf"[\s\"'*(\[#<]*(?P<value>{_CARDINAL}|[a-h]|[{_CHINESE}])(?!\w)[\s\"'*.)\]:>!。,]*", re.IGNORECASE)
_LEADING = re.compile(r"[\s\"'*(\[]*(?P<value>\d{1,2}|[A-Ha-h])(?:[.):]\s+|\s*-\s+)(?=\S)")
_SAID = re.compile(
    rf"\b(?:is|it's|be|choose|pick|select|say|guess)\s+(?:number\s+)?(?P<value>{_CARDINAL}|[a-h])\s*[.!]?\s*\Z",
    re.IGNORECASE,
)
_JOINED = re.compile(r"\s*,?\s*(?:and|or|/|,|或|和)\s*(?:(?:in|the)\s+)*", re.IGNORECASE)
_CLAUSE = re.compile(r"[.;!?。\n,]|\bbut\b|而是")
_NO_BEFORE = re.compile(
    r"\b(?:not|isn't|no|neither|nor|never|cannot be|can't be|rather than|instead of|except|unlike|excluding|exclude"
    r"|rule out|ruled out|eliminate|different from|other than)\b[^.;!?\n]*$|(?:不是|并非|不在|而非|排除)[^。;]*$",
    re.IGNORECASE,
)
_NO_AFTER = re.compile(
    r"^[^.;!?\n]{0,30}?\b(?:not(?!\s*(?:in\s*)?\Z)|isn't|aren't|doesn't|don't|cannot|can't|"
    r"(?:is|are) wrong|is someone else|is another|"
    r"(?:shows?|is of|are of) (?:another|someone else|somebody else|a different|different|others?))\b"
    r"|^[\s\"'*)]*[:\-][\s*]*(?:no|not|different|another|someone else|somebody else|other)\b"
    r"|^[^。;]{0,6}(?:不是|并非|没有|不对)",
    re.IGNORECASE,
)
# What stands behind a mention and is about another: "image 4, not image 1", "image 3 (not 1 or 2)".
_NEXT = re.compile(
    r"[.;!?。\n(]|\bbut\b|\b(?:image|picture|photo|option)s?\b|图|,\s*(?:and\s+)?not\b|\band not\b"
    r"|\b(?:rather than|instead of|unlike)\b|而不是|,\s*不是|不是(?=图|第|照片|选项)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Mention:
    value: int
    start: int
    end: int
    denied: bool
    joined: bool = False
    """Whether it continues a list: the 2 of "Image 1 or 2"."""


def parse_picture(text: str, *, count: int | None = None, name: str = "") -> int | None:
    """Number, from 1, of the picture that ``text`` chooses; None where it chooses none, or more than one.

    Read are numbers, words and letters behind a noun ("Picture 3", "image three", "Option C"), ordinals ("the third
    one"), Chinese (图三, 第3张), a text that is nothing but the number or letter, and "the answer is ...", which goes
    before what precedes it. What is denied does not count: "Image 4, not Image 1" and "It is not Image 1, 2 or 3 but 4"
    are 4. "Image 1 or 2" is no choice. Of several pictures in sentences of their own the one beside ``name`` counts,
    else the first.

    Args:
        text: what a model wrote.
        count: how many pictures there were; a larger number is no choice.
        name: who is looked for.
    """
    text = plain_answer(text)
    for part in (last_answer(text), text):
        value = _choice(part, name)
        if value is not None:
            return value if 0 < value <= (count or value) else None
    return None


def parse_letter(text: str, *, count: int | None = None) -> str | None:
    """The option, "A", "B", ..., that ``text`` chooses; as :func:`parse_picture`."""
    number = parse_picture(text, count=count)
    return None if number is None else "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[number - 1]


def _choice(text: str, name: str) -> int | None:
    alone = _ALONE.fullmatch(text) or _LEADING.match(text)
    if alone:
        return _value(alone["value"])
    mentions = _mentions(text)
    affirmed = [one for one in mentions if not one.denied]
    if not mentions:
        said = _SAID.search(text)
        return _value(said["value"]) if said else None
    if not affirmed:
        said = re.search(rf"(?:\bbut(?: it is| in)?|而是)\s*({_CARDINAL}|[{_CHINESE}])(?!\w)", text, re.IGNORECASE)
        return _value(said[1]) if said else None
    if name and len({one.value for one in affirmed}) > 1:
        beside = [one for one in affirmed if name.lower() in _clause_of(text, one).lower()]
        if len({one.value for one in beside}) == 1:
            return beside[0].value
    group = [affirmed[0].value]
    for one in affirmed[1:]:
        if not one.joined:
            break
        group.append(one.value)
    return group[0] if len(set(group)) == 1 else None


def _mentions(text: str) -> list[_Mention]:
    found: list[_Mention] = []
    position = 0
    while match := _MENTION.search(text, position):
        values = [(_value(next(filter(None, match.groups()))), match.start(), match.end())]
        end = match.end()
        while more := _MORE.match(text, end):
            values.append((_value(more[1]), more.start(1), more.end()))
            end = more.end()
        between = text[found[-1].end : match.start()] if found else ""
        joined = bool(found) and _JOINED.fullmatch(between) is not None
        denied = _is_denied(text, match.start(), end)
        if joined and found[-1].denied and not _NO_AFTER.match(text[end:]):
            denied = True
        for number, (value, start, stop) in enumerate(values):
            found.append(_Mention(value, start, stop, denied, joined=joined or number > 0))
        position = end
    return found


def _is_denied(text: str, start: int, end: int) -> bool:
    """By a "not" before the mention in its clause, or behind it: "image 1 is not her"."""
    if _NO_BEFORE.search(_CLAUSE.split(text[:start])[-1]):
        return True
    return bool(_NO_AFTER.match(_NEXT.split(text[end:], maxsplit=1)[0]))


def _clause_of(text: str, mention: _Mention) -> str:
    start = max(text.rfind(mark, 0, mention.start) for mark in ".;\n。;") + 1
    ends = [place for mark in ".;\n。;" if (place := text.find(mark, mention.end)) >= 0]
    return text[start : min(ends, default=len(text))]


def _value(text: str) -> int:
    text = text.lower().strip("# ")
    digits = re.match(r"\d+", text)
    return int(digits[0]) if digits else _VALUE[text]
