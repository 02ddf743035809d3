"""Lines that introduce identities: "Kate is <image>", "Kate is <image>, Tom is <image>", "小明是<image>"."""

import re
from collections.abc import Sequence
from typing import NamedTuple

_SPACE = " \t\r\n\u00a0\u3000"
_SEPARATORS = _SPACE + ",;.&，；、。"  # noqa: RUF001
_AND = re.compile(r"and\b\s*+", re.IGNORECASE)
_CHINESE_AND = re.compile(r"(?:和|与|以及|及)\s*+")  # a name may begin with 和 after a comma

# What may end the text before an introduction on the same line: not the comma in "Guadalajara,_Mexico" nor the dot in
# "Dr. Kate".
_BREAK = re.compile(r"[,;:!?]\s|[，；：、。！？]|(?<!\w)\w{4,}+\.\s")  # noqa: RUF001

_MAX_WORDS = 8

_DETERMINER = re.compile(r"(?:the|an?|my|your|his|her|its|our|their)\s", re.IGNORECASE)
_NO_NAME = re.compile(
    r"it|this|that|these|those|here|there|he|she|they|who|what|which|where|"
    r"(?:this|that|these|those)\s.*|"
    r"(?:the\s)?(?:image|picture|photo|figure|scene|frame)(?:\s?\d+)?|"
    r"the\s(?:(?:first|second|third|next|last|following|other|correct|right|left)\s)?"
    r"(?:image|picture|photo|figure|scene|frame|answer|result|option|one|person|people|man|woman|boy|girl|child)|"
    r"an?\s(?:image|picture|photo|person|man|woman|boy|girl|child)|"
    r"[这那此该](?:是|里|儿|边)?|[这那该](?:一|两|几)?[个位张幅只条名些种].*|"
    r"[他她它谁]们?|什么|哪(?:里|儿|个|位|张|一.*)|答案|结果|"
    r"(?:第.{1,2}[张幅个])?(?:图|图片|图像|照片|画面|场景)\s?[\d一二三四五六七八九十]{0,3}",
    re.IGNORECASE | re.DOTALL,
)

# Names such as <sks>, but no tag of Qwen-VL.
_NAME = re.compile(r"(?:[^<>]|<(?!(?:ref|box|quad|img)>)[\w-]+>)*+")


class Introduction(NamedTuple):
    """A line that introduces identities.

    Attributes:
        names: the name of each image of the line.
        rest: text at the beginning of the line that is no part of the introduction ("Given some people,").
    """

    names: list[str]
    rest: str


def reads_as_name(text: str) -> bool:
    """Whether the line "text is <image>" introduces an identity. "This", "This person" and "The image" do not."""
    return bool(text.strip()) and not _NO_NAME.fullmatch(text.strip())


def read_introduction(texts: Sequence[str]) -> Introduction | None:
    """Return the identities that a line introduces, or None if it is not an introduction as a whole.

    Every image of the line must follow "NAME is" or "NAME是", or another image of the same identity. Punctuation, "and"
    and "和" may stand between them. Text may precede the first name if a punctuation mark separates it.

    Args:
        texts: the text before the first image of a line, between its images, and after the last one.
    """
    names: list[str] = []
    if len(texts) < 2 or texts[-1].strip(_SEPARATORS + "!！"):  # noqa: RUF001
        return None
    rest, name = _split(texts[0])
    for number, text in enumerate(texts[:-1]):
        if number:
            text = text.strip(_SPACE)
            and_ = _CHINESE_AND.match(text) or _AND.match(text.lstrip(_SEPARATORS))
            text = text.lstrip(_SEPARATORS) if and_ is None else and_.string[and_.end() :]
            if text:
                before, name = _split(text)
                name = None if before else name
        if name is None:
            return None
        names.append(name)
    return Introduction(names, rest)


def _split(text: str) -> tuple[str, str | None]:
    """Split "TEXT, NAME is" into the text and the name; the name is None if there is none."""
    text = text.rstrip(_SPACE)
    if text.endswith("是"):
        stem = text[:-1]
    elif text.endswith("is") and text[-3:-2] in tuple(_SPACE):
        stem = text[:-2]
    else:
        return "", None
    stem = stem.strip(_SPACE)
    start = max((match.end() for match in _BREAK.finditer(f" {stem}")), default=1) - 1
    rest, name = stem[:start].rstrip(_SPACE), stem[start:].strip(_SPACE)
    rest = rest if rest.strip(_SEPARATORS) else ""
    if start:
        name = _AND.sub("", name, count=1) if _AND.match(name) else name
    if len(name.split()) > _MAX_WORDS or not reads_as_name(name) or not _NAME.fullmatch(name):
        return rest, None
    if rest and _DETERMINER.match(name):  # "In the second scene, the answer is <image>"
        return rest, None
    return rest, name
