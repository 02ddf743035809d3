"""Chat templates applied to conversations, with labels on exactly the tokens of the assistant turns."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from idavlm.data.answer_spans import answered_turns, check_prompt, end_of_answer, inexact
from idavlm.data.errors import DataError, shorten
from idavlm.data.special_tokens import MessageMask, special_tokens, tokenize
from idavlm.utils import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the content of a message.

    Attributes:
        text: the text.
        is_markup: whether special tokens in ``text`` are special tokens, as in the chat template. True for image
            placeholders and what the processor writes around them; False for text of records and users, where they are
            ordinary text.
        identity: number of the identity whose name the segment is, or None.
    """

    text: str
    is_markup: bool = False
    identity: int | None = None


class RenderedChat(NamedTuple):
    """A tokenized conversation.

    Attributes:
        input_ids: token ids.
        labels: the token ids of the assistant turns, -100 elsewhere.
        identities: for each token the identity whose name it spells, or None.
    """

    input_ids: list[int]
    labels: list[int]
    identities: list[int | None]


def render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[dict[str, Any]],
    *,
    add_generation_prompt: bool = False,
    chat_template: str | None = None,
    max_length: int | None = None,
) -> RenderedChat:
    """Apply a chat template and return token ids, labels and the tokens of names.

    Labels equal the token ids of the assistant turns, including the end-of-turn token, and are -100 elsewhere. An
    assistant turn before the first user turn is a greeting without labels. A template with ``{% generation %}`` marks
    the assistant turns itself. For other templates, the turns are found by comparison: the conversation up to each
    assistant turn, rendered with the generation prompt, must be a prefix of the whole conversation, both as text and
    as tokens. Training then sees exactly the tokens that generation starts from. Everything after the prefix, up to
    the special token that ends the turn, is labelled.

    Only the template and segments with ``is_markup`` write special tokens. In all other text, a string such as
    ``<|end|>`` is ordinary text: it neither ends a turn nor begins one. A tokenizer that cannot take it as text (a slow
    tokenizer, or a vocabulary that holds it as a piece of text) makes it an error.

    A token spells a name if at least one character of the name is in it, also if it holds characters next to the name
    (``(Kate``); a token with characters of two names belongs to the first.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: ``[{"role", "content"}, ...]``, where the content is a string or a list of :class:`Segment`.
        add_generation_prompt: append the header of an assistant turn, for generation; then all labels are -100.
        chat_template: Jinja template to use instead of the tokenizer's.
        max_length: maximum number of tokens. A longer conversation is an error, because truncation could remove the
            answer.

    Returns:
        ``input_ids``, ``labels`` and ``identities``, lists of equal length.

    Raises:
        DataError: of kind ``"template"`` if the template rejects the messages or leaves out a question, or the
            assistant turns or names cannot be located exactly; of kind ``"length"`` if the conversation has more than
            ``max_length`` tokens; of kind ``"record"`` if the text of the messages holds a special token that the
            tokenizer cannot take as text.
        ValueError: the tokenizer has no chat template; or the messages have names and the tokenizer is slow.
    """
    template = chat_template or getattr(tokenizer, "chat_template", None)
    if not template:
        raise ValueError(
            f"{type(tokenizer).__name__} has no chat_template; set tokenizer.chat_template, for example to the "
            "template of the instruction-tuned model."
        )
    chat = _Chat(tokenizer, messages, template)
    if add_generation_prompt or not answered_turns(messages):
        text = chat.render(add_generation_prompt=add_generation_prompt)
        chat.check_questions(text)
        encoding = chat.tokenize([text])
        labels = [IGNORE_INDEX] * len(encoding["input_ids"][0])
    elif _GENERATION_TAG.search(template):
        text, encoding, labels = chat.labels_from_generation_tags()
    else:
        text, encoding, labels = chat.labels_by_comparison()
    ids = encoding["input_ids"][0]
    if max_length is not None and len(ids) > max_length:
        raise DataError(
            f"the conversation has {len(ids)} tokens, more than max_length={max_length}; increase max_length, use "
            "fewer images or shorten the text (truncation could remove the answer).",
            kind="length",
        )
    return RenderedChat(ids, labels, chat.identities(text, encoding, add_generation_prompt=add_generation_prompt))


def count_chat_tokens(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[dict[str, Any]], *, chat_template: str | None = None
) -> int:
    """Number of tokens of :func:`render_chat`, without labels."""
    chat = _Chat(tokenizer, messages, chat_template or tokenizer.chat_template)
    return len(chat.tokenize([chat.render()])["input_ids"][0])


