"""From a sample of the schema to tensors: text with placeholders, images with roles, boxes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from idavlm.data import Box, Collator, DataError, ImageStore, Sample, render_chat
from idavlm.models.boxes import BoxFormat
from idavlm.models.crop_box import WHOLE, crop_box
from idavlm.models.image_features import ImageFeatures
from idavlm.models.names import NOT_A_NAME, carry_names, name_identities
from idavlm.utils import IGNORE_INDEX, ImageRole, check_positive


class IDAVLMProcessor(ProcessorMixin):
    """Prepares samples for :class:`IDAVLMForConditionalGeneration`.

    Identities stand before the first user turn, one line a photo; every image becomes ``image_seq_length``
    placeholders; boxes become text. All of it is fixed here and saved with the processor.

    Args:
        image_processor: a transformers image processor that gives all images one size.
        tokenizer: a transformers tokenizer with ``image_token`` as one token, and a chat template (or give one).
        chat_template: replaces the tokenizer's.
        image_seq_length: image tokens of an image, as in :class:`IDAVLMConfig`.
        image_token: the placeholder.
        image_format: what stands for an image in the text; ``{image}`` is the placeholder, e.g. ``<img>{image}</img>``.
        identity_format: a line of an identity; ``{name}`` and ``{image}`` (which is in ``image_format``).
        box_format: see :class:`BoxFormat`.
        max_length: longest encoded sample in tokens; a longer one is an error, never cut. None for no limit.
        image_cache_size: so many prepared images are kept in memory (small data sets on slow disks and CPUs).

    ``image_features``, None at first, may be set to :class:`ImageFeatures`; pictures are then not opened any more.
    """

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template: str | None = None,
        image_seq_length: int = 256,
        image_token: str = "<image>",
        image_format: str = "{image}",
        identity_format: str = "{name} is {image}\n",
        box_format: str = "thousand",
        max_length: int | None = None,
        image_cache_size: int = 0,
        **kwargs,
    ):
        check_positive(image_seq_length=image_seq_length, max_length=max_length)
        for name, form in (("image_format", image_format), ("identity_format", identity_format)):
            if "{image}" not in form:
                raise ValueError(f"{name}={form!r} must contain {{image}}.")
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_format = image_format
        self.identity_format = identity_format
        self.box_format = box_format
        self.max_length = max_length
        self.image_cache_size = image_cache_size
        self._boxes = BoxFormat(box_format)
        self._cache: dict[tuple[str, str], tuple[Tensor, tuple[int, int]]] = {}
        self._shown: dict[tuple[int, int], tuple[float, float, float, float]] = {}
        self.image_features: ImageFeatures | None = None
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"image_token={image_token!r} is no token of the tokenizer; call "
                f"tokenizer.add_special_tokens({{'additional_special_tokens': [{image_token!r}]}}) first."
            )

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_roles", "sample_index", "identity_index"]

    def to_dict(self, *args, **kwargs) -> dict[str, Any]:
        output = super().to_dict(*args, **kwargs)
        for name in ("_boxes", "_cache", "_shown", "image_features", "image_token_id"):
            output.pop(name, None)
        return output

    def __call__(self, images=None, text=None, **kwargs) -> BatchFeature:
        """Text with ``image_token`` for every image, and these images, as general images: transformers' usual call.

        For identities build a record and use :meth:`encode`.

        Args:
            images: all images, in the order of the text(s).
            text: a string or a list of strings.
            kwargs: for the tokenizer (``padding``, ``return_tensors``).
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        counts = [item.count(self.image_token) for item in texts]
        images = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
        if sum(counts) != len(images):
            raise ValueError(f"the text holds {sum(counts)} {self.image_token} but {len(images)} images were given.")
        wrapped = self.image_format.format(image=self.image_token * self.image_seq_length)
        kwargs = {"return_tensors": "pt", "padding": len(texts) > 1, **kwargs}
        batch = self.tokenizer([item.replace(self.image_token, wrapped) for item in texts], **kwargs)
        if images:
            batch["pixel_values"] = self._pixels(images)
            batch["image_roles"] = torch.full((len(images),), int(ImageRole.GENERAL))
            batch["sample_index"] = torch.tensor([row for row, count in enumerate(counts) for _ in range(count)])
        return BatchFeature(dict(batch))

    def encode(self, sample: Sample, *, add_generation_prompt: bool = False) -> dict[str, Tensor]:
        """Encode one sample.

        Args:
            sample: a checked record; its images are opened below its ``image_root``.
            add_generation_prompt: end with the header of an assistant turn, for generation.

        Returns:
            ``input_ids``, ``labels``, ``token_identity_index`` ``[T]`` (whom a token is about, from a name of the prompt on;
            -1 elsewhere), ``name_mask`` ``[T]`` (the names themselves);
            ``pixel_values`` ``[I, 3, H, W]`` (``image_features`` ``[I, P, Cv]`` where the processor has them),
            ``image_roles``, ``identity_index`` ``[I]``, ``image_sizes`` ``[I, 2]``: references identity by identity,
            then the images of the messages;
            ``boxes`` ``[N, 4]``, ``box_image``, ``box_identity`` ``[N]`` of the persons with references, in pixels of
            the original as if all of it were shown: where the image processor cuts or pads, they are moved with it.

        Raises:
            DataError: images that cannot be read, text that holds the placeholder, boxes without an image, a sample
                longer than ``max_length``.
        """
        look = self.image_features or self.load_image
        images = [look(sample.image_root, path) for path in sample.images]
        sizes = [size for _, size in images]
        references = len(sample.reference_images)
        scenes = dict(zip(sample.message_images, sizes[references:], strict=True))
        for box in sample.boxes:
            _check_box(sample, box, scenes[box.image])
        messages = self._messages(sample, scenes)
        input_ids, labels = render_chat(
            self.tokenizer, messages, add_generation_prompt=add_generation_prompt, chat_template=self.chat_template
        )
        answers = labels
        if add_generation_prompt and sample.identities:
            answers = self._earlier_answers(sample, messages, input_ids)
        names = name_identities(self.tokenizer, input_ids, answers, [identity.name for identity in sample.identities])
        about = carry_names(names, input_ids, answers, self.image_token_id)
        name_mask = [name != NOT_A_NAME for name in names]
        input_ids, labels, about, name_mask = self._expand(input_ids, labels, about, name_mask)
        if self.max_length is not None and len(input_ids) > self.max_length:
            raise DataError(
                f"sample {sample.id!r} has {len(input_ids)} tokens, more than max_length={self.max_length}; give fewer "
                "images or raise max_length.",
                kind="length",
            )
        role = ImageRole.SCENE if sample.identities else ImageRole.GENERAL
        roles = [int(ImageRole.REFERENCE)] * references + [int(role)] * len(sample.message_images)
        identities = [number for number, identity in enumerate(sample.identities) for _ in identity.images]
        return {
            "input_ids": input_ids,
            "labels": labels,
            "token_identity_index": about,
            "name_mask": name_mask,
            **self._seen([seen for seen, _ in images]),
            "image_roles": torch.tensor(roles, dtype=torch.long),
            "identity_index": torch.tensor(identities + [0] * len(sample.message_images), dtype=torch.long),
            "image_sizes": torch.tensor(sizes, dtype=torch.long).view(-1, 2),
            **self._box_tensors(sample, scenes),
        }

    def collate(self, encoded: list[dict[str, Tensor]], *, padding_side: str = "right") -> dict[str, Tensor]:
        """Batch of encoded samples; ``padding_side="left"`` for generation."""
        return Collator(self.tokenizer.pad_token_id, padding_side=padding_side)(encoded)

    def parse_box(self, text: str, image_size: tuple[int, int], *, name: str = "") -> list[float] | None:
        """Box in generated ``text``, in pixels of an image of (height, width); see :meth:`BoxFormat.parse`."""
        return self._boxes.parse(text, image_size, name=name)

    def load_image(self, root: Path | None, path: str) -> tuple[Tensor, tuple[int, int]]:
        """Prepared pixels ``[3, H, W]`` and original (height, width) of an image file."""
        key = (str(root), path)
        if key not in self._cache:
            if root is None:
                raise DataError(f"image {path!r} has no image_root; give one to the data set.", kind="image", file=path)
            image = ImageStore(root).open(path)
            loaded = self._pixels([image])[0], (image.height, image.width)
            if len(self._cache) >= self.image_cache_size:
                return loaded
            self._cache[key] = loaded
        return self._cache[key]

    def _pixels(self, images: list) -> Tensor:
        return self.image_processor(images, return_tensors="pt")["pixel_values"]

    def _seen(self, images: list[Tensor]) -> dict[str, Tensor]:
        """What the model gets of the images of a sample."""
        if self.image_features is not None:
            none = torch.zeros(0, *self.image_features.shape[1:])
            return {"image_features": torch.stack(images).float() if images else none}
        return {"pixel_values": torch.stack(images) if images else torch.zeros(0, 3, 0, 0)}

    def _messages(self, sample: Sample, sizes: dict[str, tuple[int, int]]) -> list[dict[str, str]]:
        """The conversation as text, one placeholder an image, with the identities before the first user turn."""
        image = self.image_format.format(image=self.image_token)
        for name in (*(identity.name for identity in sample.identities), *(box.name for box in sample.boxes)):
            self._check_text(sample, name)
        lines = [
            self.identity_format.format(name=identity.name, image=image)
            for identity in sample.identities
            for _ in identity.images
        ]
        messages = []
        for message in sample.messages:
            text = "".join(lines) if message.role == "user" else ""
            lines = [] if message.role == "user" else lines
            for part in message.content:
                if part.type == "image":
                    text += image
                elif part.type == "box":
                    box = sample.box_of(part.name, part.image)
                    text += self._boxes.write(part.name, box.box, sizes[box.image])
                else:
                    self._check_text(sample, part.text)
                    text += part.text
            messages.append({"role": message.role, "content": text})
        return messages

    def _earlier_answers(self, sample: Sample, messages: list[dict[str, str]], input_ids: list[int]) -> list[int]:
        """Labels of the answers in a prompt: names in them are not marked, in generation as in training."""
        ids, labels = render_chat(self.tokenizer, messages, chat_template=self.chat_template)
        end = max((place + 1 for place, label in enumerate(labels) if label != IGNORE_INDEX), default=0)
        if ids[:end] != input_ids[:end]:
            raise DataError(
                f"sample {sample.id!r}: with a generation prompt the chat template writes earlier turns otherwise than "
                "in training; give one that adds the prompt and changes nothing else.",
                kind="template",
            )
        return labels[:end] + [IGNORE_INDEX] * (len(input_ids) - end)

    def _check_text(self, sample: Sample, text: str) -> None:
        if self.image_token in text:
            raise DataError(
                f"sample {sample.id!r}: the text {text[:60]!r} holds the placeholder {self.image_token!r}; make it an "
                "image part.",
                kind="placeholders",
            )

    def _expand(self, input_ids: list[int], *others: list) -> tuple[Tensor, ...]:
        """Every placeholder ``image_seq_length`` times, and what stands beside it in ``others``; as tensors."""
        rows = [torch.tensor(values) for values in (input_ids, *others)]
        times = torch.where(rows[0] == self.image_token_id, self.image_seq_length, 1)
        return tuple(row.repeat_interleave(times) for row in rows)

    def _box_tensors(self, sample: Sample, sizes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
        """Boxes of the persons who have references, as far as they are shown; each in the first image of its path."""
        number = {identity.name: index for index, identity in enumerate(sample.identities)}
        images, references = sample.message_images, len(sample.reference_images)
        known = [box for box in sample.boxes if box.name in number and box.image in images]
        places = [self._place_shown(box.box, sizes[box.image]) for box in known]
        known, places = [box for box, place in zip(known, places, strict=True) if place], [p for p in places if p]
        return {
            "boxes": torch.tensor(places, dtype=torch.float32).view(-1, 4),
            "box_image": torch.tensor([references + images.index(box.image) for box in known], dtype=torch.long),
            "box_identity": torch.tensor([number[box.name] for box in known], dtype=torch.long),
        }

    def _place_shown(self, box: list[float], size: tuple[int, int]) -> list[float] | None:
        """A box as if the part of the picture that the image processor shows were all of it; None if it is cut off."""
        if size not in self._shown:
            self._shown[size] = crop_box(self.image_processor, size)
        if self._shown[size] == WHOLE:
            return box
        left, top, right, bottom = self._shown[size]
        height, width = size
        x1, x2 = (min(max((x / width - left) / (right - left), 0.0), 1.0) * width for x in (box[0], box[2]))
        y1, y2 = (min(max((y / height - top) / (bottom - top), 0.0), 1.0) * height for y in (box[1], box[3]))
        return [x1, y1, x2, y2] if x1 < x2 and y1 < y2 else None


def _check_box(sample: Sample, box: Box, image_size: tuple[int, int]) -> None:
    height, width = image_size
    if box.box[0] >= width or box.box[1] >= height:
        raise DataError(
            f"sample {sample.id!r}: the box {box.box} of {box.name!r} lies outside {box.image!r} of {width} x {height} "
            "pixels; boxes are in pixels of the original image."
        )
