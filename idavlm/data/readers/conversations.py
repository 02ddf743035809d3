"""Conversations of ``{"from", "value"}`` with one placeholder per image, and LLaMA-Factory's alpaca records."""

from typing import Any

from idavlm.data.errors import DataError, quote
from idavlm.data.readers.turns import Fields, text_of, texts_with_images


def read_llava(record: Any, where: str) -> dict[str, Any]:
    """Read LLaVA's format: ``image`` (a path, a list of paths, empty or absent) and ``<image>`` in the text.

    InternVL and the fine-tuning code of Qwen2.5-VL and Qwen3-VL use it, too. Images keep the position of their
    placeholder. (LLaVA's own code moves the image to the front of the turn.)
    """
    return _read(record, where, "image", "<image>")


def read_yi_vl(record: Any, where: str) -> dict[str, Any]:
    """Read Yi-VL's format: LLaVA's with ``<image_placeholder>``."""
    return _read(record, where, "image", "<image_placeholder>")


def read_sharegpt(record: Any, where: str) -> dict[str, Any]:
    """Read ShareGPT with images (LLaMA-Factory): ``images`` (a list of paths), ``<image>`` in the text, ``system``."""
    return _read(record, where, "images", "<image>")


def read_alpaca(record: Any, where: str) -> dict[str, Any]:
    """Read LLaMA-Factory's alpaca format: ``instruction``, ``input``, ``output``, ``history``, ``system``, ``images``.

    The question is the instruction and, on the next line, the input. The turns of ``history``, pairs of a question and
    an answer, precede it.
    """
    fields = Fields(record, where)
    if not {"instruction", "output"} <= fields.record.keys():
        raise DataError("the record has no 'instruction' and 'output'; choose the reader of its format.", where=where)
    history = fields.take("history") or []
    turns: list[tuple[str, str]] = []
    if not isinstance(history, list):
        raise DataError(f"history={quote(history)} must be a list of [question, answer].", where=where)
    for number, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"history[{number}]={quote(pair)} must be [question, answer].", where=where)
        question, answer = (text_of(text, f"history[{number}]", where) for text in pair)
        turns += [("user", question), ("assistant", answer)]
    texts = [text for text in (fields.text("instruction"), fields.text("input")) if text]
    turns += [("user", "\n".join(texts)), ("assistant", fields.text("output"))]
    system = fields.text("system")
    turns = [("system", system), *turns] if system else turns
    images = fields.images("images", "image")
    return fields.new_record(texts_with_images(turns, images, "<image>", "images", where))


def _read(record: Any, where: str, field: str, placeholder: str) -> dict[str, Any]:
    fields = Fields(record if isinstance(record, dict) else {}, where)
    turns = [
        (role, text_of(text, f"value of turn {number}", where))
        for number, (role, text) in enumerate(fields.turns("conversations", "from", "value"))
    ]
    images = fields.images(field)
    system = fields.text("system") if field == "images" else ""
    turns = [("system", system), *turns] if system else turns
    return fields.new_record(texts_with_images(turns, images, placeholder, field, where))
