"""Parse the text of an answer: the number of an image, the letter of an option, yes or no.

Boxes are parsed by :class:`idavlm.models.BoxFormat`.
"""

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from idavlm.utils.answer_text import last_answer, plain_answer

_ONES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_CHINESE = "一二三四五六七八九十"
_ROMAN = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii")
_VALUE = {
    **{word: number for words in (_ONES, _ORDINALS, _ROMAN, _CHINESE) for number, word in enumerate(words, 1)},
    "两": 2,
    **{letter: number for number, letter in enumerate("abcdefgh", 1)},
}
# Lower-case letters are words more often than choices ("in the picture a woman ..."), and "I" is a pronoun.
_LETTER = r"(?:(?-i:[A-H])|(?-i:II|III|IV|V|VI|VII|VIII)|(?-i:I)(?=\s*(?:[.,;:)!]|\Z)))(?![\w'])"
_CARDINAL = rf"(?:\d{{1,2}}(?![\d.]*\d|\s*%)|{'|'.join(_ONES)})"
_NOUN = (
    r"(?:pictures?|images?|photo(?:graph)?s?|pics?|imgs?|options?|choices?|candidates?|figures?|panels?|numbers?|no\.?)"
)
# Possessive quantifiers keep these patterns linear: text that does not match is not tried in other ways.
_MENTION = re.compile(
    rf"\b{_NOUN}[\s_]*+(?:is\s++)?(?:#|no\.?|number|:|\()?\s*+[\"'(\[*]*+"
    rf"(?P<noun>{_CARDINAL}(?!\w)|{_LETTER})"
    rf"|\b(?P<ordinal>{'|'.join(_ORDINALS)}|\d{{1,2}}(?:st|nd|rd|th))\b(?!\s+(?:reference|person|woman|man|character))"
    rf"|(?:图片?|图像|照片|选项|第)\s*+[#:(]?+\s*+(?P<chinese>\d{{1,2}}|[{_CHINESE}两])(?!\d)"
    rf"|(?P<hash>#\s*+\d{{1,2}})(?!\w)"
    r"|[(\[](?P<bracketed>\d{1,2}|[a-h])[)\]]",
    re.IGNORECASE,
)
_MORE = re.compile(
    rf"\s*+(?:,|/|&|、|\band\b|\bor\b|\bnor\b|和|或|,\s*+(?:and|or))\s*+(?:and\s++|or\s++)?"
    rf"({_CARDINAL}(?!\w)|(?-i:[A-H])(?![\w'])|[{_CHINESE}](?=[、和或,\s不]))",
    re.IGNORECASE,
)
_ALONE = re.compile(rf"[\s\"'*(\[#<]*(?P<value>{_CARDINAL}|[a-h]|[{_CHINESE}])(?!\w)[\s\"'*.)\]:>!。,]*", re.IGNORECASE)
_LEADING = re.compile(r"[\s\"'*(\[]*(?P<value>\d{1,2}|[A-Ha-h])(?:[.):]\s+|\s*-\s+)(?=\S)")
_SAID = re.compile(
    rf"\b(?:is|it's|be|choose|pick|select|say|guess)\s++(?:number\s++)?(?P<value>{_CARDINAL}|[a-h])\s*+[.!]?+\s*+\Z",
    re.IGNORECASE,
)
_JOINED = re.compile(r"\s*+(?:,\s*+)?(?:and|or|/|,|或|和)\s*+(?:(?:in|the)\s++)*+", re.IGNORECASE)
_CLAUSE = re.compile(r"[.;!?。\n,]|\bbut(?![a-z\d_])|而是")
# Within the clause before a mention.
_NO_BEFORE = re.compile(
    r"\b(?:not|isn't|no|neither|nor|never|cannot be|can't be|rather than|instead of|except|unlike|excluding|exclude"
    r"|rule out|ruled out|eliminate|different from|other than)(?![a-z\d_])|不是|并非|不在|而非|排除",
    re.IGNORECASE,
)
# Directly after a mention.
_NO_AFTER = re.compile(
    r"(?:|[^.;!?\n]{0,30}?\b)(?:not(?!\s*+(?:in\s*+)?\Z)|isn't|aren't|doesn't|don't|cannot|can't|"
    r"(?:is|are) wrong|is someone else|is another|"
    r"(?:shows?|is of|are of) (?:another|someone else|somebody else|a different|different|others?))\b"
    r"|[\s\"'*)]*+[:\-][\s*]*+(?:no|not|different|another|someone else|somebody else|other)\b"
    r"|[^。;]{0,6}(?:不是|并非|没有|不对)",
    re.IGNORECASE,
)
# Where the text after a mention turns to another image: "image 4, not image 1", "image 3 (not 1 or 2)".
_NEXT = re.compile(
    r"[.;!?。\n(]|\bbut\b|(?<![a-z_])(?:image|picture|photo|option)s?\b|图|,\s*(?:and\s+)?not\b|\band not\b"
    r"|\b(?:rather than|instead of|unlike)\b|而不是|,\s*不是|不是(?=图|第|照片|选项)",
    re.IGNORECASE,
)

