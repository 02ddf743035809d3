"""Parse the text of an answer: the number of an image, the letter of an option, yes or no, a refusal.

Boxes are parsed by :class:`idavlm.models.BoxFormat`.
"""

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from typing import Any

from idavlm.utils.answer_text import answer_parts, contains_name, json_field, json_text, plain_answer, without_markdown
from idavlm.utils.json_text import find_json

_ONES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_FOREIGN_ORDINALS = {
    1: "primer[oa]?|premi[eè]re?|erste[nrs]?|primeir[oa]|prim[oa]",
    2: "segund[oa]|deuxi[eè]me|zweite[nrs]?|second[ao]e?",
    3: "tercer[oa]?|troisi[eè]me|dritte[nrs]?|terceir[oa]|terz[oa]",
    4: "cuart[oa]|quatri[eè]me|vierte[nrs]?|quart[oa]",
}
_HAN = "一二三四五六七八九十"
_ROMAN = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii")
_VALUE = {
    **{word: number for words in (_ONES, _ORDINALS, _ROMAN, _HAN) for number, word in enumerate(words, 1)},
    "两": 2,
    **{word: number for number, word in enumerate("첫두세네", 1)},
    **{letter: number for number, letter in enumerate("abcdefgh", 1)},
}
# Lower-case letters are words more often than choices ("in the picture a woman ..."), and "I" is a pronoun.
_OPTION = r"(?-i:[B-H]|A(?!\s+(?!(?:and|or|nor|but|is|was|because|since|as|not|rather)\b)[a-z]))(?![\w'])"
_LETTER = r"(?:(?-i:[A-H])|(?-i:II|III|IV|V|VI|VII|VIII)|(?-i:I)(?=\s*(?:[.,;:)!]|\Z)))(?![\w'])"
_CARDINAL = rf"(?:\d{{1,2}}(?![\d.]*\d|\s*%)|{'|'.join(_ONES)})"
_NOUN = (
    r"(?:(?:pictures?|images?|photo(?:graph)?s?|pics?|imgs?|options?|choices?|candidates?|figures?|panels?|numbers?|no\.?"
    r"|im[aá]gen(?:es)?|im[aá]ge[mn]s?|fotos?|opci[oó]n|op[cç][aã]o|bild(?:er)?|immagine|изображени[еи]|фото|картинка"
    r"|الصورة|الخيار|तस्वीर|छवि|hình|ảnh)(?!\w)|(?:pictures?|images?|photos?|imgs?)(?=[\d_]))"
)
# Possessive quantifiers keep these patterns linear: text that does not match is not tried in other ways.
_MENTION = re.compile(
    rf"(?<!\w)(?<!reference )(?<!reference\n){_NOUN}[\s_-]*+(?:is\s++)?(?:#|n[or]\.?|n°|number|رقم|:|\()?\s*+[\"'(\[]*+"
    rf"(?P<noun>{_CARDINAL}(?![^\W_])|{_LETTER})"
    rf"|\b(?P<ordinal>{'|'.join(_ORDINALS)}|\d{{1,2}}(?:st|nd|rd|th))\b(?!\s+(?:reference|person|woman|man|character))"
    + "".join(rf"|\b(?P<ordinal{number}>{words})\s+{_NOUN}" for number, words in _FOREIGN_ORDINALS.items())
    + rf"|(?:图片?|图像|照片|选项|選択肢|画像|写真|写眞|이미지|사진|第)\s*+[#:(]?+\s*+"
    rf"(?P<asian>\d{{1,2}}|[{_HAN}两]|(?-i:[A-H]))(?![\da-z])"
    rf"|(?P<counted>\d{{1,2}}|[{_HAN}两])\s*+(?:枚目|番目|番|번째|번)|(?P<native>[첫두세네])\s*+번째"
    rf"|(?P<option>[A-H])\s*+(?:选项|项)"
    rf"|(?P<hash>#\s*+\d{{1,2}})(?!\w)"
    r"|[(\[](?P<bracketed>\d{1,2}|[a-h])[)\]]"
    # A number or letter at the start of a line or clause, with its verdict: "2: yes", "| 2 | no |", "A is wrong".
    r"|(?:^|(?<=[\n.;,]))[\s|-]*+(?P<judged>\d{1,2}|(?-i:[A-H]))(?=\s*(?:[:|)-][\s:]*+|(?:is|are)\s)\s*(?:the\s)?"
    r"(?:yes|no|not|true|false|right|wrong|correct|incorrect|match|different|other|same)\b)",
    re.IGNORECASE,
)
# A bare number or letter: after one of these words or at the start of a clause, and before the end of a clause or one
# of the words that follow a verdict.
_BARE = re.compile(
    r"(?:(?:^|[.;:,!?(\n]|\b(?:is|be|it's|choose|pick|select|say|go with|guess|prefer|than|not|nor|neither|either|both"
    r"|between|and|or|so|but|definitely|probably|elijo|choisis|wähle|escolho|scelgo|выбираю|es|est|ist|la|el|le|é)(?=\s))\s*+(?:[\"'(\[]|option\s|letter\s)?+"
    r"|(?:选|选择|是|应为|为|는|은|は)\s*+[「『]?)"
    rf"(?P<value>{_CARDINAL}|(?-i:[A-H])|[{_HAN}])[)\]\"'」』]?"
    r"(?=\s*(?:[.,;:!?)\n。、]|\Z|\b(?:because|since|as|is|are|was|and|or|nor|rather|but|not|seems|instead)\b)"
    r"|[选项是不和或だで입])",
    re.IGNORECASE,
)
_MORE = re.compile(
    rf"\s*+(?:,|/|&|、|\band\b|\bor\b|\bnor\b|和|或|,\s*+(?:and|or))\s*+(?:and\s++|or\s++)?"
    rf"({_CARDINAL}(?!\w)|{_OPTION}|[{_HAN}](?=[、和或,\s不]))",
    re.IGNORECASE,
)
_ALONE = re.compile(
    rf"[\s\"'(\[#<【「→]*(?P<value>{_CARDINAL}|[a-h]|[{_HAN}])(?!\w)[\s\"'.)\]:>!。,】」]*", re.IGNORECASE
)
_LABEL = re.compile(r"^[\s\"'(\[]*(?P<value>\d{1,2}|[A-Ha-h])(?:[.):\]]+\s+|\s*-\s+)(?=\S)", re.MULTILINE)
_JOINED = re.compile(r"\s*+(?:,\s*+)?(?:and|or|nor|/|,|或|和)\s*+(?:(?:in|the)\s++)*+", re.IGNORECASE)
_CLAUSE = re.compile(r"[.;!?。\n,]|\bbut(?![a-z\d_])|\bwhile\b|而是")
# Within the clause before a mention.
_NO_BEFORE = re.compile(
    r"\b(?:not|isn't|no|neither|nor|never|cannot be|can't be|rather than|instead of|except|unlike|excluding|exclude"
    r"|rule out|ruled out|eliminate|different from|other than)(?![a-z\d_])|不是|并非|不在|而非|排除",
    re.IGNORECASE,
)
# Directly after a mention.
_NO_AFTER = re.compile(
    r"(?:|[^.;!?\n]{0,30}?\b)(?:not(?!\s*+(?:in\s*+)?\Z)|isn't|aren't|doesn't|don't|cannot|can't|"
    r"(?:is|are) (?:wrong|incorrect|false)|is someone else|is another|"
    r"(?:shows?|is of|are of) (?:another|someone else|somebody else|a different|different|others?))\b"
    r"|[\s\"')]*+[:\-|][\s|]*+(?:no|not|false|wrong|incorrect|different|another|someone else|somebody else|other)\b"
    r"|[^.;!?\n]{0,20}?\b(?:une autre|otra|outra|eine andere|другой|другая)\b"
    r"|[\s\"')]*+\?(?!\s*yes\b)"
    r"|[^。;]{0,6}(?:不是|并非|没有|不对)|[^。;,]{0,3}(?:另一|别的|其他|別人|別の|違)",
    re.IGNORECASE,
)
# Where the text after a mention turns to another image: "image 4, not image 1", "image 3 (not 1 or 2)".
_NEXT = re.compile(
    r"[.;!\n(]|\bbut\b|(?<![a-z_])(?:image|picture|photo|option)s?\b|图|,\s*(?:and\s+)?not\b|\band not\b"
    r"|\b(?:rather than|instead of|unlike)\b|而不是|,\s*不是|不是(?=图|第|照片|选项)",
    re.IGNORECASE,
)
# What makes a mention a verdict, within its clause.
_CUE = re.compile(
    r"\b(?:match(?:es|ed)?|same|choose|pick|select|go with|say|guess|answer|so|therefore|thus|hence|conclude"
    r"|must be|should be|definitely|clearly|likely|yes|right|correct|true|it is|it's|is in|appears? in|is shown in"
    r"|found in|visible in|located in)\b|才是|应该|选",
    re.IGNORECASE,
)
_CHOICE_KEYS = re.compile(
    r"(?:selected|chosen|best|matching)?[_ ]?(?:choice|option|letter|image|picture|photo|match|result|index|number)"
    r"(?:[_ ]?(?:number|index|id|no))?|答案|选项"
)


