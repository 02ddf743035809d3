"""Helpers of the readers: the fields of a record and which of them were used, turns, placeholders of images."""

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

_EMPTY = (None, "", [], {})


class Fields:
    """The fields of a record. It remembers which of them a reader has used.

    A field that is null counts as absent. ``identities``, ``boxes`` and ``id`` of the schema may be in a record of any
    format; :meth:`new_record` uses them. ``meta`` is free.

    Args:
        record: a record, as it is in the file.
        where: file and line, for messages.

    Raises:
        DataError: the record is not an object.
    """

    def __init__(self, record: Any, where: str) -> None:
        if not isinstance(record, dict):
            raise DataError(f"the record is {type(record).__name__} {quote(record)}; expected an object.", where=where)
        self.record = record
        self.where = where
        self._used = {"id", "identities", "boxes", "meta"}
        self._unused_parts: list[str] = []

    def take(self, name: str) -> Any:
        """Return the value of a field, None if it is absent, and note that it is used."""
        self._used.add(name)
        return self.record.get(name)

    def text(self, name: str) -> str:
        """Return a field that may be absent or a string; ``""`` if it is absent."""
        value = self.take(name)
        return "" if value is None else text_of(value, name, self.where)

    def images(self, *names: str) -> list[str]:
        """Return the images in the first of several fields that is not empty: a path, or a list of paths.

        Raises:
            DataError: several of the fields hold images, or one holds something else.
        """
        found = {name: value for name in names if (value := self.take(name)) not in _EMPTY}
        if len(found) > 1:
            raise DataError(f"{' and '.join(map(repr, found))} both hold images; keep one of them.", where=self.where)
        for name, value in found.items():
            if not isinstance(value, (str, list)):
                raise DataError(
                    f"{name} is {type(value).__name__} {quote(value)}; expected a path or a list of paths.",
                    where=self.where,
                )
            return [value] if isinstance(value, str) else [path_of(entry, name, self.where) for entry in value]
        return []

    def part(self, entry: dict, field: str, used: tuple[str, ...]) -> None:
        """Note that only the fields ``used`` of an object within the record are used."""
        self._unused_parts += [
            f"{field}.{name}" for name, value in entry.items() if name not in used and value not in _EMPTY
        ]

    def turns(self, field: str, role: str, content: str) -> list[tuple[str, Any]]:
        """Return ``(role of the schema, content)`` of every turn in the list ``record[field]``.

        Raises:
            DataError: there is no such list, or a turn without role or content, or a role that is not known.
        """
        turns = self.take(field)
        if not isinstance(turns, list):
            raise DataError(f"the record has no list {field!r}; choose the reader of its format.", where=self.where)
        found = []
        for number, turn in enumerate(turns):
            if not isinstance(turn, dict) or not {role, content} <= turn.keys():
                raise DataError(
                    f"{field}[{number}] is {quote(turn)}; expected an object {{{role!r}, {content!r}}}.",
                    where=self.where,
                )
            name = turn[role]
            if not isinstance(name, str) or name not in _ROLES:
                raise DataError(
                    f"role {quote(name)} is not known; choose one of {', '.join(map(repr, _ROLES))}.", where=self.where
                )
            self.part(turn, f"{field}[{number}]", (role, content))
            found.append((_ROLES[name], turn[content]))
        return found

    def new_record(self, messages: list[dict], identities: list[dict] | None = None) -> dict[str, Any]:
        """Return a record of the schema.

        Args:
            messages: the messages of the schema.
            identities: those that the text introduces. Those of the field ``identities`` come before them.

        Returns:
            The record. ``unused_fields`` lists the fields that were not used, if there are any that are not empty.
        """
        given = self.record.get("identities")
        if given is not None and not isinstance(given, list):
            raise DataError(f"identities is {type(given).__name__} {quote(given)}; expected a list.", where=self.where)
        record = {"identities": [*(given or []), *(identities or [])], "messages": messages}
        if self.record.get("id") is not None:
            record["id"] = self.record["id"]
        if self.record.get("meta") is not None:
            record["meta"] = self.record["meta"]
        boxes = self.record.get("boxes")
        if boxes is not None:
            record["boxes"] = self._boxes(boxes, images_of(messages))
        return record | self.unused()

    def unused(self) -> dict[str, list[str]]:
        """Return ``{"unused_fields": [...]}`` if there are fields that were not used and are not empty, else ``{}``."""
        names = [str(name) for name, value in self.record.items() if name not in self._used and value not in _EMPTY]
        return {"unused_fields": names + self._unused_parts} if names or self._unused_parts else {}

    def _boxes(self, boxes: Any, images: list[str]) -> list[Any]:
        """Replace the number of an image by its path. A box without an image lies in the only one."""
        if not isinstance(boxes, list):
            raise DataError(f"boxes is {type(boxes).__name__} {quote(boxes)}; expected a list.", where=self.where)
        found = []
        for number, box in enumerate(boxes):
            if isinstance(box, dict) and not isinstance(box.get("image"), str):
                field = f"boxes[{number}].image"
                box = {**box, "image": image_of_number(box.get("image"), images, field, self.where)}
            found.append(box)
        return found


