"""Helpers of the readers: names of roles, and checks of required fields."""

from typing import Any

from idavlm.data.errors import DataError, quote

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}


def turns_of(record: Any, field: str, role: str, content: str, where: str) -> list[tuple[str, Any]]:
    """Return ``(role of the schema, content)`` of every turn in the list ``record[field]``."""
    turns = record.get(field) if isinstance(record, dict) else None
    if not isinstance(turns, list):
        raise DataError(f"the record has no list {field!r}; choose the reader of its format.", where=where)
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not {role, content} <= turn.keys():
            raise DataError(
                f"{field}[{number}] is {quote(turn)}; expected an object {{{role!r}, {content!r}}}.", where=where
            )
    for turn in turns:
        name = turn[role]
        if not isinstance(name, str) or name not in _ROLES:
            raise DataError(
                f"role {quote(name)} is not known; choose one of {', '.join(map(repr, _ROLES))}.", where=where
            )
    return [(_ROLES[turn[role]], turn[content]) for turn in turns]


def text_of(value: Any, field: str, where: str) -> str:
    """Return ``value`` after checking that it is a string."""
    if not isinstance(value, str):
        raise DataError(f"{field}={quote(value)} is {type(value).__name__}; expected a string.", where=where)
    return value


def interleave(texts: list[str], images: list[str]) -> list[dict[str, str]]:
    """Return content parts: a text, an image, a text, ... Empty texts are left out."""
    parts = [{"type": "text", "text": texts[0]}]
    for image, text in zip(images, texts[1:], strict=True):
        parts += [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return [part for part in parts if part["type"] == "image" or part["text"]]


def new_record(record: dict, messages: list[dict], identities: list[dict] | None = None) -> dict[str, Any]:
    """Return a record of the schema with the ``id`` of ``record``, if it has one."""
    identifier = {"id": record["id"]} if record.get("id") is not None else {}
    return {**identifier, "identities": identities or [], "messages": messages}
