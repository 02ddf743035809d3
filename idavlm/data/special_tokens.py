"""Special tokens in the text of messages: told apart from those of the chat template, and tokenized as text."""

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from idavlm.data.errors import DataError

# Private-use characters stand in for other characters, one for one, so that positions in the text stay the same.
# Plane 15 stands for the special tokens of a template, plane 16 for characters of messages and for the ends of names.
_FIRST_OF_TEMPLATE = 0xF0000
_PLANE_16 = range(0x100000, 0x10FFFE)

# Length and special tokens of the tokenizer when its cache was created, and the cache.
_TOKENIZER_CACHES: "WeakKeyDictionary[Any, tuple[tuple, dict[str, Any]]]" = WeakKeyDictionary()


def special_tokens(tokenizer: Any) -> list[str]:
    """All special tokens, including those without a name in the tokenizer's configuration (``<|end|>`` of Phi)."""
    return _facts(tokenizer)["special"]


class MessageMask:
    """Hides the special tokens in the text of messages, so that a rendered conversation holds only the template's.

    Each character of such a token is replaced by one private-use character; :meth:`show` restores it. The beginning
    and the end of a text are hidden too if they could form a special token with what the template puts next to them.

    Args:
        tokenizer: a transformers tokenizer.
        texts: all texts of the conversation. The private-use characters are chosen so that none of them occurs there.
        num_marks: number of further private-use characters, for marks in the text.
    """

    def __init__(self, tokenizer: Any, texts: Iterable[str], *, num_marks: int = 0) -> None:
        facts = _facts(tokenizer)
        self._pattern, self._starts, self._ends = facts["pattern"], facts["starts"], facts["ends"]
        self._longest = max(map(len, facts["control"]), default=0)
        alphabet = facts["alphabet"]
        first = _unused_characters(texts, len(alphabet) + num_marks)
        self._hidden = {ord(character): first + place for place, character in enumerate(alphabet)}
        self._shown = {hidden: character for character, hidden in self._hidden.items()}
        self.fields: dict[str, str] = {}  # of each hidden token
        self.marks = [chr(first + len(alphabet) + number) for number in range(num_marks)]

    def hide(self, text: str, field: str) -> str:
        """Hide the special tokens in ``text``, which comes from a record or from a user; ``field`` names its place."""
        if self._pattern is None:
            return text
        for token in self._pattern.findall(text):
            self.fields.setdefault(token, field)
        text = self._pattern.sub(lambda match: match[0].translate(self._hidden), text)
        sizes = range(min(self._longest, len(text)), 0, -1)
        size = next((size for size in sizes if text[-size:] in self._starts), 0)
        text = text[: len(text) - size] + text[len(text) - size :].translate(self._hidden)
        size = next((size for size in sizes if text[:size] in self._ends), 0)
        return text[:size].translate(self._hidden) + text[size:]

    def show(self, text: str) -> str:
        """Restore the characters that :meth:`hide` replaced."""
        return text.translate(self._shown)


def tokenize(tokenizer: Any, texts: Sequence[str], mask: MessageMask) -> Any:
    """Tokenize rendered conversations in which ``mask`` hides the special tokens of the messages.

    Without such tokens, this is the tokenizer's own result. Otherwise a copy of a fast tokenizer is used, which takes
    the special tokens of the messages as ordinary text and the rest as the tokenizer does.

    Returns:
        A mapping with ``input_ids`` and, for fast tokenizers, ``offset_mapping``, one list per text.

    Raises:
        DataError: the tokenizer cannot take a special token as text.
    """
    pattern = _facts(tokenizer)["pattern"]
    shown = [mask.show(text) for text in texts]
    of_template = [_spans(pattern, text) for text in texts]
    in_messages = [
        text[start:end]
        for text, spans in zip(shown, of_template, strict=True)
        for start, end in _spans(pattern, text)
        if (start, end) not in spans
    ]
    if not in_messages:
        encoding = tokenizer(
            shown,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=tokenizer.is_fast,
            verbose=False,
        )
    elif not tokenizer.is_fast:
        raise _refused(
            tokenizer,
            in_messages[0],
            mask,
            "Only fast tokenizers take it as text; load one (use_fast=True) or change the text.",
        )
    else:
        encoding = _tokenize_as_text(tokenizer, shown, of_template, mask, in_messages[0])
    _check_origin(tokenizer, encoding, of_template, shown, mask)
    return encoding


def find_special_tokens(tokenizer: Any, text: str) -> list[str]:
    """Return the special tokens that ``text`` holds, in order."""
    return [text[start:end] for start, end in sorted(_spans(_facts(tokenizer)["pattern"], text))]


def _tokenize_as_text(
    tokenizer: Any, texts: list[str], of_template: list[set], mask: MessageMask, in_messages: str
) -> dict[str, list]:
    """Tokenize with a copy of the tokenizer that knows the special tokens of the template under other names."""
    backend, names, ids = _renamed(tokenizer)
    renamed = []
    for text, spans in zip(texts, of_template, strict=True):
        if any(names[token][0] in text for token in names):
            remedy = "remove them or change the text."
            reason = f"The private-use characters from U+F0000 in the conversation prevent that; {remedy}"
            raise _refused(tokenizer, in_messages, mask, reason)
        for start, end in spans:
            text = text[:start] + names[text[start:end]] + text[end:]
        renamed.append(text)
    encodings = backend.encode_batch(renamed, add_special_tokens=False)
    return {
        "input_ids": [[ids.get(token, token) for token in encoding.ids] for encoding in encodings],
        "offset_mapping": [encoding.offsets for encoding in encodings],
    }


