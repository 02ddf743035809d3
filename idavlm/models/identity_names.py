"""The names of identities in a prompt: where they stand, which tokens are about them, and their embeddings."""

import re
import unicodedata
from collections.abc import Sequence
from itertools import accumulate, groupby

import torch.nn.functional as F
from torch import Tensor

from idavlm.data.rendering import Segment
from idavlm.models.image_batch import ImageBatch
from idavlm.utils import IGNORE_INDEX, ImageRole

NO_IDENTITY = -1
"""Value of ``token_identity_index`` for tokens that are not about an identity."""

# Scripts that put no space between words, or attach particles to names: Thai, Lao, Tibetan, Myanmar, Hangul, Khmer,
# Tai scripts, Chinese, Japanese, Yi.
_NO_SPACES = re.compile(
    r"[\u0e00-\u109f\u1100-\u11ff\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u2e80-\ua4cf\ua960-\ua97f"
    r"\uac00-\ud7ff\uf900-\ufaff\uffa0-\uffdc\U00020000-\U0003ffff]"
)
_KATAKANA = re.compile(r"[\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f]")
_JOINERS = "\u200c\u200d\u00ad"  # of Persian and Indic scripts and of emoji; the soft hyphen
_HANGUL_ENDINGS = re.compile(r"[\u1160-\u11ff\ud7b0-\ud7ff]")  # vowels and final consonants, in single letters


def find_names(text: str, names: Sequence[str]) -> list[tuple[int, int, int]]:
    """Find the names of identities in ``text``, as whole words.

    A name is found next to white space, signs (``Bob/Kate``, ``[Kate]``, ``Kate's``) and the ends of the text, but not
    next to a letter, digit or accent that continues the word (``Katerina``). In scripts without spaces (Chinese,
    hiragana, Thai ...) and in Korean, which attaches particles, anything may be next to it; katakana is
    continued by katakana only. Case counts. Unicode normalization does not: NFC and NFD spell the same name. Where
    several names begin, the longest counts.

    Args:
        text: the text.
        names: name of identity 0, 1, ... White space around a name does not count.

    Returns:
        Start, end and identity of each name, in order and without overlap.
    """
    if not names:
        return []
    decomposed, units, places = _decompose(text)
    starts = [0, *accumulate(map(len, units))]
    spellings = [(unicodedata.normalize("NFD", name.strip()), identity) for identity, name in enumerate(names)]
    spellings = sorted((spelling for spelling in spellings if spelling[0]), key=lambda spelling: -len(spelling[0]))
    found, end = [], 0
    for match in re.finditer(f"(?={'|'.join(re.escape(name) for name, _ in spellings)})", decomposed):
        first = match.start()
        if first < end:
            continue
        for name, identity in spellings:
            stop = first + len(name)
            if not (decomposed.startswith(name, first) and first in places and stop in places):
                continue
            if _is_word(units, places[first], places[stop]):
                found.append((starts[places[first]], starts[places[stop]], identity))
                end = stop
                break
    return found


def split_at_names(content: Sequence[Segment], names: Sequence[str]) -> list[Segment]:
    """Cut the segments of a message so that each name of an identity is a segment with ``identity``.

    A name may extend over neighbouring segments of text, but is never found in markup.
    """
    whole = "".join(segment.text for segment in content)
    found = find_names(whole, names)
    result, start = [], 0
    for is_markup, run in groupby(content, key=lambda segment: segment.is_markup):
        text = "".join(segment.text for segment in run)
        stop, position = start + len(text), start
        if not is_markup:
            for begin, end, identity in found:
                if start <= begin and end <= stop:
                    result += [Segment(whole[position:begin]), Segment(whole[begin:end], identity=identity)]
                    position = end
        result.append(Segment(whole[position:stop], is_markup))
        start = stop
    return result