_YES = r"yes|yeah|yep|true|correct|是的|是|对|有"
_NO = r"no|nope|not|false|incorrect|isn't|aren't|doesn't|don't|cannot|can't|不是|不|没有|否"
_YES_OR_NO = re.compile(rf"(?<![a-z])(?:(?P<no>{_NO})|(?P<yes>{_YES}))(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class _Mention:
    value: int
    start: int
    end: int
    denied: bool
    joined: bool = False
    """Whether the mention continues a list, such as the 2 of "Image 1 or 2"."""


def parse_image_number(text: str, *, count: int | None = None, name: str = "") -> int | None:
    """Parse which of several numbered images ``text`` chooses.

    Recognised are numbers, words and letters after a noun ("Picture 3", "image three", "Option C"), ordinals ("the
    third one"), Chinese forms (图三, 第3张), and a text that consists of a number or letter only. The text after "the
    answer is" takes precedence over the text before it. Negated mentions are ignored: "Image 4, not Image 1" and "It is
    not Image 1, 2 or 3 but 4" choose 4. A list of alternatives ("Image 1 or 2") chooses none. If several sentences
    mention different images, the sentence that contains ``name`` decides, otherwise the first mention.

    Args:
        text: the answer of a model.
        count: number of images; a larger number is not a valid choice.
        name: name of the identity that is looked for.

    Returns:
        Number of the chosen image, starting at 1; None if the text chooses none, or more than one.
    """
    text = plain_answer(text)
    for candidate in (last_answer(text), text):
        value = _choice(candidate, name)
        if value is not None:
            return value if 0 < value <= (value if count is None else count) else None
    return None


def parse_letter(text: str, *, count: int | None = None) -> str | None:
    """Parse the chosen option, "A", "B", ..., by the rules of :func:`parse_image_number`."""
    number = parse_image_number(text, count=count)
    return None if number is None or number > 26 else "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[number - 1]


def parse_yes_no(text: str) -> bool | None:
    """True for yes, False for no, None if ``text`` contains neither.

    The first matching word decides: "Yes, that is Kate, not Tom" is yes, "I don't see her" is no. The text after "the
    answer is" takes precedence.
    """
    text = plain_answer(text)
    for candidate in (last_answer(text), text):
        word = _YES_OR_NO.search(candidate)
        if word:
            return word["yes"] is not None
    return None


def _choice(text: str, name: str) -> int | None:
    alone = _ALONE.fullmatch(text) or _LEADING.match(text)
    if alone:
        return _value(alone["value"])
    mentions = _mentions(text)
    affirmed = [mention for mention in mentions if not mention.denied]
    if not mentions:
        said = _SAID.search(text)
        return _value(said["value"]) if said else None
    if not affirmed:
        said = re.search(rf"(?:\bbut(?: it is| in)?|而是)\s*({_CARDINAL}|[{_CHINESE}])(?!\w)", text, re.IGNORECASE)
        return _value(said[1]) if said else None
    if name and len({mention.value for mention in affirmed}) > 1:
        with_name = {mention.value for mention in _in_sentences_with(name, text, affirmed)}
        if len(with_name) == 1:
            return with_name.pop()
    group = [affirmed[0].value]
    for mention in affirmed[1:]:
        if not mention.joined:
            break
        group.append(mention.value)
    return group[0] if len(set(group)) == 1 else None


def _mentions(text: str) -> list[_Mention]:
    clauses, negations = list(_CLAUSE.finditer(text)), list(_NO_BEFORE.finditer(text))
    turns = [match.start() for match in _NEXT.finditer(text)]
    found: list[_Mention] = []
    position = 0
    while match := _MENTION.search(text, position):
        values = [(_value(next(filter(None, match.groups()))), match.start(), match.end())]
        end = match.end()
        while more := _MORE.match(text, end):
            values.append((_value(more[1]), more.start(1), more.end()))
            end = more.end()
        joined = bool(found) and _JOINED.fullmatch(text, found[-1].end, match.start()) is not None
        # "not image 1" or "image 1 is not her", within the clause
        clause = _last_before(match.start(), clauses)
        negation = _last_before(match.start(), negations)
        denied_before = negation is not None and negation.start() >= (clause.end() if clause else 0)
        turn = bisect_left(turns, end)
        clause_end = turns[turn] if turn < len(turns) else len(text)
        denied = denied_before or _NO_AFTER.match(text, end, clause_end) is not None
        if joined and found[-1].denied and not _NO_AFTER.match(text, end):
            denied = True
        for number, (value, start, stop) in enumerate(values):
            found.append(_Mention(value, start, stop, denied, joined=joined or number > 0))
        position = end
    return found


def _last_before(position: int, matches: list[re.Match]) -> re.Match | None:
    """The last match that ends at or before ``position``."""
    number = bisect_right(matches, position, key=re.Match.end)
    return matches[number - 1] if number else None


def _in_sentences_with(name: str, text: str, mentions: list[_Mention]) -> list[_Mention]:
    """The mentions in a sentence that contains ``name``."""
    marks = [match.start() for match in re.finditer(r"[.;\n。;]", text)]
    has_name: dict[tuple[int, int], bool] = {}
    found = []
    for mention in mentions:
        first, last = bisect_left(marks, mention.start), bisect_left(marks, mention.end)
        span = (marks[first - 1] + 1 if first else 0, marks[last] if last < len(marks) else len(text))
        if span not in has_name:
            has_name[span] = name.lower() in text[slice(*span)].lower()
        if has_name[span]:
            found.append(mention)
    return found


def _value(text: str) -> int:
    # Patterns that ignore case take the Turkish letters (dotless i, dotted I) for an i.
    text = text.replace("\u0131", "i").replace("\u0130", "i").lower()
    digits = re.search(r"\d+", text)
    return int(digits[0]) if digits else _VALUE[text]
