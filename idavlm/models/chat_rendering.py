"""Chat templates of vision-language models: text of an image, header of a turn, positions of the assistant turns."""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from idavlm.data import DataError
from idavlm.data.answer_spans import answered_turns, check_prompt, end_of_answer, inexact
from idavlm.data.introductions import read_introduction
from idavlm.data.messages import Conversation, Photo
from idavlm.data.special_tokens import special_tokens

Span = tuple[int, int]

# Stand for texts while a template is examined. No template changes them.
_TEXTS = ("\ue000", "\ue001", "\ue002")

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class TemplateFacts:
    """How a chat template renders a user turn.

    Attributes:
        image: text of an image, with what the template puts around the placeholder.
        header: what stands before the content of a user turn, after line breaks and special tokens.
        takes_parts: whether the content is a list of parts; otherwise it is a string with placeholders.
    """

    image: str
    header: str
    takes_parts: bool


class ChatTemplate:
    """A chat template with the special tokens of a tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        template: Jinja template.
        image_token: the placeholder.
        options: variables of the template (``tools``, ``enable_thinking``, ...).
    """

    def __init__(self, tokenizer: Any, template: str, image_token: str, options: dict[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.image_token = image_token
        self.options = options or {}

    @property
    def marks_answers(self) -> bool:
        """Whether the template marks the assistant turns with ``{% generation %}``."""
        return bool(_GENERATION_TAG.search(self.template))

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        with_spans: bool = False,
    ) -> tuple[str, list[Span]]:
        """Render messages; ``with_spans`` also returns start and end of the text that the template marks as answers.

        Raises:
            DataError: the template rejects the messages.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[list(messages)],
                chat_template=self.template,
                return_assistant_tokens_mask=with_spans,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **{**self.tokenizer.special_tokens_map, **self.options},
            )
        except Exception as error:
            raise DataError(
                f"the chat template rejects the messages: {error}; change the messages or the template.",
                kind="template",
            ) from error
        return texts[0], [tuple(span) for span in spans[0]] if with_spans else []

    @functools.cached_property
    def facts(self) -> TemplateFacts:
        """How the template renders a user turn, found by rendering one.

        Raises:
            DataError: the template renders no images, or numbers them.
        """
        first, second, third = _TEXTS
        image = {"type": "image"}
        texts = [{"type": "text", "text": text} for text in _TEXTS]
        plain = self._try([*texts])
        shown = self._try([texts[0], image, texts[1], image, texts[2]])
        string = self._try(f"{first}{self.image_token}{second}")
        if plain and shown and shown.count(self.image_token) == 2 and plain.count(first) == 1:
            header = plain.partition(first)[0]
            found = [_between(shown, first, second), _between(shown, second, third)]
            if self.image_token in shown.partition(first)[0]:  # images come first, wherever they stand
                images = _inserted(header, shown.partition(first)[0])
                found = [images[: len(images) // 2], images[len(images) // 2 :]]
            if found[0] != found[1]:
                raise DataError(
                    f"the chat template writes {found[0]!r} for one image and {found[1]!r} for the next; render "
                    "identities without options that number the images.",
                    kind="template",
                )
            return TemplateFacts(found[0], self._last_line(header), takes_parts=True)
        if string and f"{first}{self.image_token}{second}" in string:
            return TemplateFacts(self.image_token, self._last_line(string.partition(first)[0]), takes_parts=False)
        raise DataError(
            f"the chat template does not write {self.image_token!r} for an image part; use the template of a "
            "vision-language model.",
            kind="template",
        )

    def _last_line(self, header: str) -> str:
        line = header.rpartition("\n")[2]
        return line[
            max(
                (line.rfind(token) + len(token) for token in special_tokens(self.tokenizer) if token in line), default=0
            ) :
        ]

    def _try(self, content: Any) -> str | None:
        try:
            return self.render([{"role": "user", "content": content}])[0]
        except DataError:
            return None

    def messages_of(self, conversation: Conversation, identity_format: str) -> list[dict[str, Any]]:
        """The messages for :meth:`render`, in which turns with references are one text with placeholders.

        Templates strip text parts, separate them or move images to the front. One text keeps every reference in the
        line of its name.
        """
        messages = []
        for turn in conversation.turns:
            content = turn.message.get("content")
            if turn.introduces or not self.facts.takes_parts:
                text = self._text(turn.content, conversation.identities, identity_format)
                content = [{"type": "text", "text": text}] if self.facts.takes_parts else text
            elif isinstance(content, (list, tuple)):
                content = [
                    {"type": "image"} if isinstance(part, Photo) else {"type": "text", "text": part}
                    for part in turn.content
                ]
            others = {name: value for name, value in turn.message.items() if value is not None and name != "content"}
            messages.append(others if content is None else {**others, "content": content})
        return messages

    def _text(self, content: Sequence[str | Photo], names: list[str], identity_format: str) -> str:
        text = ""
        for part in content:
            if isinstance(part, str):
                text += part
            elif part.identity is None:
                text += self.facts.image
            else:
                if text and not text.endswith("\n"):
                    text += "\n"
                text += identity_format.format(name=names[part.identity], image=self.facts.image.strip())
        return text

    def answer_spans(self, messages: Sequence[dict[str, Any]]) -> tuple[str, list[Span], list[str]]:
        """Render messages and find the assistant turns, each with the token that ends it.

        A template with ``{% generation %}`` marks them. For others, the conversation up to each assistant turn,
        rendered with the generation prompt, must be a prefix of the whole conversation.

        Returns:
            The text, start and end of each assistant turn in it, and the prompts of the assistant turns (empty for a
            template that marks the turns).

        Raises:
            DataError: of kind ``"template"``: the turns cannot be located exactly.
        """
        turns = answered_turns(messages)
        if not turns or self.marks_answers:
            text, spans = self.render(messages, with_spans=bool(turns))
            spans = spans[self._num_spans_of_greeting(messages) :] if turns else []
            return text, [(start, end) for start, end in spans if start < end], []
        text, _ = self.render(messages)
        prompts = [self.render(messages[:number], add_generation_prompt=True)[0] for number in turns]
        ends = []
        for number, prompt, following in zip(turns, prompts, [*prompts[1:], text], strict=True):
            check_prompt(text, prompt, number)
            content = _plain(messages[number].get("content"))
            ends.append(_end_of(text, len(prompt), len(following), content, number))
        last = self.render(messages[: turns[-1] + 1])[0]
        if not last.startswith(text[: ends[-1]]):
            raise inexact(f"turn {turns[-1]} changes if another turn follows")
        ending = self._ending(last[ends[-1] :])
        for number, end in zip(turns, ends, strict=True):
            if not text.startswith(ending, end):
                raise inexact(f"turn {number} ends with {text[end : end + 20]!r}, the last one with {ending!r}")
        spans = [(len(prompt), end + len(ending)) for prompt, end in zip(prompts, ends, strict=True)]
        return text, spans, prompts

    def _num_spans_of_greeting(self, messages: Sequence[dict[str, Any]]) -> int:
        """Number of spans that the template marks before the first user turn. They are no answers."""
        roles = [message["role"] for message in messages]
        first = roles.index("user")
        return len(self.render(messages[:first], with_spans=True)[1]) if "assistant" in roles[:first] else 0

    def answers_in_text(self, text: str) -> list[Span]:
        """Start and end of each assistant turn in a rendered conversation, with the text that ends it.

        A turn begins after the generation prompt. The prompt at the end of the text begins none.
        """
        user, answer = (
            {"role": role, "content": mark} for role, mark in zip(("user", "assistant"), _TEXTS, strict=False)
        )
        asked = self.render([user])[0]
        prompt = self.render([user], add_generation_prompt=True)[0]
        whole = self.render([user, answer])[0]
        header = prompt.removeprefix(asked)
        if not header.strip() or header == prompt or not whole.startswith(prompt):
            return []
        ending = self._ending(whole.partition(_TEXTS[1])[2])
        spans, start = [], 0
        while (found := text.find(header, start)) >= 0:
            start = found + len(header)
            end = text.find(ending, start)
            if end < 0:
                break
            spans.append((start, end + len(ending)))
            start = end + len(ending)
        return spans

    def _ending(self, tail: str) -> str:
        """The text after an answer up to and including its first special token; all of it if there is none."""
        found = [(tail.find(token), -len(token), token) for token in special_tokens(self.tokenizer) if token in tail]
        if found:
            start, _, token = min(found)
            return tail[: start + len(token)]
        if not tail.strip():
            raise inexact(
                "assistant turns have no end-of-turn text, so a model could not learn to stop; add an end-of-turn token"
            )
        return tail


def references_in_text(
    text: str,
    image: str,
    image_token: str,
    *,
    header: str,
    special: Sequence[str],
) -> list[str | None]:
    """Return for each image of a text the name that it is a reference of, or None.

    The line ``Kate is <image>`` makes the image a reference of Kate; see
    :func:`idavlm.data.introductions.read_introduction` for the lines that introduce identities.

    Args:
        text: a text with placeholders, as people write it or as a chat template renders it.
        image: text of an image, ``image_token`` with what the chat template puts around it.
        image_token: the placeholder.
        header: what a chat template puts before the content of a user turn, in the same line.
        special: special tokens of the tokenizer; a name begins after the last one of its line.
    """
    names: list[str | None] = []
    core = image.strip()
    for line in text.split("\n"):
        count = line.count(image_token)
        texts = line.split(core if line.count(core) == count else image_token)
        before = texts[0].rpartition(header)[2] if header else texts[0]
        written = len(before.rstrip().removesuffix("is").rstrip())  # a name may be a special token
        ends = [match.end() for token in special for match in re.finditer(re.escape(token), before)]
        texts[0] = before[max((end for end in ends if end < written), default=0) :]
        found = read_introduction(texts)
        names += [None] * count if found is None else found.names
    return names


def with_reference_lines(
    text: str,
    identities: list[tuple[str, list]],
    identity_format: str,
    image: str,
    image_token: str,
    *,
    tokenizer: Any,
    field: str,
) -> str:
    """Put one line per photo of ``identities``, which are names with photos, before the text.

    Raises:
        ValueError: a chat template has rendered the text, so that nothing may precede it; ``field`` names it.
    """
    if not identities:
        return text
    bos = tokenizer.bos_token
    begin = bos if bos is not None and text.startswith(bos) else ""
    for token in special_tokens(tokenizer):
        if token not in (image_token, bos) and text.startswith(token, len(begin)) and token not in image:
            raise ValueError(
                f"{field} begins with {token!r}, so a chat template has rendered it; pass identities as parts of "
                "the messages, or write the lines 'Kate is <image>' into the text."
            )
    lines = [identity_format.format(name=name, image=image.strip()) for name, photos in identities for _ in photos]
    return begin + "".join(lines) + text[len(begin) :]


class Expansion:
    """What a processor wrote in place of the placeholders of some texts.

    Attributes:
        counts: number of image tokens of each image, row after row.
    """

    def __init__(self, texts: list[str], replacements: list[list[dict]], image_token: str, placeholder: str) -> None:
        self.image_token = image_token
        self.rows = [[entry for entry in row if entry["type"] == "image"] for row in replacements]
        self.is_faithful = all(
            text[slice(*entry["span"])] == image_token
            for text, row in zip(texts, self.rows, strict=True)
            for entry in row
        )
        self.counts = [entry["replacement"].count(placeholder) for row in self.rows for entry in row]

    def shifted(self, row: int, span: Span) -> Span:
        """Start and end of a span of the text after the replacement of the placeholders before it.

        Raises:
            DataError: the processor changes the text in other ways.
        """
        if not self.is_faithful:
            raise DataError(
                "the processor changes the text besides its placeholders, so the assistant turns cannot be located.",
                kind="template",
            )
        grown = [(entry["span"][1], entry["new_span"][1] - entry["span"][1]) for entry in self.rows[row]]
        start, end = (
            position + max(((end, shift) for end, shift in grown if end <= position), default=(0, 0))[1]
            for position in span
        )
        return start, end

    def expanded(self, row: int, text: str) -> str:
        """The beginning of the text of a row, with its placeholders replaced."""
        pieces = text.split(self.image_token)
        replacements = [entry["replacement"] for entry in self.rows[row]]
        return "".join(
            piece + after for piece, after in zip(pieces, [*replacements[: len(pieces) - 1], ""], strict=True)
        )


def tokens_in_spans(offsets: Iterable[Span], spans: list[Span]) -> list[int]:
    """1 for each token that overlaps one of the spans."""
    return [int(any(start < end and a < end and b > start for start, end in spans)) for a, b in offsets]


def tokens_of_span(offsets: Sequence[Span], span: Span, text: str) -> list[int]:
    """Numbers of the tokens of a span. Of a token that crosses an edge, all characters on one side are white space.

    Raises:
        DataError: a token crosses an edge of the span.
    """
    tokens = []
    for number, (first, last) in enumerate(offsets):
        start, end = max(first, span[0]), min(last, span[1])
        if start >= end:
            continue
        outside = text[first:start] + text[end:last]
        if not outside.strip() and (text[start:end].strip() or not outside):
            tokens.append(number)
        elif text[start:end].strip():
            raise DataError(
                f"the token {text[first:last]!r} crosses the boundary of an assistant turn; use a chat template whose "
                "assistant turns begin and end with special tokens or line breaks.",
                kind="template",
            )
    return tokens


def _between(text: str, start: str, end: str) -> str:
    return text.partition(start)[2].partition(end)[0]


def _inserted(text: str, longer: str) -> str:
    """What ``longer`` has in addition to ``text``, which it begins and ends like."""
    same = next((place for place, (a, b) in enumerate(zip(text, longer, strict=False)) if a != b), len(text))
    return longer[same : len(longer) - (len(text) - same)]


def _plain(content: Any) -> str:
    if isinstance(content, (list, tuple)):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def _end_of(text: str, start: int, stop: int, content: str, number: int) -> int:
    end = end_of_answer(text, start, stop, content)
    if end is None:
        raise inexact(f"the content of turn {number} ({content[:40]!r}) is not found in the rendered conversation")
    return end
