"""Prompts: from messages, with photos or members of a bank as references, to the encoded input of one answer."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from idavlm.data.errors import DataError, quote
from idavlm.data.messages import OTHER_PARTS, conversation_to_sample, has_identities, read_conversation
from idavlm.data.photos import PhotoLoader
from idavlm.models import IdentityBank
from idavlm.models.stored_photos import StoredPhoto
from idavlm.utils import IGNORE_INDEX

_FIXED_SIZE = (8, 8)
"""Size of the blank image that stands for a stored photo where the processor brings all images to one size."""


class PromptTooLong(ValueError):
    """A prompt that has more tokens than allowed."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """One encoded prompt.

    Attributes:
        encoded: what ``processor.encode(sample, add_generation_prompt=True)`` returns.
        names: names of the identities, in the order of ``identity_index``.
        stored: for each reference, in the order of the images, the stored photo of a bank, or None for a photo that the
            vision tower encodes.
        scene_sizes: (height, width) of the images that are not references.
        question: text of the last user turn.
    """

    encoded: dict[str, Any]
    names: tuple[str, ...] = ()
    stored: tuple[StoredPhoto | None, ...] = ()
    scene_sizes: tuple[tuple[int, int], ...] = ()
    question: str = ""

    @property
    def num_tokens(self) -> int:
        """Number of tokens, image tokens included."""
        return len(self.encoded["input_ids"])

    def continued(self, answer: Sequence[int]) -> "Prompt":
        """The prompt followed by the beginning of its answer, as ``generate`` continues it.

        The identity of an answer's tokens is that of the last token of the prompt, see ``token_identity_index``.
        """
        length, encoded = self.num_tokens, dict(self.encoded)
        for name, value in self.encoded.items():
            if not isinstance(value, Tensor) or tuple(value.shape) != (length,):
                continue
            added = value.new_zeros(len(answer))
            if name == "input_ids":
                added = torch.tensor(answer, dtype=value.dtype)
            elif name == "token_identity_index":
                added += value[-1]
            elif name == "labels":
                added += IGNORE_INDEX
            encoded[name] = torch.cat([value, added])
        return replace(self, encoded=encoded)


class PromptEncoder:
    """Encodes messages for one model. Threads may share it.

    Args:
        processor: an :class:`idavlm.IDAVLMProcessor` or :class:`idavlm.IdentityProcessor`.
        max_tokens: largest number of tokens of a prompt; None for no limit.
        max_characters_per_token: a text with more characters than this times ``max_tokens`` is refused before it is
            tokenized, which would take seconds for megabytes of text.
    """

    def __init__(self, processor, *, max_tokens: int | None = None, max_characters_per_token: int = 32) -> None:
        self.processor = processor
        self.max_tokens = max_tokens
        self.max_characters = None if max_tokens is None else max_tokens * max_characters_per_token
        self._lock = threading.Lock()  # fast tokenizers refuse some calls from two threads

    def encode(
        self, messages: Sequence[dict[str, Any]], *, bank: IdentityBank | None = None, loader: Any = None
    ) -> Prompt:
        """Encode a conversation, which the model continues with an assistant turn.

        Args:
            messages: messages with parts ``text``, ``image`` and ``identity``. Identity parts without ``images`` are
                members of the bank. If there is a bank and no identity part, the first user turn introduces all its
                members.
            bank: encoded photos of the members.
            loader: loads images as :class:`idavlm.data.photos.PhotoLoader` does; by default one with the limits of the
                processor.

        Raises:
            DataError: messages, names or images that cannot be used, with their place.
            PromptTooLong: the prompt has more than ``max_tokens`` tokens.
        """
        read = read_conversation(_with_members(messages, bank))
        characters = sum(len(text) for _, text in read.texts)
        if self.max_characters is not None and characters > self.max_characters:
            raise PromptTooLong(f"the text has {characters} characters; the prompt may have {self.max_tokens} tokens.")
        loader = PhotoLoader(**self.processor.image_limits) if loader is None else loader
        images, stored = [], {}
        for photo in read.photos:
            if photo.key in OTHER_PARTS:
                raise DataError(f"{photo.field} is a {photo.key} part; prompts have text, images and identities.")
            if isinstance(photo.image, StoredPhoto):
                height, width = photo.image.size or _FIXED_SIZE
                images.append(Image.new("RGB", (width, height)))
                stored[id(images[-1])] = photo.image
            else:
                images.append(loader.load(photo.image, field=photo.field, key=photo.key))
        sample = conversation_to_sample(read, images)
        questions = ["".join(part.text for part in turn.content) for turn in sample.messages if turn.role == "user"]
        if not questions:
            raise DataError("messages have no user turn; add one.")
        with self._lock:
            encoded = self.processor.encode(sample, add_generation_prompt=True)
        prompt = Prompt(
            encoded,
            names=tuple(read.identities),
            stored=tuple(stored.get(id(image)) for image in sample.reference_images),
            scene_sizes=tuple((image.height, image.width) for image in sample.message_images),
            question=questions[-1],
        )
        if self.max_tokens is not None and prompt.num_tokens > self.max_tokens:
            raise PromptTooLong(
                f"the prompt has {prompt.num_tokens} tokens, more than the {self.max_tokens} that are allowed; shorten "
                "the text, or use fewer images."
            )
        return prompt


def _with_members(messages: Any, bank: IdentityBank | None) -> Any:
    """The messages, with the stored photos of a bank in identity parts that have no images."""
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, dict) for message in messages):
        return messages  # read_conversation says what is wrong
    messages = list(messages)
    if bank is not None and not has_identities(messages):
        first = next((number for number, message in enumerate(messages) if message.get("role") == "user"), None)
        if first is not None:
            members = [{"type": "identity", "name": name} for name in bank.names]
            content = messages[first].get("content")
            content = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
            messages[first] = {**messages[first], "content": [*members, *content]}
    for number, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            parts = [
                _with_photos(part, bank, f"messages[{number}].content[{place}]") for place, part in enumerate(content)
            ]
            messages[number] = {**message, "content": parts}
    return messages


def _with_photos(part: Any, bank: IdentityBank | None, field: str) -> Any:
    if not isinstance(part, dict) or part.get("type") != "identity" or part.get("images") is not None:
        return part
    name = part.get("name")
    if bank is None:
        raise DataError(f"{field} introduces {quote(name)} without images; add images, or name a bank.")
    if name not in bank:
        raise DataError(f"{field}.name={quote(name)} is not in the bank; add it, or pass images.")
    return {**part, "images": list(bank.photos(name))}
