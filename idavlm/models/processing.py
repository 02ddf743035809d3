"""The processor: from a sample of the schema to tensors, and from pairs of text and images to tensors."""

import re
import string
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from idavlm.data import Collator, DataError, ImageStore, Sample, render_chat
from idavlm.data.errors import quote, shorten
from idavlm.data.images import MAX_ASPECT_RATIO, MAX_PIXELS, size_problem
from idavlm.data.messages import (
    Conversation,
    conversation_of_text,
    conversation_to_sample,
    images_of_texts,
    is_batch,
    read_conversation,
    read_identities,
)
from idavlm.data.photos import PhotoLoader
from idavlm.data.rendering import Segment, count_chat_tokens
from idavlm.data.schema import Part
from idavlm.data.special_tokens import find_special_tokens, special_tokens
from idavlm.models.boxes import BoxFormat
from idavlm.models.chat_rendering import ChatTemplate, Span, references_in_text, with_reference_lines
from idavlm.models.crop_box import FULL_IMAGE, crop_box
from idavlm.models.identity_batch import image_fields
from idavlm.models.identity_names import NO_IDENTITY, find_names, propagate_names, split_at_names
from idavlm.models.packed_identities import FIELD, pack_token_identities
from idavlm.models.pretrained import resolve_pretrained
from idavlm.models.resized_size import resized_size
from idavlm.utils import IGNORE_INDEX, ImageRole, check_positive

ImageLoader = Callable[[Path | None, str], tuple[Tensor, tuple[int, int]]]

REFERENCE_LINE = "{name} is {image}\n"
"""Line of a reference that can be read from text."""

_TOKEN_FIELDS = ("input_ids", "attention_mask", "token_identity_index", "name_mask", "assistant_masks")