def image_of_number(number: Any, images: list[str], field: str, where: str) -> str:
    """Return image ``number`` of the messages; None stands for the only one.

    Raises:
        DataError: there is no such image, or there are several.
    """
    if number is None and len(images) == 1:
        return images[0]
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(images):
        raise DataError(
            f"{field}={quote(number)} must be the path of an image or its number, from 0; the messages have "
            f"{len(images)} images.",
            where=where,
        )
    return images[number]


def text_of(value: Any, field: str, where: str) -> str:
    """Return ``value`` after checking that it is a string."""
    if not isinstance(value, str):
        raise DataError(f"{field}={quote(value)} is {type(value).__name__}; expected a string.", where=where)
    return value


def path_of(value: Any, field: str, where: str) -> str:
    """Return the path of an image: a string, or an object ``{"path"}`` as ``datasets`` stores it."""
    if isinstance(value, dict) and value.keys() <= {"path", "bytes"} and value.get("bytes") is None:
        value = value.get("path")
    if not isinstance(value, str):
        raise DataError(f"{field} holds {quote(value)}; expected the path of an image.", where=where)
    return value


def images_of(messages: list[dict]) -> list[str]:
    """Return the images of the messages of the schema, in order."""
    return [
        part["image"]
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image"
    ]


def interleave(texts: list[str], images: list[str]) -> list[dict[str, Any]]:
    """Return content parts: a text, an image, a text, ... Empty texts are left out."""
    parts = [{"type": "text", "text": texts[0]}]
    for image, text in zip(images, texts[1:], strict=True):
        parts += [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return [part for part in parts if part["type"] == "image" or part["text"]]


def check_placeholders(found: int, images: list[str], placeholder: str, field: str, where: str) -> None:
    """Raise DataError unless the number of placeholders is that of the images."""
    if found != len(images):
        raise DataError(
            f"the text has {found} {placeholder} but {field!r} has {len(images)} images; the numbers must be equal.",
            where=where,
            kind="placeholders",
        )


def texts_with_images(
    turns: list[tuple[str, str]], images: list[str], placeholder: str, field: str, where: str
) -> list[dict[str, Any]]:
    """Return messages in which the images, in order, take the place of the placeholders in the texts of ``turns``."""
    check_placeholders(sum(text.count(placeholder) for _, text in turns), images, placeholder, field, where)
    messages, rest = [], list(images)
    for role, text in turns:
        pieces = text.split(placeholder)
        count = len(pieces) - 1
        messages.append({"role": role, "content": interleave(pieces, rest[:count])})
        del rest[:count]
    return messages