class _Chat:
    """A conversation and its template. In all rendered text, the special tokens of the messages are hidden."""

    def __init__(self, tokenizer: Any, messages: Sequence[dict[str, Any]], template: str) -> None:
        self.tokenizer = tokenizer
        self.template = template
        contents = [_segments(message["content"]) for message in messages]
        names = [segment.identity for content in contents for segment in content if segment.identity is not None]
        texts = [segment.text for content in contents for segment in content]
        # One mark for the beginning of each identity's names, and one for the end of any name.
        self.mask = MessageMask(tokenizer, texts, num_marks=max(names) + 2 if names else 0)
        self.messages, self.marked_messages = [], []
        for number, (message, content) in enumerate(zip(messages, contents, strict=True)):
            pieces = self._hidden(content, f"messages[{number}] of {message['role']!r}")
            marked = [self._mark(piece, segment) for piece, segment in zip(pieces, content, strict=True)]
            self.messages.append({"role": message["role"], "content": "".join(pieces)})
            self.marked_messages.append({"role": message["role"], "content": "".join(marked)})
        self.has_names = bool(names)

    def render(self, number: int | None = None, *, add_generation_prompt: bool = False, marked: bool = False) -> str:
        """Render the first ``number`` messages."""
        messages = self.marked_messages if marked else self.messages
        try:
            return self.tokenizer.apply_chat_template(
                messages[:number],
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:
            raise _rejected(error) from error

    def check_questions(self, text: str) -> None:
        """Check that the template writes the questions, which a template for lists of parts leaves out."""
        for number, message in enumerate(self.messages):
            if message["role"] == "user" and message["content"].strip() not in text:
                shown = self.mask.show(message["content"][:40])
                raise DataError(
                    f"the chat template does not write the content of messages[{number}] ({shown!r}); use a template "
                    "that takes the content of messages as text and changes nothing of it.",
                    kind="template",
                )

    def tokenize(self, texts: list[str]) -> Any:
        return tokenize(self.tokenizer, texts, self.mask)

    def labels_from_generation_tags(self) -> tuple[str, Any, list[int]]:
        if not self.tokenizer.is_fast:
            raise DataError(
                "a template with {% generation %} marks needs a fast tokenizer; set use_fast=True.", kind="template"
            )
        texts, spans = self._render_with_spans(self.messages)
        text = texts[0]
        self.check_questions(text)
        encoding = self.tokenize([text])
        ids, offsets = encoding["input_ids"][0], encoding["offset_mapping"][0]
        labels = [IGNORE_INDEX] * len(ids)
        for start, end in spans[0][self._num_spans_of_greeting() :]:
            if start < end:
                first, last = (self._first_token_at(offsets, edge, text) for edge in (start, end))
                labels[first:last] = ids[first:last]
        return text, encoding, labels

    def _render_with_spans(self, messages: list[dict[str, Any]]) -> tuple[list[str], list[list[tuple[int, int]]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            return render_jinja_template(
                conversations=[messages],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:
            raise _rejected(error) from error

    def _num_spans_of_greeting(self) -> int:
        """Number of spans that the template marks before the first user turn. They are no answers."""
        roles = [message["role"] for message in self.messages]
        first = roles.index("user") if "user" in roles else len(roles)
        return len(self._render_with_spans(self.messages[:first])[1][0]) if "assistant" in roles[:first] else 0

    def labels_by_comparison(self) -> tuple[str, Any, list[int]]:
        show = self.mask.show
        whole = self.render()
        self.check_questions(whole)
        turns = answered_turns(self.messages)
        prompts = [self.render(number, add_generation_prompt=True) for number in turns]
        spans = []
        for number, prompt, next_prompt in zip(turns, prompts, [*prompts[1:], whole], strict=True):
            check_prompt(whole, prompt, number, show)
            spans.append(self._end_of_content(whole, len(prompt), len(next_prompt), number))
        # The text that the template adds after the last answer ends every answer: "<|im_end|>\n".
        end_of_last = turns[-1] + 1
        answered = whole if end_of_last == len(self.messages) else self.render(end_of_last)
        if not answered.startswith(whole[: spans[-1]]):
            raise inexact(f"turn {turns[-1]} changes if another turn follows")
        ending = _end_of_turn(self.tokenizer, answered[spans[-1] :])
        ends = []
        for number, end in zip(turns, spans, strict=True):
            if not whole.startswith(ending, end):
                raise inexact(f"turn {number} ends with {show(whole[end : end + 20])!r}, the last turn with {ending!r}")
            ends.append(end + len(ending))

        encoding = self.tokenize([whole, *prompts])
        ids, *prompt_ids = encoding["input_ids"]
        labels = [IGNORE_INDEX] * len(ids)
        for number, prompt, end in zip(turns, prompt_ids, ends, strict=True):
            if ids[: len(prompt)] != prompt:
                raise inexact(f"turn {number}: the tokens of the generation prompt change if the answer follows")
            if self.tokenizer.is_fast:
                last = self._first_token_at(encoding["offset_mapping"][0], end, whole)
            else:
                start_ids = self.tokenize([whole[:end]])["input_ids"][0]
                if ids[: len(start_ids)] != start_ids:
                    raise inexact(f"turn {number}: the tokens of the answer change if the next turn follows")
                last = len(start_ids)
            labels[len(prompt) : last] = ids[len(prompt) : last]
        return whole, encoding, labels

    def identities(self, text: str, encoding: Any, *, add_generation_prompt: bool) -> list[int | None]:
        """For each token of ``text`` the identity whose name it spells.

        The names are followed through the template by private-use characters around them.
        """
        identities: list[int | None] = [None] * len(encoding["input_ids"][0])
        if not self.has_names:
            return identities
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} is a slow tokenizer, which does not tell the positions of its tokens "
                "in the text; samples with identities need a fast tokenizer (use_fast=True)."
            )
        marked = self.render(add_generation_prompt=add_generation_prompt, marked=True)
        *begins, end = self.mask.marks
        pieces = re.split(f"([{begins[0]}-{end}])", marked)
        if "".join(pieces[::2]) != text:
            raise DataError(
                "the chat template changes the text around the names of identities, so their tokens cannot be located; "
                "use a template that writes the content of messages as it is.",
                kind="template",
            )
        owners: list[int | None] = []  # of each character
        identity = None
        for place, piece in enumerate(pieces):
            if place % 2 == 0:
                owners += [identity] * len(piece)
            else:
                identity = None if piece == end else begins.index(piece)
        for token, (start, stop) in enumerate(encoding["offset_mapping"][0]):
            identities[token] = next((owner for owner in owners[start:stop] if owner is not None), None)
        return identities

    def _hidden(self, content: list[Segment], field: str) -> list[str]:
        """The text of each segment, with special tokens hidden unless they are markup.

        Neighbouring segments of text are searched together, because they could hold a special token together.
        """
        hidden = []
        for is_markup, run in groupby(content, key=lambda segment: segment.is_markup):
            texts = [segment.text for segment in run]
            whole = "".join(texts) if is_markup else self.mask.hide("".join(texts), field)
            ends = [0, *accumulate(map(len, texts))]
            hidden += [whole[start:end] for start, end in pairwise(ends)]
        return hidden

    def _mark(self, text: str, segment: Segment) -> str:
        if segment.identity is None:
            return text
        return self.mask.marks[segment.identity] + text + self.mask.marks[-1]

    def _end_of_content(self, whole: str, start: int, stop: int, number: int) -> int:
        content = self.messages[number]["content"]
        end = end_of_answer(whole, start, stop, content)
        if end is None:
            shown = self.mask.show(content[:40])
            raise inexact(f"the content of turn {number} ({shown!r}) is not found in the rendered conversation")
        return end

    def _first_token_at(self, offsets: list[tuple[int, int]], position: int, text: str) -> int:
        """Index of the first token at or after ``position``. Raises an error if a token crosses ``position``."""
        first = bisect_left(offsets, position, key=lambda span: span[0])
        if first and offsets[first - 1][1] > position:
            begin, end = offsets[first - 1]
            crossing, after = self.mask.show(text[begin:end]), self.mask.show(text[position:end])
            raise inexact(f"the token {crossing!r} crosses the boundary of an assistant turn ({after!r})")
        return first


def _segments(content: str | Sequence[Segment]) -> list[Segment]:
    return [Segment(content)] if isinstance(content, str) else list(content)


def _end_of_turn(tokenizer: Any, tail: str) -> str:
    """The text after an answer up to and including its first special token; all of it if there is none."""
    found = [(tail.find(token), token) for token in special_tokens(tokenizer) if token in tail]
    if found:
        position, token = min(found, key=lambda entry: (entry[0], -len(entry[1])))
        return tail[: position + len(token)]
    if not tail.strip():
        raise inexact(
            "assistant turns have no end-of-turn text, so a model could not learn to stop; add an end-of-turn token"
        )
    return tail


def _rejected(error: Exception) -> DataError:
    return DataError(
        f"the chat template rejects the messages: {shorten(str(error))}; change the messages or the template.",
        kind="template",
    )