@dataclass(frozen=True)
class _Mention:
    value: int
    start: int
    place: int
    """Where the number or letter starts."""
    end: int
    denied: bool
    joined: bool
    """Whether the mention continues a list, such as the 2 of "Image 1 or 2"."""


def parse_image_number(text: str, *, count: int | None = None, name: str = "") -> int | None:
    r"""Parse which of several numbered images ``text`` chooses.

    Thinking does not count. The first of these that is there decides: the content of ``<answer>`` or ``\boxed{}``, the
    answer field of JSON, the text after the last "the answer is", the whole text. In this text a choice is a number or
    letter alone, after a noun ("Picture 3", "image three", "Option C", "Bild 2"), an ordinal ("the third one"), or a
    form of Chinese, Japanese and Korean (图三, 第3张, 3番目).

    Negated mentions are ignored: "Image 4, not Image 1" and "It is not Image 1, 2 or 3 but 4" choose 4. A list of
    alternatives ("Image 1 or 2") chooses none. If the text mentions several images, a sentence that contains ``name``
    decides, then the last mention in a clause with a word such as "matches" or "choose"; without one, none is chosen.

    Args:
        text: the answer of a model.
        count: number of images; a larger number is not a valid choice.
        name: name of the identity that is looked for.

    Returns:
        Number of the chosen image, starting at 1; None if the text chooses none, or more than one.
    """
    for part in _parts(text, _CHOICE_KEYS):
        key = _key_of_yes(part)
        value = _choice(part if key is None else key, name)
        if value is not None:
            return value if 0 < value <= (value if count is None else count) else None
        if is_refusal(part):
            return None
    return None


