"""The names of identities in a prompt: which tokens spell them, which tokens are about them, and their embeddings."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from idavlm.data.rendering import tokenizer_cache
from idavlm.models.image_batch import ImageBatch
from idavlm.utils import IGNORE_INDEX, ImageRole

NO_IDENTITY = -1
"""Value of ``token_identity_index`` for tokens that are not about an identity."""


def find_names(tokenizer, input_ids: Sequence[int], labels: Sequence[int], names: Sequence[str]) -> list[int]:
    """Return for each token the identity whose name it spells, or -1.

    Only the prompt is searched, not the answers (``labels`` other than -100). A name is found by the tokens that spell
    it on its own, after a space or on a new line, if it is a whole word: no letter or digit is next to it. If two names
    start alike, the longer one wins.

    Args:
        tokenizer: a transformers tokenizer.
        input_ids: tokens, with one placeholder per image.
        labels: as long as ``input_ids``.
        names: name of identity 0, 1, ...
    """
    spellings = [(tokens, identity) for identity, name in enumerate(names) for tokens in _spellings(tokenizer, name)]
    spellings.sort(key=lambda spelling: -len(spelling[0]))
    first = {tokens[0] for tokens, _ in spellings}
    found = [NO_IDENTITY] * len(input_ids)
    end = 0
    for start, token in enumerate(input_ids):
        if token not in first or start < end:
            continue
        for tokens, identity in spellings:
            stop = start + len(tokens)
            in_prompt = all(label == IGNORE_INDEX for label in labels[start:stop])
            if list(input_ids[start:stop]) == tokens and in_prompt and _is_word(tokenizer, input_ids, start, stop):
                found[start:stop] = [identity] * len(tokens)
                end = stop
                break
    return found


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


def _cached(tokenizer, content: str) -> dict:
    cache = tokenizer_cache(tokenizer).setdefault(content, {})
    if len(cache) > 100_000:  # the same few names and tokens occur in every sample
        cache.clear()
    return cache


def _spellings(tokenizer, name: str) -> list[list[int]]:
    """Return the distinct token sequences of a name on its own, after a space and on a new line."""
    cache = _cached(tokenizer, "spellings of names")
    if name not in cache:
        # After a new line a name may be spelled unlike at the start of a text, where some tokenizers add a space.
        line, alone, after_space, after_line = tokenizer(
            ["\n", name, f" {name}", f"\n{name}"], add_special_tokens=False
        ).input_ids
        after_line = after_line[len(line) :] if after_line[: len(line)] == line else []
        distinct = dict.fromkeys(map(tuple, (alone, after_space, after_line)))
        cache[name] = [list(tokens) for tokens in distinct if tokens]
    return cache[name]


def _is_word(tokenizer, input_ids: Sequence[int], start: int, end: int) -> bool:
    """Return whether no letter or digit is next to the tokens from ``start`` to ``end``."""
    cache = _cached(tokenizer, "texts of tokens")

    # Tokens are decoded in pairs, since a single token loses the space before it in some tokenizers.
    def text(first: int, last: int) -> str:
        tokens = tuple(input_ids[first:last])
        if tokens not in cache:
            cache[tokens] = tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        return cache[tokens]

    if end < len(input_ids) and _continues_word(text(end - 1, end + 1)[len(text(end - 1, end)) :][:1]):
        return False
    if start == 0:
        return True
    first_token = text(start, start + 1)
    before = text(start - 1, start + 1)[: -len(first_token.lstrip()) or None]
    return first_token[:1].isspace() or not _continues_word(before[-1:])


def _continues_word(character: str) -> bool:
    """Return whether this is a letter or digit of a script that puts spaces between words."""
    return character.isalnum() and character < "\u2e80"
