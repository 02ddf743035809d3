"""The processor: from a sample of the schema to tensors, and from pairs of text and images to tensors."""

import functools
import string
from collections.abc import Callable, Iterator
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
from idavlm.data.images import size_problem
from idavlm.data.messages import conversation_to_sample, is_batch, read_conversation
from idavlm.data.photos import PhotoLoader
from idavlm.data.rendering import Segment
from idavlm.data.schema import Part
from idavlm.data.special_tokens import find_special_tokens
from idavlm.models.boxes import BoxFormat
from idavlm.models.crop_box import FULL_IMAGE, crop_box
from idavlm.models.identity_names import NO_IDENTITY, propagate_names, split_at_names
from idavlm.models.resized_size import resized_size
from idavlm.utils import IGNORE_INDEX, ImageRole, check_positive

ImageLoader = Callable[[Path | None, str], tuple[Tensor, tuple[int, int]]]


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
        identity_format: str = "{name} is {image}\n",
        box_format: str = "thousand",
        max_length: int | None = None,
        **kwargs,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_format = image_format
        self.identity_format = identity_format
        self.box_format = box_format
        self.max_length = max_length
        self.image_loader: ImageLoader | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Check an option whenever it is set. Nothing is derived from options in advance."""
        if name in ("image_seq_length", "max_length"):
            check_positive(**{name: value})
        elif name == "image_format":
            _check_format(name, value, fields=("image",))
        elif name == "identity_format":
            _check_format(name, value, fields=("name", "image"))
        elif name == "box_format":
            BoxFormat(value)
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
            kwargs: ``return_tensors="pt"`` (tensors are returned in any case); with ``tokenize=False`` variables of the
                chat template.

        Raises:
            DataError: messages or images that cannot be used, with the place in the messages.
            ValueError: with ``tokenize=False``, the text of a message holds a special token other than ``image_token``:
                rendered text does not tell it from those of the template. Or an argument that cannot take effect.
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
        _check_tokenize_options(kwargs)
        loader = PhotoLoader(
            image_root, allow_urls=allow_urls, resized_size=functools.partial(resized_size, self.image_processor)
        )
        samples = []
        for messages in conversations:
            read = read_conversation(messages)
            images = [loader.load(photo.image, field=photo.field, key=photo.key) for photo in read.photos]
            samples.append(conversation_to_sample(read, images))
        encoded = [
            self._encode(sample, chat_template, add_generation_prompt=add_generation_prompt) for sample in samples
        ]
        side = padding_side or ("left" if add_generation_prompt else "right")
        batch = self.collate(encoded, padding_side=side)
        labels = batch.pop("labels")
        for name in ("boxes", "box_image", "box_identity", "image_sizes"):
            batch.pop(name)
        if return_assistant_tokens_mask:
            batch["assistant_masks"] = (labels != IGNORE_INDEX).long()
        return BatchFeature(batch) if return_dict else batch["input_ids"]

    def _render(self, messages, chat_template: str, **kwargs) -> str:
        read = read_conversation(messages)
        sample = conversation_to_sample(read, [photo.image for photo in read.photos])
        texts = [
            {"role": message["role"], "content": "".join(segment.text for segment in message["content"])}
            for message in self._messages(sample, {}, check_text=False)
        ]
        return super().apply_chat_template(texts, chat_template=chat_template, tokenize=False, **kwargs)

    def _check_rendered(self, conversations: list, sanitize_control_tokens: bool) -> None:
        allowed = () if sanitize_control_tokens else (self.image_token,)
        for role, text in _texts_of_messages(conversations):
            for token in find_special_tokens(self.tokenizer, text):
                if token not in allowed:
                    raise ValueError(
                        f"a message of {role!r} holds the special token {token!r} ({text[:60]!r}), which could end or "
                        "forge a turn; remove it, or pass a record to encode(), where it is ordinary text."
                    )

    def __call__(self, images=None, text=None, **kwargs) -> BatchFeature:
        """Prepare text with ``image_token`` for each image, and these images as general images, as in transformers.

        For identities build a record and use :meth:`encode`. The text is a prompt: special tokens in it are special
        tokens. :meth:`apply_chat_template` builds one and refuses messages that hold special tokens.

        Args:
            images: all images, in the order of the texts.
            text: a string or a list of strings.
            kwargs: arguments of the tokenizer (``padding``, ``return_tensors``).

        Raises:
            ValueError: another number of placeholders than of images.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        counts = [item.count(self.image_token) for item in texts]
        images = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
        if sum(counts) != len(images):
            raise ValueError(f"the text holds {sum(counts)} {self.image_token} but {len(images)} images were passed.")
        placeholders = self.image_format.format(image=self.image_token * self._num_image_tokens())
        kwargs = {"return_tensors": "pt", "padding": len(texts) > 1, **kwargs}
        batch = self.tokenizer([item.replace(self.image_token, placeholders) for item in texts], **kwargs)
        if images:
            batch["pixel_values"] = self._pixels(images)
            batch["image_roles"] = torch.full((len(images),), int(ImageRole.GENERAL))
            batch["sample_index"] = torch.tensor([row for row, count in enumerate(counts) for _ in range(count)])
        return BatchFeature(dict(batch))

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
        for box in sample.boxes:
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

    def parse_box(self, text: str, image_size: tuple[int, int], *, name: str = "") -> list[float] | None:
        """Return the box in ``text`` in pixels of an image of (height, width), see :meth:`BoxFormat.parse`."""
        return BoxFormat(self.box_format).parse(text, image_size, name=name)

    def load_image(self, root: Path | None, path: str) -> tuple[Tensor, tuple[int, int]]:
        """Load and prepare an image file: pixels ``[3, H, W]``, and the (height, width) of the original.

        Raises:
            DataError: the image cannot be read or processed, would be too large after resizing, or there is no root.
        """
        if root is None:
            raise DataError(
                f"image {quote(path)} has no image_root; pass one to the data set.", kind="image", file=path
            )
        image = ImageStore(root, resized_size=functools.partial(resized_size, self.image_processor)).open(path)
        return self._prepare(path, image)

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
                problem = size_problem(size, resized_size=functools.partial(resized_size, self.image_processor))
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
        box, form = sample.box_of(part.name, part.image), BoxFormat(self.box_format)
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


def _check_tokenize_options(kwargs: dict[str, Any]) -> None:
    """Refuse options of ``apply_chat_template(tokenize=True)`` that cannot take effect."""
    options = {**kwargs, **(kwargs.get("processor_kwargs") or {})}
    accepted = {
        "return_tensors": (None, "pt"),
        "padding": (None, True, False, "longest"),
        "truncation": (None, False),
        "continue_final_message": (None, False),
        "processor_kwargs": (options.get("processor_kwargs"),),
    }
    for name, value in options.items():
        if name not in accepted or value not in accepted[name]:
            raise ValueError(
                f"{name}={value!r} cannot take effect with tokenize=True; leave it out. Images have a fixed number of "
                "tokens, so nothing is truncated, and rows are padded to the longest."
            )


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
            f"tokenizer.add_special_tokens({{'additional_special_tokens': [{image_token!r}]}}) first."
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
