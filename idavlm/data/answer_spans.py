"""Where the answers of a rendered conversation are: shared by all that locate assistant turns by comparison."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from idavlm.data.errors import DataError

_MAX_OPENED = 200  # characters of an answer that a prompt may hold


def answered_turns(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of the assistant turns that follow a user turn. A greeting before the first question is no answer."""
    roles = [message["role"] for message in messages]
    first = roles.index("user") if "user" in roles else len(roles)
    return [number for number, role in enumerate(roles) if role == "assistant" and number > first]


def check_prompt(text: str, prompt: str, number: int, show: Callable[[str], str] = str) -> None:
    """Check that a conversation begins with the generation prompt of assistant turn ``number``.

    ``show`` restores hidden characters for the message.

    Raises:
        DataError: of kind ``"template"``, with the texts that differ.
    """
    if text.startswith(prompt):
        return
    same = next(place for place, (a, b) in enumerate(zip(text + "\0", prompt + "\1", strict=False)) if a != b)
    reason = (
        f"after {show(text[max(0, same - 40) : same])!r} the conversation continues with "
        f"{show(text[same : same + 20])!r}, the generation prompt of turn {number} with "
        f"{show(prompt[same : same + 20])!r}"
    )
    if "think" in prompt[same:] or "reason" in prompt[same:]:
        reason += (
            ", which opens a block that the answer does not have there. Begin the answer with this block, if the "
            "template keeps it in the turn, or use the template without thinking"
        )
    raise inexact(reason)


def end_of_answer(text: str, start: int, stop: int, content: str) -> int | None:
    """End of the content of an answer in the turn ``text[start:stop]``; None if it cannot be found.

    The template may have stripped the content, or written text before it, in which it must not occur. The prompt may
    hold the beginning of the content: a template whose prompt opens a thinking block, with which the answer begins.
    """
    for candidate in (content, content.strip()):
        if text.startswith(candidate, start):
            return start + len(candidate)
        for size in range(1, min(len(candidate), start, _MAX_OPENED) + 1):
            if text.startswith(candidate, start - size):
                return start - size + len(candidate)
        if text.count(candidate, start, stop) == 1:
            return text.index(candidate, start) + len(candidate)
    return None


def inexact(reason: str) -> DataError:
    """The error for answers that cannot be located."""
    return DataError(
        f"the assistant turns cannot be located exactly: {reason}. Use a chat template that marks them with "
        "{% generation %} ... {% endgeneration %}.",
        kind="template",
    )