class IDAVLMProcessor(ProcessorMixin):
    """Prepares samples for :class:`IDAVLMForConditionalGeneration`.

    The references of all identities precede the first user turn, one line per reference photo. Each image becomes
    ``image_seq_length`` placeholders, and each box becomes text. These choices are saved with the processor. An option
    that is set later is checked like an argument and takes effect at once.

    Only the chat template and the formats write special tokens. In names, questions, answers and system texts, a string
    such as ``<|end|>`` is ordinary text (see :func:`idavlm.data.render_chat`); the placeholder is an error.

    Args:
        image_processor: a transformers image processor that brings all images to one size.
        tokenizer: a transformers tokenizer that has ``image_token`` as one token, and a chat template (or pass one).
        chat_template: replaces the chat template of the tokenizer.
        image_seq_length: number of image tokens per image, as in :class:`IDAVLMConfig`. None until
            ``from_parts(..., processor=processor)`` sets it.
        image_token: the placeholder.
        image_format: text of an image; ``{image}`` is the placeholder, for example ``<img>{image}</img>``.
        identity_format: line of a reference; ``{name}`` and ``{image}`` (in its ``image_format``) are replaced.
        box_format: see :class:`BoxFormat`.
        max_length: largest number of tokens of an encoded sample. A longer sample is an error and never cut. None for
            no limit.
        max_pixels: limit on width x height of an image. Larger images are refused before they are decoded.
        max_aspect_ratio: limit on the long side of an image, relative to the short side.

    Attributes:
        image_loader: function from an image root and a path to the prepared image and its original (height, width).
            None stands for :meth:`load_image`. Set it to an :class:`ImageFeatures` to use features of a frozen tower in
            place of image files, or to ``functools.lru_cache(maxsize=None)(processor.load_image)`` to keep prepared
            images in memory.

    Raises:
        ValueError: parts or formats that do not fit, with the argument and the remedy.
    """

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template: str | None = None,
        image_seq_length: int | None = None,
        image_token: str = "<image>",
        image_format: str = "{image}",
        identity_format: str = REFERENCE_LINE,
        box_format: str = "thousand",
        max_length: int | None = None,
        pack_identities: bool = False,
        max_pixels: int = MAX_PIXELS,
        max_aspect_ratio: int = MAX_ASPECT_RATIO,
        **kwargs,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_format = image_format
        self.identity_format = identity_format
        self.box_format = box_format
        self.max_length = max_length
        self.pack_identities = pack_identities
        self.max_pixels = max_pixels
        self.max_aspect_ratio = max_aspect_ratio
        self.image_loader: ImageLoader | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Check an option whenever it is set. Nothing is derived from options in advance."""
        if name in ("image_seq_length", "max_length"):
            check_positive(**{name: value})
        elif name in ("max_pixels", "max_aspect_ratio"):
            if value is None:
                raise ValueError(f"{name}=None must be an integer of at least 1.")
            check_positive(**{name: value})
        elif name == "image_format":
            _check_format(name, value, fields=("image",))
        elif name == "identity_format":
            _check_format(name, value, fields=("name", "image"))
            _check_packing(self.__dict__.get("pack_identities", False), value)
        elif name == "box_format":
            BoxFormat(value)
        elif name == "pack_identities":
            _check_packing(value, self.identity_format)
        elif name == "image_token":
            _check_image_token(self.tokenizer, value)
        elif name == "tokenizer" and "image_token" in self.__dict__:
            _check_image_token(value, self.image_token)
        elif name == "image_processor":
            if self.__dict__.get("image_loader") is not None:
                raise ValueError(
                    "image_loader holds images that the present image_processor prepared; set image_loader=None before "
                    "another image_processor."
                )
            self.__dict__["_pixels_shape"] = (_sizes_of(value), _check_fixed_size(value))
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "IDAVLMProcessor":
        """``ProcessorMixin.from_pretrained``; loads the models of the package (``"idavlm-tiny"``) by their names."""
        return super().from_pretrained(resolve_pretrained(pretrained_model_name_or_path), **kwargs)

    @property
    def image_token_id(self) -> int:
        """Id of the placeholder."""
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_roles", "sample_index", "identity_index"]

    def to_dict(self, *args, **kwargs) -> dict[str, Any]:
        loader, self.image_loader = self.image_loader, None  # to_dict copies all attributes; a loader may be large
        try:
            output = super().to_dict(*args, **kwargs)
        finally:
            self.image_loader = loader
        for name in ("image_loader", "_pixels_shape"):
            output.pop(name, None)
        return output

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        add_generation_prompt: bool = False,
        return_assistant_tokens_mask: bool = False,
        padding_side: str | None = None,
        image_root: str | Path | None = None,
        allow_urls: bool = False,
        sanitize_control_tokens: bool = False,
        **kwargs,
    ):
        """Render messages as text, or make the inputs of the model from them, as in transformers.

        Content parts are ``text``, ``image`` and ``{"type": "identity", "name": "Kate", "images": [...]}``. Images are
        paths, PIL images or the bytes of a file.

        Args:
            conversation: messages, or a list of conversations.
            chat_template: replaces the chat template of the processor.
            tokenize: whether to return inputs of the model instead of text.
            return_dict: return all inputs of the model; otherwise ``input_ids`` alone.
            add_generation_prompt: end with the header of an assistant turn.
            return_assistant_tokens_mask: also return ``assistant_masks`` ``[B, T]``, 1 at tokens of assistant turns.
            padding_side: ``"left"`` by default with ``add_generation_prompt``, otherwise ``"right"``.
            image_root: folder of relative image paths; the working directory by default.
            allow_urls: whether URLs and base64 text are allowed as images.
            sanitize_control_tokens: whether ``image_token`` in the text of a message is an error, too.
            kwargs: with ``tokenize=True``, ``return_tensors="pt"`` for tensors, padded to the longest row (without it,
                the fields of tokens are lists); ``truncation`` and ``max_length``; ``processor_kwargs`` with the same.
                With ``tokenize=False``, variables of the chat template.

        Raises:
            DataError: messages or images that cannot be used, with the place in the messages.
            ValueError: with ``tokenize=False``, the text of a message holds a special token other than ``image_token``:
                rendered text does not tell it from those of the template. Or an argument that cannot take effect, or
                truncation that would cut an image.
        """
        chat_template = chat_template or self.chat_template
        conversations = list(conversation) if is_batch(conversation) else [conversation]
        if not tokenize:
            self._check_rendered(conversations, sanitize_control_tokens)
            texts = [
                self._render(messages, chat_template, add_generation_prompt=add_generation_prompt, **kwargs)
                for messages in conversations
            ]
            return texts if is_batch(conversation) else texts[0]
        options = _tokenize_options(kwargs)
        loader = PhotoLoader(image_root, allow_urls=allow_urls, **self.image_limits)
        samples = []
        for messages in conversations:
            read = read_conversation(messages)
            images = [loader.load(photo.image, field=photo.field, key=photo.key) for photo in read.photos]
            samples.append(conversation_to_sample(read, images))
        encoded = [
            self._encode(sample, chat_template, add_generation_prompt=add_generation_prompt) for sample in samples
        ]
        if options.get("truncation"):
            limit = options.get("max_length") or self.tokenizer.model_max_length
            encoded = [self._truncated(one, limit, row) for row, one in enumerate(encoded)]
        side = padding_side or options.get("padding_side") or ("left" if add_generation_prompt else "right")
        batch = self.collate(encoded, padding_side=side)
        labels = batch.pop("labels")
        for name in ("boxes", "box_image", "box_identity", "image_sizes"):
            batch.pop(name)
        if return_assistant_tokens_mask:
            batch["assistant_masks"] = (labels != IGNORE_INDEX).long()
        if options.get("return_tensors") is None:
            is_token = batch["attention_mask"].bool() | bool(options.get("padding"))
            for name in _TOKEN_FIELDS:
                if name in batch:
                    batch[name] = [row[kept].tolist() for row, kept in zip(batch[name], is_token, strict=True)]
        return BatchFeature(batch) if return_dict else batch["input_ids"]

    def _truncated(self, encoded: dict[str, Tensor], limit: int, row: int) -> dict[str, Tensor]:
        ids = encoded["input_ids"]
        if (ids[limit:] == self.image_token_id).any():
            raise ValueError(
                f"row {row} has {len(ids)} tokens; truncation to max_length={limit} would cut image placeholders. "
                "Raise max_length or switch truncation off, use fewer images, or shorten the text."
            )
        fields = ("input_ids", "labels", "token_identity_index", "name_mask")
        return {name: value[:limit] if name in fields else value for name, value in encoded.items()}

    def _render(self, messages, chat_template: str, **kwargs) -> str:
        read = read_conversation(messages)
        sample = conversation_to_sample(read, [photo.image for photo in read.photos])
        self._check_order(read, sample)
        texts = [
            {"role": message["role"], "content": "".join(segment.text for segment in message["content"])}
            for message in self._messages(sample, {}, check_text=False)
        ]
        return super().apply_chat_template(texts, chat_template=chat_template, tokenize=False, **kwargs)

    @staticmethod
    def _check_order(read: Conversation, sample: Sample) -> None:
        """Check that references precede all other images, one identity after the other, as in the rendered text."""
        identities = [photo.identity for photo in read.photos]
        num_references = len(sample.reference_images)
        if None in identities[:num_references] or identities[:num_references] != sorted(identities[:num_references]):
            raise DataError(
                "the text of messages has the images in another order than the messages: put the photos of each "
                "identity side by side, and before all other images."
            )

    def _check_rendered(self, conversations: list, sanitize_control_tokens: bool) -> None:
        allowed = () if sanitize_control_tokens else (self.image_token,)
        for role, text in _texts_of_messages(conversations):
            for token in find_special_tokens(self.tokenizer, text):
                if token not in allowed:
                    raise ValueError(
                        f"a message of {role!r} holds the special token {token!r} ({text[:60]!r}), which could end or "
                        "forge a turn; remove it, or pass a record to encode(), where it is ordinary text."
                    )

    def __call__(self, images=None, text=None, *, identities=None, **kwargs) -> BatchFeature:
        """Prepare text with ``image_token`` for each image, and these images, as in transformers.

        The line ``Kate is <image>`` makes the image a reference of Kate, if ``identity_format`` is the default. The
        text is a prompt: special tokens in it are special tokens. :meth:`apply_chat_template` builds one and refuses
        messages that hold special tokens.

        Args:
            images: all images, in the order of the texts, or a list of images for each text.
            text: a string or a list of strings.
            identities: references that the text does not hold, which precede it: for each text
                ``[{"name", "images"}, ...]`` or ``{name: photos}``.
            kwargs: arguments of the tokenizer (``padding``, ``return_tensors``).

        Returns:
            The output of the tokenizer. With images, ``pixel_values``, ``image_roles`` and ``sample_index`` as well.
            With identities, also ``identity_index``, ``token_identity_index`` and ``name_mask``, or with
            ``pack_identities`` only ``pixel_values`` and ``mm_token_type_ids``.

        Raises:
            DataError: another number of placeholders than of images, images that cannot be read, faults in
                ``identities``.
            ValueError: truncation that would cut an image.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        named = read_identities(identities, len(texts))
        image_text = self.image_format.format(image=self.image_token)
        references = self._references_in(texts, image_text)
        rows = images_of_texts(images, [len(row) for row in references])
        conversations = [conversation_of_text(*row) for row in zip(named, rows, references, strict=True)]
        loader = PhotoLoader(**self.image_limits)
        photos = [
            loader.load(photo.image, field=photo.field or f"images[{place}]")
            for conversation in conversations
            for place, photo in enumerate(conversation.photos)
        ]
        texts = [
            with_reference_lines(
                self._with_image_format(entry, image_text),
                of_text,
                self.identity_format,
                image_text,
                self.image_token,
                tokenizer=self.tokenizer,
                field=f"text[{row}]",
            )
            for row, (entry, of_text) in enumerate(zip(texts, named, strict=True))
        ]
        has_identities = any(conversation.identities for conversation in conversations)
        if has_identities and not self.tokenizer.is_fast:
            raise ValueError("identities need a fast tokenizer, which says where names are; load one (use_fast=True).")
        answers = [self._answers_in(entry) if has_identities else [] for entry in texts]
        if photos:
            placeholders = self.image_token * self._num_image_tokens()
            answers = [self._shifted(spans, entry) for spans, entry in zip(answers, texts, strict=True)]
            texts = [entry.replace(self.image_token, placeholders) for entry in texts]
        options = {"return_tensors": "pt", "padding": len(texts) > 1, "return_token_type_ids": False, **kwargs}
        bos = self.tokenizer.bos_token
        if bos is not None and texts and texts[0].startswith(bos):
            options.setdefault("add_special_tokens", False)
        if self.pack_identities:
            options.setdefault("padding_side", "left")
        if has_identities and options["return_tensors"] != "pt":
            raise ValueError(f"return_tensors={options['return_tensors']!r} cannot hold identities; use 'pt'.")
        batch = self.tokenizer(texts, **{**options, "return_offsets_mapping": has_identities or None})
        if not photos:
            return BatchFeature(dict(batch))
        self._check_placeholders(batch["input_ids"], conversations)
        batch["pixel_values"] = self._pixels(photos)
        fields = image_fields(conversations)
        if has_identities:
            offsets = batch.pop("offset_mapping").tolist()
            names = [conversation.identities for conversation in conversations]
            fields |= self._token_fields(texts, names, answers, batch["input_ids"], batch["attention_mask"], offsets)
            if self.pack_identities:
                ids, length = batch["input_ids"], self._num_image_tokens()
                fields = {FIELD: pack_token_identities(ids, fields, self.image_token_id, length)}
        else:
            del fields["identity_index"]
        return BatchFeature({**batch, **fields})

    def _references_in(self, texts: list[str], image_text: str) -> list[list[str | None]]:
        """For each image of each text the name that it is a reference of, or None."""
        if self.identity_format != REFERENCE_LINE:
            return [[None] * text.count(self.image_token) for text in texts]
        template = self._template()
        header = "" if template is None else template.facts.header
        special = special_tokens(self.tokenizer)
        return [
            references_in_text(text, image_text, self.image_token, header=header, special=special) for text in texts
        ]

    def _template(self) -> ChatTemplate | None:
        """The chat template; None if there is none that takes an image."""
        if not self.chat_template:
            return None
        template = ChatTemplate(self.tokenizer, self.chat_template, self.image_token)
        try:
            template.facts  # noqa: B018
        except DataError:
            return None
        return template

    def _answers_in(self, text: str) -> list[Span]:
        template = self._template()
        try:
            return [] if template is None else template.answers_in_text(text)
        except DataError:  # a template that takes no assistant turns
            return []

    def _with_image_format(self, text: str, image_text: str) -> str:
        """Write the text of an image around placeholders that stand alone."""
        return image_text.join(piece.replace(self.image_token, image_text) for piece in text.split(image_text))

    def _shifted(self, spans: list[Span], text: str) -> list[Span]:
        """Spans of a text after each placeholder was repeated."""
        grown = len(self.image_token) * (self._num_image_tokens() - 1)
        return [tuple(edge + grown * text.count(self.image_token, 0, edge) for edge in span) for span in spans]

    def _check_placeholders(self, input_ids, conversations: list[Conversation]) -> None:
        for row, (ids, conversation) in enumerate(zip(input_ids, conversations, strict=True)):
            found = (torch.as_tensor(ids) == self.image_token_id).sum().item()
            expected = len(conversation.photos) * self._num_image_tokens()
            if found != expected:
                raise ValueError(
                    f"row {row} has {found} image placeholders in place of {expected}: truncation to max_length would "
                    "cut an image. Raise max_length or switch truncation off, use fewer images, or shorten the text."
                )

    def _token_fields(
        self,
        texts: list[str],
        names: list[list[str]],
        answers: list[list[Span]],
        input_ids: Tensor,
        attention_mask: Tensor,
        offsets: list[list[Span]],
    ) -> dict[str, Tensor]:
        """``token_identity_index`` and ``name_mask`` of texts with repeated placeholders, as in :meth:`encode`."""
        markup = re.compile("|".join(map(re.escape, [*special_tokens(self.tokenizer), self.image_token])))
        index, mask = torch.full_like(input_ids, NO_IDENTITY), torch.zeros_like(input_ids, dtype=torch.bool)
        for row, text in enumerate(texts):
            tags = [match.span() for match in markup.finditer(text)]
            outside = answers[row]
            found = [
                (start, end, identity)
                for start, end, identity in find_names(text, names[row])
                if not any(a < end and start < b and not (start <= a and b <= end) for a, b in tags)
                and not any(a < end and start < b for a, b in outside)
            ]
            spelled = [
                next((identity for a, b, identity in found if a < end and start < b), NO_IDENTITY)
                for start, end in offsets[row]
            ]
            in_answer = [any(a <= start < b for a, b in outside) and start < end for start, end in offsets[row]]
            ids = input_ids[row].tolist()
            labels = [token if inside else IGNORE_INDEX for token, inside in zip(ids, in_answer, strict=True)]
            index[row] = torch.tensor(propagate_names(spelled, ids, labels, self.image_token_id))
            mask[row] = torch.tensor(spelled) != NO_IDENTITY
        return {
            "token_identity_index": index.where(attention_mask.bool(), NO_IDENTITY),
            "name_mask": mask & attention_mask.bool(),
        }

    def encode(self, sample: Sample, *, add_generation_prompt: bool = False) -> dict[str, Tensor]:
        """Encode one sample. Its images may be PIL images.

        Args:
            sample: a checked record; its images are opened below its ``image_root``.
            add_generation_prompt: end with the header of an assistant turn, for generation.

        Returns:
            ``input_ids``, ``labels``, ``token_identity_index`` and ``name_mask`` ``[T]``; ``pixel_values``
            ``[I, 3, H, W]`` or, from an ``image_loader`` of features, ``image_features`` ``[I, P, Cv]``;
            ``image_roles``, ``identity_index`` ``[I]`` and ``image_sizes`` ``[I, 2]``, where references come first,
            identity by identity, then the images of the messages; ``boxes`` ``[N, 4]``, ``box_image`` and
            ``box_identity`` ``[N]`` of the identities with references. Boxes are in pixels of the original image. If
            the image processor crops or pads, they are moved accordingly.

        Raises:
            DataError: images that cannot be read, text that holds the placeholder or a special token that the tokenizer
                cannot take as text, boxes outside their image, a sample longer than ``max_length``.
            ValueError: the sample has identities and the tokenizer is slow.
        """
        return self._encode(sample, self.chat_template, add_generation_prompt=add_generation_prompt)

    def _encode(self, sample: Sample, chat_template: str, *, add_generation_prompt: bool) -> dict[str, Tensor]:
        images = [self._load(sample.image_root, image) for image in sample.images]
        sizes = [size for _, size in images]
        num_references = len(sample.reference_images)
        # Boxes name their image by its path.
        in_messages = zip(sample.message_images, sizes[num_references:], strict=True)
        scene_sizes = {image: size for image, size in in_messages if isinstance(image, str)}
        sample = sample.with_pixel_boxes(scene_sizes.__getitem__)
        for box in sample.all_boxes:
            height, width = scene_sizes[box.image]
            x1, y1, _, _ = _as_float32(box.box)
            if x1 >= width or y1 >= height:
                raise DataError(
                    f"sample {quote(sample.id)}: the box {box.box} of {quote(box.name)} lies outside "
                    f"{quote(box.image)} of {width} x {height} pixels; boxes are in pixels of the original image."
                )
        messages = self._messages(sample, scene_sizes)
        input_ids, labels, identities_of_tokens = render_chat(
            self.tokenizer, messages, add_generation_prompt=add_generation_prompt, chat_template=chat_template
        )
        if not input_ids or input_ids.count(self.image_token_id) != len(images):
            raise DataError(
                f"sample {quote(sample.id)} has {len(images)} images, but the chat template makes {len(input_ids)} "
                f"tokens with {input_ids.count(self.image_token_id)} placeholders of it; change the text or use a "
                "template that renders every message once.",
                kind="template",
            )
        answers = labels
        if add_generation_prompt and sample.identities:
            answers = self._labels_of_earlier_answers(sample, messages, input_ids)
        names = [NO_IDENTITY if identity is None else identity for identity in identities_of_tokens]
        token_identity_index = propagate_names(names, input_ids, answers, self.image_token_id)
        name_mask = [identity != NO_IDENTITY for identity in names]
        input_ids, labels, token_identity_index, name_mask = self._repeat_placeholders(
            input_ids, labels, token_identity_index, name_mask
        )
        if self.max_length is not None and len(input_ids) > self.max_length:
            raise DataError(
                f"sample {quote(sample.id)} has {len(input_ids)} tokens, more than max_length={self.max_length}; use "
                "fewer images or raise max_length.",
                kind="length",
            )
        role = ImageRole.SCENE if sample.identities else ImageRole.GENERAL
        roles = [int(ImageRole.REFERENCE)] * num_references + [int(role)] * len(sample.message_images)
        identities = [number for number, identity in enumerate(sample.identities) for _ in identity.images]
        return {
            "input_ids": input_ids,
            "labels": labels,
            "token_identity_index": token_identity_index,
            "name_mask": name_mask,
            **self._image_tensors([image for image, _ in images]),
            "image_roles": torch.tensor(roles, dtype=torch.long),
            "identity_index": torch.tensor(identities + [0] * len(sample.message_images), dtype=torch.long),
            "image_sizes": torch.tensor(sizes, dtype=torch.long).view(-1, 2),
            **self._box_tensors(sample, scene_sizes),
        }

    def collate(self, encoded: list[dict[str, Tensor]], *, padding_side: str = "right") -> dict[str, Tensor]:
        """Batch encoded samples. Use ``padding_side="left"`` for generation."""
        return Collator(self.tokenizer.pad_token_id, padding_side=padding_side)(encoded)

    def num_tokens(self, sample: Sample) -> int:
        """Number of tokens of :meth:`encode`, without decoding an image.

        Of images with boxes in the messages, the header is read. The EXIF orientation of a PNG may be overlooked.
        """
        size_in_file = getattr(self.image_loader, "size", None) or self._size_in_file

        def size_of(image: str | Image.Image) -> tuple[int, int]:
            return size_in_file(sample.image_root, image)

        sample = sample.with_pixel_boxes(size_of)
        located = {part.image for message in sample.messages for part in message.content if part.type == "box"}
        messages = self._messages(sample, {image: size_of(image) for image in located})
        text = count_chat_tokens(self.tokenizer, messages, chat_template=self.chat_template)
        return text + (len(sample.images) * (self._num_image_tokens() - 1) if sample.images else 0)

    def parse_box(self, text: str, image_size: tuple[int, int], *, name: str = "") -> list[float] | None:
        """Return the box in ``text`` in pixels of an image of (height, width), see :meth:`BoxFormat.parse`."""
        return self.read_box(text, image_size, name=name)[0]

    def read_box(
        self, text: str, image_size: tuple[int, int] | None, *, name: str = "", other_names: Sequence[str] = ()
    ) -> tuple[list[float] | None, str | None]:
        """As :meth:`parse_box`, with the reason why there is no box, see :meth:`BoxFormat.read`."""
        return BoxFormat(self.box_format).read(text, image_size, name=name, other_names=other_names)

    def read_boxes(self, text: str, image_size: tuple[int, int] | None) -> tuple[list[list[float]], str | None]:
        """All boxes in ``text``, see :meth:`BoxFormat.read_boxes`."""
        return BoxFormat(self.box_format).read_boxes(text, image_size)

    def load_image(self, root: Path | None, path: str) -> tuple[Tensor, tuple[int, int]]:
        """Load and prepare an image file: pixels ``[3, H, W]``, and the (height, width) of the original.

        Raises:
            DataError: the image cannot be read or processed, would be too large after resizing, or there is no root.
        """
        if root is None:
            raise DataError(
                f"image {quote(path)} has no image_root; pass one to the data set.", kind="image", file=path
            )
        image = ImageStore(root, **self.image_limits).open(path)
        return self._prepare(path, image)

    def _size_in_file(self, root: Path | None, image: str | Image.Image) -> tuple[int, int]:
        if isinstance(image, Image.Image):
            return image.height, image.width
        return ImageStore(root or Path.cwd(), **self.image_limits).size(image)

    def _load(self, root: Path | None, image: str | Image.Image) -> tuple[Tensor, tuple[int, int]]:
        if isinstance(image, Image.Image):
            return self._prepare("a PIL image", image)
        return (self.image_loader or self.load_image)(root, image)

    def _prepare(self, path: str, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        try:
            pixels = self._pixels([image])[0]
        except MemoryError:
            raise
        except Exception as error:  # other images pass, so this one's shape is the cause
            raise self._refused(path, image, f"{type(error).__name__}: {shorten(str(error))}") from error
        sizes, shape = self._pixels_shape
        if sizes != _sizes_of(self.image_processor):  # changed in place
            shape = _check_fixed_size(self.image_processor)
            self.__dict__["_pixels_shape"] = (_sizes_of(self.image_processor), shape)
        if pixels.shape != shape:
            shapes = f"{list(pixels.shape)} in place of {list(shape)}"
            raise self._refused(path, image, f"its output has shape {shapes}")
        return pixels, (image.height, image.width)

    @property
    def image_limits(self) -> dict[str, Any]:
        """The limits on images as arguments of :class:`idavlm.data.ImageStore`."""
        limits = {"max_pixels": self.max_pixels, "max_aspect_ratio": self.max_aspect_ratio}
        return {**limits, "resized_size": partial(resized_size, self.image_processor)}

    def _refused(self, path: str, image: Image.Image, problem: str) -> DataError:
        return DataError(
            f"image {quote(path)} of {image.width} x {image.height} pixels cannot be prepared by "
            f"{type(self.image_processor).__name__} ({problem}); crop, pad or scale it.",
            kind="image",
            file=path,
        )

    def _num_image_tokens(self) -> int:
        if self.image_seq_length is None:
            raise ValueError(
                "image_seq_length is not set; pass the processor to IDAVLMForConditionalGeneration.from_parts(..., "
                "processor=processor), or build it with image_seq_length, the num_queries of the model."
            )
        return self.image_seq_length

    def _pixels(self, images: list) -> Tensor:
        for number, image in enumerate(images):
            if isinstance(image, Image.Image):
                size = (image.height, image.width)
                problem = size_problem(size, **self.image_limits)
                if problem:
                    raise ValueError(f"images[{number}] {problem}.")
        return self.image_processor(images, return_tensors="pt")["pixel_values"]

    def _image_tensors(self, images: list[Tensor]) -> dict[str, Tensor]:
        """Stack loaded images: features ``[P, Cv]`` or pixels ``[3, H, W]``."""
        features_shape = getattr(self.image_loader, "shape", None)  # of an ImageFeatures: images, P, Cv
        if not images and features_shape is not None:
            return {"image_features": torch.zeros(0, *features_shape[1:])}
        if images and images[0].dim() == 2:
            return {"image_features": torch.stack(images).float()}
        return {"pixel_values": torch.stack(images) if images else torch.zeros(0, 3, 0, 0)}

    def _messages(
        self, sample: Sample, image_sizes: dict[str, tuple[int, int]], *, check_text: bool = True
    ) -> list[dict[str, Any]]:
        """Render the conversation as segments with one placeholder per image.

        References precede the first user turn. Names are segments of their own, except in answers. With
        ``check_text=False``, placeholders in the text are not refused.
        """
        names = [identity.name for identity in sample.identities]
        for name in (*names, *(box.name for box in sample.boxes)) if check_text else ():
            self._check_text(sample, name)
        image = Segment(self.image_format.format(image=self.image_token), is_markup=True)
        lines = [
            segment
            for identity in sample.identities
            for _ in identity.images
            for segment in self._identity_line(identity.name, image)
        ]
        messages = []
        for message in sample.messages:
            content = []
            if message.role == "user":
                content, lines = lines, []
            for part in message.content:
                if part.type == "image":
                    content.append(image)
                elif part.type == "box":
                    content += self._box_text(sample, part, image_sizes)
                else:
                    content.append(Segment(part.text))
            for is_markup, run in groupby(content, key=lambda segment: segment.is_markup):
                if check_text and not is_markup:  # two parts may hold the placeholder together
                    self._check_text(sample, "".join(segment.text for segment in run))
            content = content if message.role == "assistant" else split_at_names(content, names)
            messages.append({"role": message.role, "content": content})
        return messages

    def _identity_line(self, name: str, image: Segment) -> Iterator[Segment]:
        for literal, field, _, _ in string.Formatter().parse(self.identity_format):
            if literal:
                yield Segment(literal, is_markup=True)
            if field is not None:
                yield image if field == "image" else Segment(name)

    def _box_text(self, sample: Sample, part: Part, image_sizes: dict[str, tuple[int, int]]) -> list[Segment]:
        box, form = sample.box_of_part(part), BoxFormat(self.box_format)
        if not part.name:
            return [Segment(form.write("", box.box, image_sizes[box.image]), is_markup=True)]
        before, after = form.around_name(box.box, image_sizes[box.image])
        name = [Segment(before, is_markup=True), Segment(part.name)] if form.writes_name else []
        return [*name, Segment(after, is_markup=True)]

    def _labels_of_earlier_answers(
        self, sample: Sample, messages: list[dict[str, Any]], input_ids: list[int]
    ) -> list[int]:
        """Label the answers that a prompt contains, so that their names are treated in generation as in training."""
        ids, labels, _ = render_chat(self.tokenizer, messages, chat_template=self.chat_template)
        end = max((position + 1 for position, label in enumerate(labels) if label != IGNORE_INDEX), default=0)
        if ids[:end] != input_ids[:end]:
            raise DataError(
                f"sample {quote(sample.id)}: with a generation prompt the chat template renders earlier turns "
                "differently than in training; use a template that adds the prompt and changes nothing else.",
                kind="template",
            )
        return labels[:end] + [IGNORE_INDEX] * (len(input_ids) - end)

    def _check_text(self, sample: Sample, text: str) -> None:
        if self.image_token in text:
            raise DataError(
                f"sample {quote(sample.id)}: the text {quote(text)} holds the placeholder {self.image_token!r}; make "
                "it an image part.",
                kind="placeholders",
            )

    def _repeat_placeholders(self, input_ids: list[int], *others: list) -> tuple[Tensor, ...]:
        """Repeat each placeholder ``image_seq_length`` times, and the values of ``others`` at these positions."""
        rows = [torch.tensor(values) for values in (input_ids, *others)]
        is_image = rows[0] == self.image_token_id
        repeats = torch.where(is_image, self._num_image_tokens() if is_image.any() else 1, 1)
        return tuple(row.repeat_interleave(repeats) for row in rows)

    def _box_tensors(self, sample: Sample, image_sizes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
        """Return the boxes of identities with references, as far as the image processor keeps them.

        If an image occurs several times in the messages, each occurrence has its boxes.
        """
        number = {identity.name: index for index, identity in enumerate(sample.identities)}
        boxes, box_image, box_identity = [], [], []
        for box in sample.boxes:
            kept = self._crop(box.box, image_sizes[box.image])
            if box.name not in number or kept is None:
                continue
            for image, path in enumerate(sample.message_images, len(sample.reference_images)):
                if path == box.image:
                    boxes.append(kept)
                    box_image.append(image)
                    box_identity.append(number[box.name])
        return {
            "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
            "box_image": torch.tensor(box_image, dtype=torch.long),
            "box_identity": torch.tensor(box_identity, dtype=torch.long),
        }

    def _crop(self, box: list[float], size: tuple[int, int]) -> list[float] | None:
        """Move a box as if the image processor's crop were the whole image. None if nothing of it is left."""
        kept = crop_box(self.image_processor, size)
        if kept == FULL_IMAGE:
            return box
        left, top, right, bottom = kept
        height, width = size
        x1, x2 = (min(max((x / width - left) / (right - left), 0.0), 1.0) * width for x in (box[0], box[2]))
        y1, y2 = (min(max((y / height - top) / (bottom - top), 0.0), 1.0) * height for y in (box[1], box[3]))
        x1, y1, x2, y2 = _as_float32([x1, y1, x2, y2])
        return [x1, y1, x2, y2] if x1 < min(x2, width) and y1 < min(y2, height) else None


def _as_float32(box: list[float]) -> list[float]:
    """Round a box to the precision of encoded boxes, so that it is checked as the model will see it."""
    return torch.tensor(box, dtype=torch.float32).tolist()


def _sizes_of(image_processor) -> str:
    return str([getattr(image_processor, name, None) for name in ("size", "crop_size", "pad_size")])


def _tokenize_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The options of ``apply_chat_template(tokenize=True)``. Those that cannot take effect are refused."""
    options = {**kwargs, **(kwargs.pop("processor_kwargs", None) or {})}
    options.pop("processor_kwargs", None)
    accepted = {
        "return_tensors": (None, "pt"),
        "padding": (None, True, False, "longest"),
        "padding_side": (None, "left", "right"),
        "pad_to_multiple_of": (None,),
        "truncation": (None, True, False, "longest_first"),
        "add_special_tokens": (None, False),
        "continue_final_message": (None, False),
        "tools": (None,),
        "documents": (None,),
    }
    if options.get("truncation"):
        accepted["max_length"] = (options.get("max_length"),)
    for name, value in options.items():
        if value is not None and (name not in accepted or value not in accepted[name]):
            raise ValueError(
                f"{name}={value!r} cannot take effect with tokenize=True; leave it out. Images have a fixed number of "
                "tokens, and rows are padded to the longest."
            )
    return options


def _texts_of_messages(conversation: Any) -> Iterator[tuple[str, str]]:
    """Role and text of each message of one conversation or of several."""
    for message in conversation:
        if isinstance(message, (list, tuple)):
            yield from _texts_of_messages(message)
            continue
        role, content = str(message.get("role")), message.get("content")
        for part in [content] if isinstance(content, str) else content or []:
            text = part if isinstance(part, str) else part.get("text")
            if isinstance(text, str):
                yield role, text


def _check_image_token(tokenizer, image_token: str) -> None:
    token_id = tokenizer.convert_tokens_to_ids(image_token)
    if token_id is None or token_id == tokenizer.unk_token_id:
        raise ValueError(
            f"image_token={image_token!r} is not a token of the tokenizer; call "
            f"tokenizer.add_tokens([{image_token!r}], special_tokens=True) first."
        )


def _check_packing(pack_identities: bool, identity_format: str) -> None:
    if pack_identities and identity_format != REFERENCE_LINE:
        raise ValueError(
            f"pack_identities=True reads lines of the form 'Kate is <image>', but identity_format={identity_format!r}; "
            f"use identity_format={REFERENCE_LINE!r}."
        )


def _check_format(name: str, text: str, *, fields: tuple[str, ...]) -> None:
    """Check a format string: plain ``fields`` only, and ``{image}`` once."""
    try:
        pieces = list(string.Formatter().parse(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={text!r} is not a format string ({error}); write braces of the text twice.") from None
    used = [field for _, field, _, _ in pieces if field is not None]
    if used.count("image") != 1:
        raise ValueError(f"{name}={text!r} must contain {{image}} once.")
    plain = all(not spec and conversion is None for _, field, spec, conversion in pieces if field is not None)
    if not set(used) <= set(fields) or not plain:
        raise ValueError(f"{name}={text!r} may contain only {', '.join(f'{{{field}}}' for field in fields)}.")


def _check_fixed_size(image_processor) -> torch.Size:
    """Return the shape ``[3, H, W]`` of every prepared image, by processing a wide and a high one.

    Raises:
        ValueError: the two differ.
    """
    shapes = [(48, 96), (96, 48)]
    images = [Image.fromarray(np.zeros((height, width, 3), np.uint8)) for height, width in shapes]
    try:
        sizes = {tuple(image_processor([image], return_tensors="pt")["pixel_values"].shape) for image in images}
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        sizes = {str(error)}
    if len(sizes) != 1 or not (isinstance(size := next(iter(sizes)), tuple) and len(size) == 4 and size[0] == 1):
        raise ValueError(
            f"image_processor={type(image_processor).__name__} does not bring all images to one size (images of 96 x "
            f"48 and 48 x 96 pixels give {', '.join(map(str, sizes))}); use a vision tower with a processor such as "
            "CLIPImageProcessor, SiglipImageProcessor or ViTImageProcessor; its size needs a height and width, or a "
            "centre crop."
        )
    return torch.Size(size[1:])
