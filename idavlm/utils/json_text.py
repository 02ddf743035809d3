"""Read JSON as models write it: within other text, cut off, with single quotes, trailing commas or comments."""

import json
import re
from typing import Any

_MAX_DEPTH = 50
_OPENING = re.compile(r"[\[{]")
_SPACE = re.compile(r"(?:\s++|//[^\n]*+|#[^\n]*+)*+")
# Possessive quantifiers, and strings that also end with the text: each character is read once.
_TOKEN = re.compile(
    r"(?P<bracket>[\[\]{}])|(?P<mark>[:,])"
    r'|"(?P<double>(?:[^"\\]|\\.)*+)(?:"|\\?\Z)'
    r"|'(?P<single>(?:[^'\\]|\\.)*+)(?:'|\\?\Z)"
    r"|(?P<number>[-+]?(?:\d++(?:\.\d*+)?+|\.\d++)(?:[eE][-+]?\d++)?+)(?![\w%.])"
    r"|(?P<word>-?[^\W\d]\w*+)",
    re.DOTALL,
)
_CONSTANTS = {
    "true": True, "false": False, "null": None, "True": True, "False": False, "None": None, "NaN": float("nan"),
    "Infinity": float("inf"), "-Infinity": float("-inf"),
}  # fmt: skip


def find_json(text: str) -> list[tuple[int, int, Any]]:
    """Objects and arrays in ``text`` that are not empty, each with its start and end.

    Valid JSON is read as :func:`json.loads` reads it. Text that ends too early keeps what is there. Where the syntax
    breaks, the innermost object or array is dropped, and what was complete is kept. Nesting deeper than 50 is not read.
    """
    found: list[tuple[int, int, Any]] = []
    position = 0
    while opening := _OPENING.search(text, position):
        start = opening.start()
        position, value = _read(text, start)
        if value:
            found.append((start, position, value))
    return found


def _read(text: str, start: int) -> tuple[int, Any]:
    """The value that starts with the bracket at ``start``, and the position after it."""
    stack: list[_Container] = []
    position = start
    while True:
        position = _SPACE.match(text, position).end() if stack else position
        token = _TOKEN.match(text, position)
        if token is None:
            at_end = position == len(text)
            return position, _close(stack, keep_last=at_end)
        kind, value = token.lastgroup, token[token.lastgroup]
        if kind == "bracket" and value in "[{":
            if stack and (len(stack) == _MAX_DEPTH or not stack[-1].takes_value):
                return position, _close(stack, keep_last=False)
            stack.append(_Container([] if value == "[" else {}))
        elif kind == "bracket":
            if isinstance(stack[-1].content, list) != (value == "]"):
                return position, _close(stack, keep_last=False)
            content = stack.pop().content
            if not stack:
                return token.end(), content
            stack[-1].add(content)
        elif kind == "mark":
            if not stack[-1].separate(value):
                return position, _close(stack, keep_last=False)
        elif not stack[-1].scalar(kind, value):
            return position, _close(stack, keep_last=False)
        position = token.end()


class _Container:
    """An object or array that is being read."""

    def __init__(self, content: dict | list):
        self.content = content
        self.key: str | None = None  # a key of an object, before its value
        self.has_colon = False
        self.is_full = False  # a value was read, a comma follows

    @property
    def takes_value(self) -> bool:
        return not self.is_full and (isinstance(self.content, list) or self.has_colon)

    def add(self, value: Any) -> None:
        if isinstance(self.content, list):
            self.content.append(value)
        else:
            self.content[self.key] = value
            self.key, self.has_colon = None, False
        self.is_full = True

    def separate(self, mark: str) -> bool:
        """Read a comma or colon; False if it does not belong here."""
        if mark == ":":
            is_valid = self.key is not None and not self.has_colon
            self.has_colon = is_valid
            return is_valid
        is_valid, self.is_full = self.key is None, False
        return is_valid

    def scalar(self, kind: str, text: str) -> bool:
        """Read a string, number or word; False if it does not belong here."""
        if self.takes_value:
            if kind == "word" and text not in _CONSTANTS:
                return False
            self.add(_CONSTANTS[text] if kind == "word" else _scalar(kind, text))
            return True
        if isinstance(self.content, list) or self.is_full or self.key is not None:
            return False
        self.key = text if kind in ("word", "number") else _scalar(kind, text)
        return True


def _close(stack: list[_Container], *, keep_last: bool) -> Any:
    """The outermost value with all that is complete; the innermost one is unreliable where the syntax breaks."""
    if not keep_last:
        stack.pop()
    while len(stack) > 1:
        content = stack.pop().content
        if content:
            stack[-1].add(content)
    return stack[0].content if stack else None


def _scalar(kind: str, text: str) -> Any:
    if kind == "number":
        return int(text) if re.fullmatch(r"[-+]?\d{1,15}", text) else float(text)
    if kind == "double":
        try:
            return json.loads(f'"{text}"', strict=False)
        except ValueError:
            return text
    return text.replace("\\'", "'")
