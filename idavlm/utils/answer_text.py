"""Find the verdict in a model's answer: without thinking and markup, in tags or JSON, after "the answer is"."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from idavlm.utils.json_text import find_json

_THOUGHT_END = (
    r"</(?:think|thinking|thought|reasoning|seed:think)>|\u25c1/think\u25b7|\[/THINK\]|<\|channel\|>final<\|message\|>"
)
_THOUGHT = re.compile(
    rf"(?:<(?:think|thinking|thought|reasoning|seed:think)>|\u25c1think\u25b7|\[THINK\]).*?(?:{_THOUGHT_END}|\Z)",
    re.DOTALL | re.IGNORECASE,
)
_STRAY_THOUGHT_END = re.compile(_THOUGHT_END, re.IGNORECASE)
_END_OF_TURN = re.compile(
    r"<\|(?:im_end|endoftext|eot_id|eom_id|end_of_text|end|return)\|>|</s>|<eos>|<end_of_turn>|<\uff5cend"
)
_PLAIN = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-", "\u2212": "-"}
    | {"\u060c": ",", "\u061b": ";", "\u061f": "?", "\u06d4": "."}  # Arabic punctuation
    | {chr(zero + digit): str(digit) for zero in (0x660, 0x6F0, 0x966, 0x9E6, 0xE50) for digit in range(10)}
    | {"\u02bc": "'", "\u2010": "-", "\u2011": "-", "\u00ad": None}
    | {"\ufe0f": None, "\u20e3": None}  # the code points that turn a digit into an emoji
)
_LATEX_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|tt)?|math(?:bf|rm|it|sf)|operatorname)\s*\{([^{}]*)\}")
_LATEX_SPACE = re.compile(r"\\(?:left|right)(?![a-z])|\\[,;:! ()\[\]]|\$")
_LATEX_INDEX = re.compile(r"_\{\\?(\w+)\}")
_OUTER_UNDERSCORES = re.compile(r"(?<!\w)_+|_+(?!\w)")
_MARKDOWN = re.compile(r"[*`]+|(?<!\w)__?|__?(?!\w)|^[ \t]*#+[ \t]+", re.MULTILINE)
_TAGGED = re.compile(
    r"<(?:final_)?(answer|verdict|score|choice)>(.*?)(?:</(?:final_)?\1>|\Z)|<\|begin_of_box\|>(.*?)(?:<\|end_of_box\|>|\Z)",
    re.DOTALL | re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"[{}]")
_MAX_NESTED = 5
_MARKER = re.compile(
    r"\b(?:answer|ans)\b\s*(?:(?:is|was|would be|should be|must be)\b\s*:?|[:=\n]|-\s)"
    r"|\b(?:respuesta|r[\u00e9e]ponse|antwort|resposta|risposta|\u043e\u0442\u0432\u0435\u0442|\u0111\u00e1p \u00e1n)"
    r"\s*(?:\w+\s*)?(?:\b(?:es|est|ist|lautet|\u00e9|\u00e8)\b\s*:?|:)"
    r"|(?:\u7b54\u6848|\u56de\u7b54|\u7b54\u3048|\u6b63\u89e3)\s*(?:\u662f|\u4e3a|\u5e94\u4e3a|\u9009|\u306f|:)"
    r"|(?:\uc815?\ub2f5)\s*(?:\uc740|:)"
    r"|(?:\u0627\u0644\u0625\u062c\u0627\u0628\u0629|\u0627\u0644\u062c\u0648\u0627\u0628|\u0909\u0924\u094d\u0924\u0930)"
    r"\s*(?:\w+\s*)?(?:\b(?:\u0647\u064a|\u0647\u0648)\b|:)",
    re.IGNORECASE,
)
_ANSWER_KEY = re.compile(r"(?:(?:final|correct|predicted|my|your)[_ ]?)?(?:answer|verdict|prediction)")
# Scripts without spaces between words: Thai, Lao, Myanmar, Khmer, kana, Han.
_NO_SPACES = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_KOREAN_PARTICLE = re.compile(
    r"(?:\uc740|\ub294|\uc774|\uac00|\uc744|\ub97c|\uc758|\uc640|\uacfc|\ub3c4|\ub85c|\uc73c\ub85c|\ub9cc|\uc5d0\uac8c"
    r"|\ud55c\ud14c|\ucc98\ub7fc|\uaed8\uc11c|\uc774\ub2e4|\uc785\ub2c8\ub2e4|\uc600\ub2e4|\uc528|\ub2d8)++(?!\w)"
)


def plain_answer(text: str) -> str:
    """``text`` without thinking, end-of-turn tokens and LaTeX commands, with ASCII digits, brackets and quotes.

    Text up to ``</think>`` is thinking, also if ``<think>`` was part of the prompt. A ``<think>`` that never ends hides
    all that follows.
    """
    text = _THOUGHT.sub(" ", text)
    text = text[_last_end(_STRAY_THOUGHT_END, text) :]
    turn_end = _END_OF_TURN.search(text)
    if turn_end and text[: turn_end.start()].strip():
        text = text[: turn_end.start()]
    text = unicodedata.normalize("NFKC", text).translate(_PLAIN)
    return _LATEX_INDEX.sub(r"_\1", _LATEX_SPACE.sub(" ", _LATEX_TEXT.sub(r"\1", text)))


def without_markdown(text: str) -> str:
    """``text`` without the marks of emphasis, code and headings."""
    return _MARKDOWN.sub("", text)


def answer_parts(text: str) -> list[str]:
    r"""The parts of a plain answer where its verdict may be, the most explicit first.

    The content of ``<answer>`` or ``\boxed{}``, if there is one, is the only part. Otherwise the parts are the text
    after the last "the answer is" or "Answer:", and the whole text.
    """
    inside = _explicit(text)
    if inside is not None:
        return [inside]
    start = _last_end(_MARKER, text)
    return [text[start:], text] if start else [text]


def json_field(text: str, keys: re.Pattern) -> Any:
    """The value of the last JSON object in ``text`` that has a field for the verdict; None without one.

    Fields called "answer", "final_answer", "verdict", ... come first, then those whose whole name matches ``keys``. An
    object of a single field has its verdict there. A value of ``null`` is returned as "".
    """
    for _, _, value in reversed(find_json(text)):
        found = _field(value, (_ANSWER_KEY, keys))
        if found is not None:
            return found
    return None


def json_text(value: Any) -> str:
    """A value of :func:`json_field` as the text of an answer: true is "yes", false is "no"."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else str(value)


