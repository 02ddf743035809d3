"""OpenAI's chat messages: the content is a string or a list of parts, images are ``image_url`` parts."""

from typing import Any

from idavlm.data.errors import DataError, quote
from idavlm.data.readers.turns import new_record, text_of, turns_of


def read_openai(record: Any, where: str) -> dict[str, Any]:
    """Read ``messages`` of ``{"role", "content"}``. The ``url`` of an image is its path below the image root."""
    messages = []
    for number, (role, content) in enumerate(turns_of(record, "messages", "role", "content", where)):
        if isinstance(content, list):
            content = [_part(part, f"messages[{number}].content[{i}]", where) for i, part in enumerate(content)]
        messages.append({"role": role, "content": content})
    return new_record(record, messages)


def _part(part: Any, field: str, where: str) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return {"type": "text", "text": text_of(part.get("text"), f"{field}.text", where)}
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        return {"type": "image", "image": text_of(url, f"{field}.image_url.url", where)}
    raise DataError(f"{field}.type={quote(kind)} is not known; choose one of 'text', 'image_url'.", where=where)