def _renamed(tokenizer: Any) -> tuple[Any, dict[str, str], dict[int, int]]:
    """A copy of the fast tokenizer's backend, the new name of each special token, and the ids of the new names.

    The copy takes special tokens as text. Under its new name, each is an added token that is not special, with the
    same rules for spaces around it.
    """
    cache = tokenizer_cache(tokenizer)
    if "renamed" not in cache:
        from tokenizers import AddedToken

        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        names, ids, added = {}, {}, []
        tokens = {str(token): (number, token) for number, token in tokenizer.added_tokens_decoder.items()}
        for place, text in enumerate(_facts(tokenizer)["control"]):
            _, token = tokens[text]
            names[text] = chr(_FIRST_OF_TEMPLATE + place) * len(text)
            rules = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word", "normalized")}
            added.append(AddedToken(names[text], special=False, **rules))
        backend.add_tokens(added)
        for text, name in names.items():
            ids[backend.token_to_id(name)] = tokens[text][0]
        cache["renamed"] = backend, names, ids
    return cache["renamed"]


def _check_origin(tokenizer: Any, encoding: Any, of_template: list[set], texts: list[str], mask: MessageMask) -> None:
    """Check that every special token of the result comes from the template.

    The vocabulary of a Unigram or WordPiece model may hold special tokens as pieces of ordinary text, and a tokenizer
    may normalize other characters to those of a special token.
    """
    ids = _facts(tokenizer)["ids"]
    for row, tokens in enumerate(encoding["input_ids"]):
        places = [place for place, token in enumerate(tokens) if token in ids]
        if not tokenizer.is_fast:
            wrong = len(places) > len(of_template[row])
            text = tokenizer.convert_ids_to_tokens(tokens[places[0]]) if wrong else ""
        else:
            covered = {position for span in of_template[row] for position in range(*span)}
            spans = [encoding["offset_mapping"][row][place] for place in places]
            spans = [span for span in spans if covered.isdisjoint(range(*span))]
            wrong = bool(spans)
            text = texts[row][slice(*spans[0])] if wrong else ""
        if wrong:
            raise _refused(
                tokenizer,
                text,
                mask,
                "Its vocabulary makes a special token of it in any text; change the text or use another tokenizer.",
            )


def _refused(tokenizer: Any, token: str, mask: MessageMask, reason: str) -> DataError:
    field = mask.fields.get(token, "the text of the messages")
    return DataError(
        f"{field} holds {token!r}, a special token of {type(tokenizer).__name__}, which must be taken as text. {reason}"
    )


def tokenizer_cache(tokenizer: Any) -> dict[str, Any]:
    """Return a dict to cache facts about a tokenizer in. It is emptied when tokens are added or become special."""
    state = (len(tokenizer), *tokenizer.all_special_tokens)
    cached, cache = _TOKENIZER_CACHES.get(tokenizer, (None, {}))
    if cached != state:
        cache = {}
        _TOKENIZER_CACHES[tokenizer] = state, cache
    return cache


def _facts(tokenizer: Any) -> dict[str, Any]:
    """The special tokens of a tokenizer, and what is needed to find them in text.

    ``control`` holds those that the tokenizer recognises in text. Tokens that consist of white space are no control
    tokens: every text holds them.
    """
    cache = tokenizer_cache(tokenizer)
    if "special tokens" not in cache:  # the lookup takes a millisecond if thousands of tokens were added
        named = set(map(str, tokenizer.all_special_tokens))
        added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
        flagged = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        control = [token for token in added if (token in named or token in flagged) and token.strip()]
        control.sort(key=len, reverse=True)
        # The unknown token also stands for text that the vocabulary lacks.
        ids = {added[token] for token in control} - {tokenizer.unk_token_id}
        cache["special tokens"] = {
            "special": [*dict.fromkeys([*tokenizer.all_special_tokens, *flagged])],
            "control": control,
            "ids": ids,
            "pattern": re.compile("|".join(map(re.escape, control))) if control else None,
            "alphabet": sorted({character for token in control for character in token if not character.isspace()}),
            "starts": {token[:size] for token in control for size in range(1, len(token))},
            "ends": {token[size:] for token in control for size in range(1, len(token))},
        }
    return cache["special tokens"]


def _spans(pattern: re.Pattern | None, text: str) -> set[tuple[int, int]]:
    return {match.span() for match in pattern.finditer(text)} if pattern is not None else set()


def _unused_characters(texts: Iterable[str], count: int) -> int:
    """The first of ``count`` consecutive private-use characters that do not occur in ``texts``."""
    used = {ord(character) for text in texts for character in re.findall("[\U00100000-\U0010fffd]", text)}
    for first in range(_PLANE_16.start, _PLANE_16.stop - count, count):
        if used.isdisjoint(range(first, first + count)):
            return first
    raise DataError("the messages hold too many private-use characters from U+100000; remove them.")