def contains_name(text: str, name: str, *, ignore_case: bool = True) -> bool:
    """Whether ``name`` occurs in ``text`` as whole words, in any Unicode normal form.

    A word does not end before a combining mark, which includes the vowel signs of Indic scripts and Thai. In scripts
    without spaces (Chinese, Japanese, Thai, ...) a letter may follow; in Korean a particle may.
    """
    return bool(name.strip()) and next(name_matches(text, [name], ignore_case=ignore_case), None) is not None


def name_matches(text: str, names: Iterable[str], *, ignore_case: bool = True) -> Iterator[str]:
    """Yield the names that occur in ``text`` as in :func:`contains_name`; of overlapping ones, the longest."""
    text = normal_name(text, ignore_case=ignore_case)
    by_spelling = {normal_name(name, ignore_case=ignore_case): name for name in names if name.strip()}
    spellings = sorted((spelling for spelling in by_spelling if spelling in text), key=len, reverse=True)
    if not spellings:
        return
    pattern = re.compile("|".join(map(re.escape, spellings)))
    position = 0
    while match := pattern.search(text, position):
        # Where the longest name is not a word, a shorter one may be: "Ann Lee" in "Ann Leeds".
        spelling = next((one for one in spellings if _is_word(text, match.start(), one)), None)
        if spelling is None:
            position = match.start() + 1
        else:
            yield by_spelling[spelling]
            position = match.start() + len(spelling)


def normal_name(text: str, *, ignore_case: bool = True) -> str:
    """``text`` in the form in which names are compared."""
    text = unicodedata.normalize("NFKC", text).translate(_PLAIN)
    text = _OUTER_UNDERSCORES.sub("", " ".join(text.split()))
    return unicodedata.normalize("NFC", text.casefold()) if ignore_case else text


def _is_word(text: str, start: int, word: str) -> bool:
    if not text.startswith(word, start):
        return False
    end = start + len(word)
    before, after = text[start - 1 : start], text[end : end + 1]
    return _is_edge(before, text[start]) and (
        _is_edge(text[end - 1], after) or _KOREAN_PARTICLE.match(text, end) is not None
    )


def _is_edge(first: str, second: str) -> bool:
    """Whether a word may end between two characters; the outer one may be missing."""
    if not first or not second:
        return True
    if unicodedata.category(second).startswith("M") or first == "\u200c" or second == "\u200c":
        return False
    if _NO_SPACES.match(first) or _NO_SPACES.match(second):
        return True
    return not (_in_word(first) and _in_word(second))


def _in_word(character: str) -> bool:
    return character == "_" or unicodedata.category(character)[0] in "LMN"


def _last_end(pattern: re.Pattern, text: str) -> int:
    """Where the last match ends; 0 without one."""
    return max((match.end() for match in pattern.finditer(text)), default=0)


def _explicit(text: str) -> str | None:
    r"""Content of the last ``<answer>``, ``\boxed{}`` or similar that is not empty; the innermost of nested ones."""
    inside = None
    for _ in range(_MAX_NESTED):
        found = [(match.start(), match[2] or match[3] or "") for match in _TAGGED.finditer(text)] + _boxed(text)
        found = [content for content in found if content[1].strip()]
        if not found:
            break
        inside = text = max(found)[1]
    return inside


def _boxed(text: str) -> list[tuple[int, str]]:
    r"""Start and content of each ``\boxed{}`` that is not within another one; braces may be nested."""
    found, position = [], 0
    while opening := _BOXED.search(text, position):
        depth, end = 1, len(text)
        for brace in _BRACE.finditer(text, opening.end()):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                end = brace.start()
                break
        found.append((opening.start(), text[opening.end() : end]))
        position = end
    return found


def _field(value: Any, keys: Sequence[re.Pattern]) -> Any:
    if isinstance(value, list):
        return _field(value[0], keys) if len(value) == 1 else None
    if not isinstance(value, dict):
        return None
    for pattern in keys:
        for key, content in value.items():
            if pattern.fullmatch(key.lower()):
                return _scalar_of(content, keys)
    return _scalar_of(next(iter(value.values())), keys) if len(value) == 1 else None


def _scalar_of(content: Any, keys: Sequence[re.Pattern]) -> Any:
    """A field's content, or the field for the verdict of the object in it."""
    if content is None:
        return ""
    if isinstance(content, dict):
        return _field(content, keys)
    if isinstance(content, list):
        return _scalar_of(content[0], keys) if len(content) == 1 else ""
    return content
