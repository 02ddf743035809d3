"""Chat templates applied to conversations, with labels on exactly the tokens of the assistant turns."""

import re
from bisect import bisect_left
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from idavlm.data.errors import DataError
from idavlm.utils import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Length of the tokenizer when its cache was created, and the cache.
_TOKENIZER_CACHES: "WeakKeyDictionary[Any, tuple[int, dict[str, Any]]]" = WeakKeyDictionary()


def render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool = False,
    chat_template: str | None = None,
    max_length: int | None = None,
) -> tuple[list[int], list[int]]:
    """Apply a chat template and return token ids and labels.

    Labels equal the token ids of the assistant turns, including the end-of-turn token, and are -100 elsewhere. A
    template with ``{% generation %}`` marks the assistant turns itself. For other templates, the turns are found by
    comparison: the conversation up to each assistant turn, rendered with the generation prompt, must be a prefix of
    the whole conversation, both as text and as tokens. Training then sees exactly the tokens that generation starts
    from. Everything after the prefix, up to the special token that ends the turn, is labelled.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: ``[{"role", "content": str}, ...]``.
        add_generation_prompt: append the header of an assistant turn, for generation; then all labels are -100.
        chat_template: Jinja template to use instead of the tokenizer's.
        max_length: maximum number of tokens. A longer conversation is an error, because truncation could remove the
            answer.

    Returns:
        ``input_ids`` and ``labels``, lists of equal length.

    Raises:
        DataError: of kind ``"template"`` if the template rejects the messages or the assistant turns cannot be located
            exactly; of kind ``"length"`` if the conversation has more than ``max_length`` tokens.
        ValueError: the tokenizer has no chat template.
    """
    template = chat_template or getattr(tokenizer, "chat_template", None)
    if not template:
        raise ValueError(
            f"{type(tokenizer).__name__} has no chat_template; set tokenizer.chat_template, for example to the "
            "template of the instruction-tuned model."
        )
    if add_generation_prompt or all(message["role"] != "assistant" for message in messages):
        text = _render(tokenizer, messages, template, add_generation_prompt)
        ids = _tokenize(tokenizer, [text])["input_ids"][0]
        labels = [IGNORE_INDEX] * len(ids)
    elif _GENERATION_TAG.search(template):
        ids, labels = _labels_from_generation_tags(tokenizer, messages, template)
    else:
        ids, labels = _labels_by_comparison(tokenizer, messages, template)
    if max_length is not None and len(ids) > max_length:
        raise DataError(
            f"the conversation has {len(ids)} tokens, more than max_length={max_length}; increase max_length, use "
            "fewer images or shorten the text (truncation could remove the answer).",
            kind="length",
        )
    return ids, labels


def tokenizer_cache(tokenizer: Any) -> dict[str, Any]:
    """Return a dict to cache facts about a tokenizer in. It is emptied when tokens are added to the tokenizer."""
    size, cache = _TOKENIZER_CACHES.get(tokenizer, (-1, {}))
    if size != len(tokenizer):
        cache = {}
        _TOKENIZER_CACHES[tokenizer] = len(tokenizer), cache
    return cache


