"""What was found out about a tokenizer, kept as long as it is."""

from typing import Any
from weakref import WeakKeyDictionary

# With the size of the tokenizer then: new tokens may change everything.
_KNOWN: "WeakKeyDictionary[Any, tuple[int, dict[str, Any]]]" = WeakKeyDictionary()


def remembered(tokenizer: Any) -> dict[str, Any]:
    """A dict of the tokenizer's own, to put into what takes time to find; empty again when it got new tokens."""
    size, known = _KNOWN.get(tokenizer, (-1, {}))
    if size != len(tokenizer):
        known = {}
        _KNOWN[tokenizer] = len(tokenizer), known
    return known