def propagate_names(
    name_identities: Sequence[int], input_ids: Sequence[int], labels: Sequence[int], image_token_id: int
) -> list[int]:
    """Extend each name that :func:`find_names` found to the tokens that follow it, including the answer.

    "Where is Kate?" is about Kate, and so is its answer. The model then need not find her name again for each word of
    the answer. An image placeholder and the end of an answer end the propagation.

    Returns:
        The ``token_identity_index`` of each token: the identity that the token is about, or -1.
    """
    propagated, current, in_answer = [], NO_IDENTITY, False
    for identity, token, label in zip(name_identities, input_ids, labels, strict=True):
        if token == image_token_id or (in_answer and label == IGNORE_INDEX):
            current = NO_IDENTITY
        if identity != NO_IDENTITY:
            current = identity
        in_answer = label != IGNORE_INDEX
        propagated.append(current)
    return propagated


def mean_name_embeddings(
    inputs_embeds: Tensor, token_identity_index: Tensor, name_mask: Tensor, num_identities: int
) -> Tensor:
    """Average the embeddings ``[B, T, C]`` of each identity's name over its occurrences in the prompt.

    Returns:
        ``[B, G, C]``; zeros for identities with names that do not occur.
    """
    device, dtype = inputs_embeds.device, inputs_embeds.dtype
    token_identity_index, name_mask = token_identity_index.to(device), name_mask.to(device)
    in_name = name_mask & (token_identity_index < num_identities)
    spelled = F.one_hot(token_identity_index.where(in_name, num_identities), num_identities + 1)[..., :-1].to(dtype)
    return spelled.mT @ inputs_embeds / spelled.sum(1).clamp(min=1)[..., None]


def add_learned_embeddings(inputs_embeds: Tensor, token_identity_index: Tensor, embeddings: Tensor) -> Tensor:
    """Add learned identity embeddings to the tokens that are about an identity.

    Each embedding of the table ``[G, C]`` is scaled to the norm of the text embedding that it is added to, so that
    neither hides the other.
    """
    token_identity_index = token_identity_index.to(inputs_embeds.device)
    directions = F.normalize(embeddings.to(inputs_embeds), dim=-1)[token_identity_index.clamp(min=0)]
    norm = inputs_embeds.detach().norm(dim=-1) * (token_identity_index >= 0)
    return inputs_embeds + directions * norm[..., None]


def count_identities(images: ImageBatch) -> int:
    """Return the largest number of identities that a sample of the batch introduces."""
    if images.identity_index is None:
        return 0
    references = images.identity_index.cpu()[images.image_roles.cpu() == ImageRole.REFERENCE]
    return int(references.max()) + 1 if len(references) else 0


def _decompose(text: str) -> tuple[str, Sequence[str], dict[int, int] | range]:
    """Return ``text`` in NFD, its units, and for each place in the NFD text where a unit starts the number of the unit.

    A unit is a character with the accents that follow it. Names start and end between units.
    """
    if text.isascii():
        return text, text, range(len(text) + 1)
    units: list[str] = []
    for character in text:
        if units and unicodedata.combining(character):
            units[-1] += character
        else:
            units.append(character)
    decomposed = [unicodedata.normalize("NFD", unit) for unit in units]
    places = {start: number for number, start in enumerate([0, *accumulate(map(len, decomposed))])}
    return "".join(decomposed), units, places


def _is_word(units: Sequence[str], start: int, end: int) -> bool:
    """Whether the units from ``start`` to ``end`` are not continued by the characters next to them."""
    before = units[start - 1][0] if start else ""
    after = units[end][0] if end < len(units) else ""
    if after and (unicodedata.category(after)[0] == "M" or after in _JOINERS or _HANGUL_ENDINGS.match(after)):
        return False
    if before and before in _JOINERS:
        return False
    return not (_continues(before, units[start][0]) or _continues(units[end - 1][0], after))


def _continues(first: str, second: str) -> bool:
    """Whether two characters side by side belong to one word."""
    kind = _kind_of_word(first)
    return kind is not None and kind == _kind_of_word(second)


def _kind_of_word(character: str) -> str | None:
    """The kind of words that the character is part of, or None for signs and scripts without spaces."""
    if not character or (not character.isalnum() and unicodedata.category(character)[0] != "M"):
        return None
    if _KATAKANA.match(character):
        return "katakana"
    return None if _NO_SPACES.match(character) else "letters"