def _labels_from_generation_tags(
    tokenizer: Any, messages: list[dict[str, str]], template: str
) -> tuple[list[int], list[int]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    if not tokenizer.is_fast:
        raise DataError(
            "a template with {% generation %} marks needs a fast tokenizer; set use_fast=True.", kind="template"
        )
    try:
        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:
        raise _rejected(error) from error
    text = texts[0]
    encoding = _tokenize(tokenizer, [text], offsets=True)
    ids = encoding["input_ids"][0]
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in spans[0]:
        if start < end:
            first, last = (_first_token_at(encoding["offset_mapping"][0], edge, text) for edge in (start, end))
            labels[first:last] = ids[first:last]
    return ids, labels


def _labels_by_comparison(tokenizer: Any, messages: list[dict[str, str]], template: str) -> tuple[list[int], list[int]]:
    whole = _render(tokenizer, messages, template, False)
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = [_render(tokenizer, messages[:number], template, True) for number in turns]
    spans = []
    for number, prompt, next_prompt in zip(turns, prompts, [*prompts[1:], whole], strict=True):
        if not whole.startswith(prompt):
            same = next(i for i, (a, b) in enumerate(zip(whole + "\0", prompt, strict=False)) if a != b)
            raise _inexact(
                f"after {whole[max(0, same - 40) : same]!r} the conversation continues with "
                f"{whole[same : same + 20]!r}, the generation prompt of turn {number} with {prompt[same : same + 20]!r}"
            )
        spans.append(_end_of_content(whole, len(prompt), len(next_prompt), messages[number]["content"], number))
    # The text that the template adds after the last answer ends every answer: "<|im_end|>\n".
    end_of_last = turns[-1] + 1
    answered = whole if end_of_last == len(messages) else _render(tokenizer, messages[:end_of_last], template, False)
    if not answered.startswith(whole[: spans[-1]]):
        raise _inexact(f"turn {turns[-1]} changes if another turn follows")
    ending = _end_of_turn(tokenizer, answered[spans[-1] :])
    ends = []
    for number, end in zip(turns, spans, strict=True):
        if not whole.startswith(ending, end):
            raise _inexact(f"turn {number} ends with {whole[end : end + 20]!r}, the last turn with {ending!r}")
        ends.append(end + len(ending))

    encoding = _tokenize(tokenizer, [whole, *prompts], offsets=tokenizer.is_fast)
    ids, *prompt_ids = encoding["input_ids"]
    labels = [IGNORE_INDEX] * len(ids)
    for number, prompt, end in zip(turns, prompt_ids, ends, strict=True):
        if ids[: len(prompt)] != prompt:
            raise _inexact(f"turn {number}: the tokens of the generation prompt change if the answer follows")
        if tokenizer.is_fast:
            last = _first_token_at(encoding["offset_mapping"][0], end, whole)
        else:
            start_ids = _tokenize(tokenizer, [whole[:end]])["input_ids"][0]
            if ids[: len(start_ids)] != start_ids:
                raise _inexact(f"turn {number}: the tokens of the answer change if the next turn follows")
            last = len(start_ids)
        labels[len(prompt) : last] = ids[len(prompt) : last]
    return ids, labels


def _end_of_content(whole: str, start: int, stop: int, content: str, number: int) -> int:
    """End of the content of the turn ``whole[start:stop]``. The template may have stripped the content."""
    for text in (content, content.strip()):
        # Usually at the start of the turn; otherwise after text that the template adds, if it occurs only once.
        if whole.startswith(text, start):
            return start + len(text)
        if whole.count(text, start, stop) == 1:
            return whole.index(text, start) + len(text)
    raise _inexact(f"the content of turn {number} ({content[:40]!r}) is not found in the rendered conversation")


def _end_of_turn(tokenizer: Any, tail: str) -> str:
    """The text after an answer up to and including its first special token; all of it if there is none."""
    found = [(tail.find(token), token) for token in _special_tokens(tokenizer) if token in tail]
    if found:
        position, token = min(found, key=lambda entry: (entry[0], -len(entry[1])))
        return tail[: position + len(token)]
    if not tail.strip():
        raise _inexact(
            "assistant turns have no end-of-turn text, so a model could not learn to stop; add an end-of-turn token"
        )
    return tail


def _special_tokens(tokenizer: Any) -> list[str]:
    """All special tokens, including those without a name in the tokenizer's configuration (``<|end|>`` of Phi)."""
    cache = tokenizer_cache(tokenizer)
    if "special tokens" not in cache:  # the lookup takes a millisecond if thousands of tokens were added
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        cache["special tokens"] = [*dict.fromkeys([*tokenizer.all_special_tokens, *added])]
    return cache["special tokens"]


def _first_token_at(offsets: list[tuple[int, int]], position: int, text: str) -> int:
    """Index of the first token at or after ``position``. Raises an error if a token crosses ``position``."""
    first = bisect_left(offsets, position, key=lambda span: span[0])
    if first and offsets[first - 1][1] > position:
        begin, end = offsets[first - 1]
        raise _inexact(
            f"the token {text[begin:end]!r} crosses the boundary of an assistant turn ({text[position:end]!r})"
        )
    return first


def _render(tokenizer: Any, messages: list[dict[str, str]], template: str, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:
        raise _rejected(error) from error


def _tokenize(tokenizer: Any, texts: list[str], *, offsets: bool = False) -> Any:
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        verbose=False,
    )


def _rejected(error: Exception) -> DataError:
    return DataError(
        f"the chat template rejects the messages: {error}; change the messages or the template.", kind="template"
    )


def _inexact(reason: str) -> DataError:
    return DataError(
        f"the assistant turns cannot be located exactly: {reason}. Use a chat template that marks them with "
        "{% generation %} ... {% endgeneration %}.",
        kind="template",
    )
