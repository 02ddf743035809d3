"""Where the names of identities stand among the tokens of a prompt."""

from collections.abc import Sequence

from idavlm.data.tokenizer_memory import remembered

NOT_A_NAME = -1

_MOST = 100_000
"""So many spellings of names, and texts of tokens, are remembered: the same few are asked for with every sample."""


def name_identities(tokenizer, input_ids: Sequence[int], labels: Sequence[int], names: Sequence[str]) -> list[int]:
    """The identity each token names, or -1.

    Only the prompt counts, not what the model is to say (``labels`` other than -100). A name is found as the tokens it
    has on its own, after a space or on a new line, if it stands there as a whole word: no letter or digit before or
    after it. Of two names that begin alike the longer one wins.

    Args:
        tokenizer: a transformers tokenizer.
        input_ids: tokens, images as one placeholder each.
        labels: as long as ``input_ids``.
        names: of identity 0, 1, ...
    """
    spellings = [(tokens, identity) for identity, name in enumerate(names) for tokens in _spellings(tokenizer, name)]
    spellings.sort(key=lambda spelling: -len(spelling[0]))
    first = {tokens[0] for tokens, _ in spellings}
    found = [NOT_A_NAME] * len(input_ids)
    position = 0
    while position < len(input_ids):
        length = 1
        if input_ids[position] in first and labels[position] == -100:
            for tokens, identity in spellings:
                end = position + len(tokens)
                if list(input_ids[position:end]) != tokens or any(label != -100 for label in labels[position:end]):
                    continue
                if _is_word(tokenizer, input_ids, position, end):
                    found[position:end] = [identity] * len(tokens)
                    length = len(tokens)
                    break
        position += length
    return found


def carry_names(names: Sequence[int], input_ids: Sequence[int], labels: Sequence[int], stop: int) -> list[int]:
    """Let each name of a prompt stand for the words behind it too, the answer's included: they are about one person.

    "Where is Kate?" is about Kate, and so is what is said to it: a model need not find her name again for every word.

    Args:
        names: from :func:`name_identities`.
        input_ids: tokens.
        labels: as long as ``input_ids``; the end of an answer ends it.
        stop: id of the placeholder of images, which end it.
    """
    carried, current, answering = [], NOT_A_NAME, False
    for name, token, label in zip(names, input_ids, labels, strict=True):
        if token == stop or (answering and label == -100):
            current = NOT_A_NAME
        if name != NOT_A_NAME:
            current = name
        answering = label != -100
        carried.append(current)
    return carried


def _known(tokenizer, what: str) -> dict:
    known = remembered(tokenizer).setdefault(what, {})
    if len(known) > _MOST:
        known.clear()
    return known


def _spellings(tokenizer, name: str) -> list[list[int]]:
    """The tokens of a name on its own, after a space and on a new line, as far as they differ."""
    known = _known(tokenizer, "spellings of names")
    if name not in known:
        # Behind a new line it may look unlike at the start of a text, which some tokenizers put a space before.
        line, alone, spaced, below = tokenizer(
            ["\n", name, f" {name}", f"\n{name}"], add_special_tokens=False
        ).input_ids
        below = below[len(line) :] if below[: len(line)] == line else []
        known[name] = [list(tokens) for tokens in dict.fromkeys(map(tuple, (alone, spaced, below))) if tokens]
    return known[name]


def _is_word(tokenizer, input_ids: Sequence[int], start: int, end: int) -> bool:
    """Whether no letter or digit stands right before or behind the tokens ``start`` to ``end``.

    Tokens are decoded in pairs: on its own a token loses the space before it in some tokenizers.
    """

    known = _known(tokenizer, "texts of tokens")

    def text(first: int, last: int) -> str:
        tokens = tuple(input_ids[first:last])
        if tokens not in known:
            known[tokens] = tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        return known[tokens]

    if end < len(input_ids) and _in_a_word(text(end - 1, end + 1)[len(text(end - 1, end)) :][:1]):
        return False
    if start == 0:
        return True
    own = text(start, start + 1)
    before = text(start - 1, start + 1)[: -len(own.lstrip()) or None]
    return own[:1].isspace() or not _in_a_word(before[-1:])


def _in_a_word(character: str) -> bool:
    """A letter or digit; not of Chinese, Japanese or Korean, which put no spaces between words."""
    return character.isalnum() and character < "\u2e80"
