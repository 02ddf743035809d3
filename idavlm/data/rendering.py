"""Chat templates with labels on assistant turns only, exact or an error."""

import re
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from idavlm.data.errors import DataError
from idavlm.data.tokenizer_memory import remembered
from idavlm.utils import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool = False,
    chat_template: str | None = None,
    max_length: int | None = None,
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation in the tokenizer's chat template, and its labels.

    Labels are the ids of what the assistant says in each of its turns, end-of-turn token included, and -100 elsewhere.
    A template with ``{% generation %}`` marks these spans itself. For any other, the spans are found by comparing: the
    conversation up to each assistant turn, rendered with the generation prompt, must be a prefix of the whole, as text
    and as tokens, so that training sees exactly the tokens generation will start from; what follows, up to the special
    token that ends the turn, is the label.

    Args:
        tokenizer: any transformers tokenizer with a chat template.
        messages: ``[{"role", "content": str}, ...]``.
        add_generation_prompt: end with the header of an assistant turn, for generation; nothing is a label then.
        chat_template: Jinja template to use in place of the tokenizer's.
        max_length: the most tokens allowed. A longer conversation is an error: cutting it could cut the answer off.

    Returns:
        ``input_ids`` and ``labels``, lists of equal length.

    Raises:
        DataError: of kind ``"template"`` where the template refuses the messages or the spans are not exact, of kind
            ``"length"`` above ``max_length``.
        ValueError: the tokenizer has no chat template.
    """
    template = chat_template or getattr(tokenizer, "chat_template", None)
    if not template:
        raise ValueError(
            f"{type(tokenizer).__name__} has no chat_template; set tokenizer.chat_template, e.g. that of the "
            "instruction-tuned version of the model."
        )
    if add_generation_prompt or all(message["role"] != "assistant" for message in messages):
        text = _render(tokenizer, messages, template, add_generation_prompt)
        ids = _tokenize(tokenizer, [text])["input_ids"][0]
        labels = [IGNORE_INDEX] * len(ids)
    elif _GENERATION_TAG.search(template):
        ids, labels = _by_own_spans(tokenizer, messages, template)
    else:
        ids, labels = _by_comparing(tokenizer, messages, template)
    if max_length is not None and len(ids) > max_length:
        raise DataError(
            f"the conversation has {len(ids)} tokens, more than max_length={max_length}; raise it, use fewer images or "
            "shorten the text (it is not cut: that could cut off the answer).",
            kind="length",
        )
    return ids, labels


def _by_own_spans(tokenizer: Any, messages: list[dict[str, str]], template: str) -> tuple[list[int], list[int]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    if not tokenizer.is_fast:
        raise DataError("the template's {% generation %} spans need a fast tokenizer (use_fast=True).", kind="template")
    try:
        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:
        raise _refused(error) from error
    text = texts[0]
    encoding = _tokenize(tokenizer, [text], offsets=True)
    ids = encoding["input_ids"][0]
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in spans[0]:
        if start < end:
            first, last = (_first_token_at(encoding["offset_mapping"][0], edge, text) for edge in (start, end))
            labels[first:last] = ids[first:last]
    return ids, labels


def _by_comparing(tokenizer: Any, messages: list[dict[str, str]], template: str) -> tuple[list[int], list[int]]:
    whole = _render(tokenizer, messages, template, False)
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = [_render(tokenizer, messages[:number], template, True) for number in turns]
    spans = []
    for number, prompt, next_prompt in zip(turns, prompts, [*prompts[1:], whole], strict=True):
        if not whole.startswith(prompt):
            same = next(i for i, (a, b) in enumerate(zip(whole + "\0", prompt, strict=False)) if a != b)
            raise _not_exact(
                f"behind {whole[max(0, same - 40) : same]!r} the conversation goes on with "
                f"{whole[same : same + 20]!r}, the generation prompt of turn {number} with {prompt[same : same + 20]!r}"
            )
        spans.append(_end_of_content(whole, len(prompt), len(next_prompt), messages[number]["content"], number))
    # What the template puts behind the last answer ends every answer: "<|im_end|>\n".
    upto = turns[-1] + 1
    answered = whole if upto == len(messages) else _render(tokenizer, messages[:upto], template, False)
    if not answered.startswith(whole[: spans[-1]]):
        raise _not_exact(f"turn {turns[-1]} changes when another turn follows")
    ending = _end_of_turn(tokenizer, answered[spans[-1] :])
    ends = []
    for number, end in zip(turns, spans, strict=True):
        if not whole.startswith(ending, end):
            raise _not_exact(f"turn {number} ends with {whole[end : end + 20]!r}, the last one with {ending!r}")
        ends.append(end + len(ending))

    encoding = _tokenize(tokenizer, [whole, *prompts], offsets=tokenizer.is_fast)
    ids, *prompt_ids = encoding["input_ids"]
    labels = [IGNORE_INDEX] * len(ids)
    for number, prompt, end in zip(turns, prompt_ids, ends, strict=True):
        if ids[: len(prompt)] != prompt:
            raise _not_exact(f"turn {number}: the tokens of the generation prompt change when the answer follows")
        if tokenizer.is_fast:
            last = _first_token_at(encoding["offset_mapping"][0], end, whole)
        else:
            upto = _tokenize(tokenizer, [whole[:end]])["input_ids"][0]
            if ids[: len(upto)] != upto:
                raise _not_exact(f"turn {number}: the tokens of the answer change when the next turn follows")
            last = len(upto)
        labels[len(prompt) : last] = ids[len(prompt) : last]
    return ids, labels


def _end_of_content(whole: str, start: int, stop: int, content: str, number: int) -> int:
    """Where the content of the turn in ``whole[start:stop]`` ends; the template may have stripped it."""
    for text in (content, content.strip()):
        # Right at the start, as nearly always; or behind something the template adds, if it is found just once.
        if whole.startswith(text, start):
            return start + len(text)
        if whole.count(text, start, stop) == 1:
            return whole.index(text, start) + len(text)
    raise _not_exact(f"the content of turn {number} ({content[:40]!r}) does not stand in the conversation as it is")


def _end_of_turn(tokenizer: Any, tail: str) -> str:
    """The text behind an answer up to its first special token; all of it where a turn is ended by plain text."""
    found = [(tail.find(token), token) for token in _special_tokens(tokenizer) if token in tail]
    if found:
        position, token = min(found, key=lambda entry: (entry[0], -len(entry[1])))
        return tail[: position + len(token)]
    if not tail.strip():
        raise _not_exact(
            "assistant turns end with nothing, so a model could not learn to stop; add an end-of-turn token"
        )
    return tail


def _special_tokens(tokenizer: Any) -> list[str]:
    """Every special token: also those, like Phi's ``<|end|>``, that have no name in the tokenizer's configuration."""
    known = remembered(tokenizer)
    if "special tokens" not in known:  # asking takes a millisecond where thousands of tokens were added
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        known["special tokens"] = [*dict.fromkeys([*tokenizer.all_special_tokens, *added])]
    return known["special tokens"]


def _first_token_at(offsets: list[tuple[int, int]], position: int, text: str) -> int:
    """Number of tokens before ``position``; an error where a token lies across it."""
    first = bisect_left(offsets, position, key=lambda span: span[0])
    if first and offsets[first - 1][1] > position:
        begin, end = offsets[first - 1]
        raise _not_exact(
            f"the token {text[begin:end]!r} lies across the edge of an assistant turn ({text[position:end]!r})"
        )
    return first


def _render(tokenizer: Any, messages: list[dict[str, str]], template: str, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:
        raise _refused(error) from error


def _tokenize(tokenizer: Any, texts: list[str], *, offsets: bool = False) -> Any:
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        verbose=False,
    )


def _refused(error: Exception) -> DataError:
    return DataError(f"the chat template refuses the messages: {error}.", kind="template")


def _not_exact(what: str) -> DataError:
    return DataError(
        f"labels of the assistant turns cannot be placed exactly: {what}. Use a chat template that marks them with "
        "{% generation %} ... {% endgeneration %}.",
        kind="template",
    )