def parse_letter(text: str, *, count: int | None = None) -> str | None:
    """Parse the chosen option, "A", "B", ..., by the rules of :func:`parse_image_number`."""
    number = parse_image_number(text, count=count)
    return None if number is None or number > 26 else "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[number - 1]


def _parts(text: str, keys: re.Pattern) -> list[str]:
    """The parts of an answer in which to look for a verdict, without markup."""
    text = _TICK_BEFORE_LABEL.sub("\\1\n", without_markdown(plain_answer(text)))  # "A) ✗ B) ✓": one line each
    parts = answer_parts(text.translate(_TICKS))
    field = json_field(parts[-1], keys)
    return parts if field is None else answer_parts(json_text(field))


def _key_of_yes(text: str) -> str | None:
    """The only key whose value is yes in a JSON object whose values are all yes or no; None without such an object."""
    for _, _, value in reversed(find_json(text)):
        if isinstance(value, dict) and len(value) > 1:
            said = {key: _is_yes(content) for key, content in value.items()}
            if None not in said.values():
                right = [key for key, is_right in said.items() if is_right]
                return right[0] if len(right) == 1 else ""
    return None


def _is_yes(value: Any) -> bool | None:
    if isinstance(value, str):
        return {"yes": True, "true": True, "no": False, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def _choice(text: str, name: str) -> int | None:
    alone = _ALONE.fullmatch(text)
    if alone:
        return _value(alone["value"])
    labels = list(_LABEL.finditer(text))
    if len(labels) == 1 and not text[: labels[0].start()].strip():
        return _value(labels[0]["value"])
    mentions = _mentions(text, _MENTION)
    starts = [mention.start for mention in mentions]
    for bare in _mentions(text, _BARE):
        before = bisect_left(starts, bare.end) - 1
        if before < 0 or mentions[before].end <= bare.start:
            mentions.append(bare)
    groups: list[list[_Mention]] = []
    for mention in sorted((one for one in mentions if not one.denied), key=lambda one: one.start):
        if mention.joined and groups:
            groups[-1].append(mention)
        else:
            groups.append([mention])
    if name and len(groups) > 1:
        groups = _in_sentences_with(name, text, groups) or groups
    if len({mention.value for group in groups for mention in group}) > 1:
        groups = _with_cue(text, groups, sorted(mention.start for mention in mentions))[-1:] or groups
    values = {mention.value for group in groups for mention in group}
    return values.pop() if len(values) == 1 else None


def _mentions(text: str, pattern: re.Pattern) -> list[_Mention]:
    clauses, negations = list(_CLAUSE.finditer(text)), list(_NO_BEFORE.finditer(text))
    turns = [match.start() for match in _NEXT.finditer(text)]
    found: list[_Mention] = []
    position = 0
    while match := pattern.search(text, position):
        group = match.lastgroup
        value = int(group[-1]) if group.startswith("ordinal") and group[-1].isdigit() else _value(match[group])
        values = [(value, match.start(), match.start(group), match.end())]
        end = match.end()
        while more := _MORE.match(text, end):
            values.append((_value(more[1]), more.start(1), more.start(1), more.end()))
            end = more.end()
        joined = (
            bool(found)
            and _JOINED.fullmatch(text, found[-1].end, match.start(group) if pattern is _BARE else match.start())
            is not None
        )
        # "not image 1" or "image 1 is not her", within the clause; the "no" of "image no 1" denies nothing
        clause = _last_before(match.start(group), clauses)
        negation = _last_before(match.start(group) if pattern is _BARE else match.start(), negations)
        denied_before = negation is not None and negation.start() >= (clause.end() if clause else 0)
        turn = bisect_left(turns, end)
        clause_end = turns[turn] if turn < len(turns) else len(text)
        denied_after = _NO_AFTER.match(text, end, clause_end) is not None
        denied = denied_before or denied_after or (joined and found[-1].denied)
        if joined and denied_after:  # "image 1 and image 2 do not show her"
            found[-1] = replace(found[-1], denied=True)
        for number, span in enumerate(values):
            found.append(_Mention(*span, denied=denied, joined=joined or number > 0))
        position = end
    return found


def _last_before(position: int, matches: list[re.Match]) -> re.Match | None:
    """The last match that ends at or before ``position``."""
    number = bisect_right(matches, position, key=re.Match.end)
    return matches[number - 1] if number else None


def _in_sentences_with(name: str, text: str, groups: list[list[_Mention]]) -> list[list[_Mention]]:
    """The groups of mentions in a sentence that contains ``name``."""
    marks = [match.start() for match in re.finditer(r"[.;\n。]", text)]
    spans = [_between(marks, group, len(text)) for group in groups]
    has_name = {span: contains_name(text[slice(*span)], name) for span in set(spans)}
    return [group for group, span in zip(groups, spans, strict=True) if has_name[span]]


def _with_cue(text: str, groups: list[list[_Mention]], starts: list[int]) -> list[list[_Mention]]:
    """The groups of mentions in a clause that says which image it is, or that consists of them.

    What follows in the sentence, up to the next mention, belongs to the clause. ``starts`` are those of all mentions.
    """
    marks = [match.start() for match in _CLAUSE.finditer(text)]
    ends = sorted([match.start() for match in re.finditer(r"[.;!?\n。]", text)] + starts)
    spans = []
    for group in groups:
        after = bisect_left(ends, group[-1].end)
        spans.append((_between(marks, group, len(text))[0], ends[after] if after < len(ends) else len(text)))
    has_cue = {span: _CUE.search(text, *span) is not None for span in set(spans)}
    found = []
    for group, (start, end) in zip(groups, spans, strict=True):
        around = text[start : group[0].start] + text[group[-1].end : end]
        if has_cue[start, end] or not any(map(str.isalnum, around)):
            found.append(group)
    return found


def _between(marks: list[int], group: list[_Mention], length: int) -> tuple[int, int]:
    """Start and end of the text between two of the ``marks`` that contains a group of mentions."""
    first, last = bisect_right(marks, group[0].place), bisect_left(marks, group[-1].end)
    return marks[first - 1] + 1 if first else 0, marks[last] if last < len(marks) else length


def _value(text: str) -> int:
    # Patterns that ignore case take the Turkish letters (dotless i, dotted I) for an i.
    text = text.replace("\u0131", "i").replace("\u0130", "i").lower()
    digits = re.search(r"\d+", text)
    return int(digits[0]) if digits else _VALUE[text]


_YES = (
    "yes|yeah|yep|yup|true|correct|affirmative|absolutely|definitely|certainly|indeed|of course|sure"
    "|是|是的|对|对的|有|在|はい|ええ|네|예|그렇습니다|sí|si|oui|ja|да|sim|sì|نعم|हाँ|हां|जी हाँ|ใช่|có|evet|ya"
)
_NO = (
    "no|nope|nah|false|incorrect|negative|不|不是|不是的|没有|没|否|不对|不在|いいえ|違います|아니요|아니오|아닙니다"
    "|non|nein|нет|não|لا|नहीं|जी नहीं|ไม่|ไม่ใช่|không|hayır|tidak"
)
_LEAD = (
    r"(?:that's|that is|it's|it is|this is|the (?:statement|claim|answer) is|so|but|and|well|hmm|ok|okay|then|answer)"
    r"\s+"
)
_YES_CLAUSE = re.compile(
    rf"\W*(?:{_LEAD})*(?:{_YES})\W*|\W*(?:yes|yeah|yep)\b.*|.*\b(?:yes|yeah|yep)\W*", re.IGNORECASE | re.DOTALL
)
_NO_CLAUSE = re.compile(rf"\W*(?:{_LEAD})*(?:{_NO})\W*|.*\b(?:no|nope)\W*", re.IGNORECASE | re.DOTALL)
_TICKS = str.maketrans(dict.fromkeys("✅✔☑✓", ": yes") | dict.fromkeys("❌✗✘❎✖", ": no"))
_TICK_BEFORE_LABEL = re.compile(r"(?<=\S)([ \t]*[✅✔☑✓❌✗✘❎✖])[ \t]+(?=[(\[]?(?:[A-H]|\d{1,2})[).:\]])")
_YES_OR_NO = re.compile(
    r"\byes\s*(?:or|and|/|nor)\s*no\b|\bno\s*(?:or|and|/)\s*yes\b|是否|是不是|有没有", re.IGNORECASE
)
_CLAUSES = re.compile(r"[.,;:!?\n。、।()]+|\s-\s")
_SENTENCES = re.compile(r"[.!?\n。।]+")
_CONCLUSION = re.compile(
    r"\W*(?:so|therefore|thus|hence|in conclusion|overall|in summary|所以|因此|总之)\b", re.IGNORECASE
)
_THAT = re.compile(
    r"(?P<head>.*?)\b(?P<word>true|correct|false|incorrect|wrong|untrue|no doubt|no question|clear|obvious|evident)"
    r"\s+that\s(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_NEGATION = re.compile(
    r"\b(?:no|not|never|none|nobody|no one|neither|nor|cannot|absent|nowhere|missing)\b|n't\b"
    r"|\b(?:nicht|kein\w*|não|nunca|non|ne|pas|aucune?|не|нет|không|tidak|değil)\b|\bn'(?=[eé])"
    r"|不|没|無|ない|ません|없|아니|아닙|ليس|नहीं|ไม่"
    r"|\A\W*(?:it|this|that|he|she)(?:'s| is| was)\s+(?:\w+\s+)?(?:a different|another|someone else|somebody else)\b",
    re.IGNORECASE,
)
_AFFIRMATION = re.compile(
    r"\b(?:is|are|was)\s+(?:\w+\s+)?(?:in|on|at|here|there|visible|present|shown|depicted|pictured)\b"
    r"|\bappears\b|\bcan be (?:seen|found)\b|\bi (?:can )?(?:see|spot)\b|\bi (?:think|believe|guess) so\b"
    r"|看到|看见|出现|在(?:图|照|画|里|这|左|右|中)|(?:图|照片|画面)[片像]?[中里上]?有(?![没一两几个人])",
    re.IGNORECASE,
)
_PRESENCE_KEYS = re.compile(
    r"(?:is_)?(?:present|visible|found|match|exists|contains|included|recognized|there|here|same_person|result"
    r"|decision)|答案"
)
_UNABLE = (
    r"can't|cannot|can not|couldn't|could not|(?:un|not )able|impossible|not possible|don't|do not|doesn't|does not"
    r"|won't|will not|would rather not|refuse|decline|difficult|hard|not allowed|not permitted"
)
_TO_KNOW = (
    r"identify|identified|identifying|recogni[sz]e|tell|say|determined?|know|confirm|verify|verified|assist|help|answer"
    r"|provide|disclose|discern|judge|comply|be sure|be certain|comfortable|ability"
)
_ENOUGH = r"(?:enough|sufficient) (?:information|context|detail|evidence)"
_REFUSALS = (
    # English
    rf"\b(?:{_UNABLE})(?:\s+(?!but\b)\w+){{0,3}}?\s+(?:{_TO_KNOW}|{_ENOUGH})\b",
    rf"\bnot\s+(?:\w+\s+)?(?:sure|certain|comfortable|{_ENOUGH})\b",
    r"\b(?:unsure|unclear|uncertain|undetermined|indeterminate|no idea|insufficient information|is unknown)\b",
    r"\A\W*(?:it is |it's )?(?:unknown|n/a|not applicable)\W*\Z",
    # Chinese
    r"不知道|不清楚|不确定|不能(?:确定|确认)|无法(?!看到|看见|找到)|不能(?:识别|辨认|判断|回答|透露)|看不清|看不出",
    r"难以(?:判断|确定|辨认|识别)",
    # Japanese
    r"(?:分かり|わかり)ません|(?:分から|わから)ない|(?:特定|判断|識別|確認|お答え)(?:することは|は)?でき(?:ません|ない)",
    r"(?:分かり|わかり|お答えし|判断し)かね(?:ます|る)",
    # Korean
    r"모르겠|알 수 없|(?:확인|식별|판단|답변)할 수 없",
    # Spanish
    r"\bno\s+(?:lo\s+)?sé\b|\bno estoy segur",
    r"\bno (?:puedo|es posible)\s+(?:identificar|determinar|saber|decir(?:lo)?|reconocer|responder|ayudar|confirmar)",
    # Portuguese, Italian
    r"\bnão sei\b|\bnão tenho certeza|\bnão (?:posso|consigo)\s+(?:identificar|determinar|dizer|confirmar)",
    r"\bnon (?:lo )?so\b|\bnon sono sicur|\bnon (?:posso|riesco a)\s+(?:identificare|determinare|dire|confermare)",
    # French
    r"\bne sais pas\b|\bne suis pas sûr",
    r"\bne (?:peux|puis) pas\s+(?:identifier|dire|déterminer|reconnaître|répondre|confirmer)",
    # German
    r"\bwei(?:ß|ss)\s+(?:\w+\s+)?nicht\b|\bnicht sicher\b",
    r"\bkann\s+(?:\w+\s+){0,4}?(?:identifizieren|erkennen|beurteilen|bestimmen|bestätigen)\b",
    r"\blässt sich (?:\w+\s+){0,3}?nicht\s+(?:\w+\s+)?(?:erkennen|sagen|beurteilen|bestimmen|feststellen)\b",
    # Russian, Arabic, Hindi, Vietnamese, Thai
    r"\bне знаю\b|\bне уверен|\bне могу\s+(?:определить|сказать|опознать|идентифицировать)",
    r"(?:لا أستطيع|لا يمكنني|لا يمكن)\s+(?:التعرف|تحديد|معرفة|الجزم|القول|الإجابة|التأكد)|لا أعرف|لا أعلم|لست متأكد|"
    r"नहीं पता|पता नहीं|नहीं जानता|không biết|không thể xác định|ไม่ทราบ|ไม่รู้|ไม่แน่ใจ|ไม่สามารถระบุ",
)
_REFUSAL = re.compile("|".join(_REFUSALS), re.IGNORECASE)
_NOTHING = re.compile(r'\s*(?:json\s+)?(?:\[\s*(?:\[\s*\]\s*)?\]|\{\s*(?:"\w+"\s*:\s*\[\s*\]\s*)?\}|null)[\s.]*')


def parse_yes_no(text: str) -> bool | None:
    r"""True for yes, False for no, None if ``text`` says neither.

    The text that counts is found as in :func:`parse_image_number`. The last clause that is a verdict decides: "yes",
    "no", "that is correct", 是的, nein. Without one, a refusal (:func:`is_refusal`) is neither yes nor no. Otherwise
    the first sentence that says or denies something decides, a conclusion ("So it is not Kate") before others: "I don't
    see her" and "It is true that she is not here" are no.
    """
    for part in _parts(text, _PRESENCE_KEYS):
        part = _YES_OR_NO.sub(" ", part)
        verdict = _verdict_clause(part)
        if verdict is not None:
            return verdict
        if is_refusal(part):
            return None
        sentences = _SENTENCES.split(part)
        said = [(_CONCLUSION.match(sentence) is None, _polarity(sentence)) for sentence in sentences]
        said = sorted((one for one in said if one[1] is not None), key=lambda one: one[0])
        if said:
            return said[0][1]
    return None


def is_refusal(text: str) -> bool:
    """Whether ``text`` declines to answer or says that the answer is unknown: "I cannot identify people", "Not sure".

    An answer may hold a verdict as well: "Not sure, but I think yes". "I cannot see her" is no refusal.
    """
    return any(_REFUSAL.search(part) is not None for part in _parts(text, _PRESENCE_KEYS))


def says_absent(text: str) -> bool:
    """Whether ``text`` says that what was asked for is not there: "not here", "None", "I don't see her.", ``[]``.

    The text that counts is found as in :func:`parse_image_number`. A refusal says nothing of the kind, and neither does
    a blank answer. Whether the text holds a box as well is not checked.
    """
    parts = [without_markdown(plain_answer(text)), *_parts(text, _PRESENCE_KEYS)]
    return parse_yes_no(text) is False or any(_NOTHING.fullmatch(part) for part in parts)


def _verdict_clause(text: str) -> bool | None:
    verdict = None
    for clause in _CLAUSES.split(text):
        if _YES_CLAUSE.fullmatch(clause):
            verdict = True
        elif _NO_CLAUSE.fullmatch(clause):
            verdict = False
    return verdict


def _polarity(sentence: str) -> bool | None:
    """Whether a sentence affirms (True) or denies (False) something; None if it does neither."""
    that = _THAT.fullmatch(sentence)
    if that:
        rest = _polarity(that["rest"])
        is_false = that["word"].lower() in ("false", "incorrect", "wrong", "untrue")
        return (rest is not False) != (is_false != (_NEGATION.search(that["head"]) is not None))
    if _NEGATION.search(sentence):
        return False
    return True if _AFFIRMATION.search(sentence) else None
