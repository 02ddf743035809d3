"""The processor of a vision-language model of transformers, with identities in messages and text."""

import functools
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, ProcessorMixin
from transformers.image_utils import get_image_size
from transformers.processing_utils import ImagesKwargs, TextKwargs

from idavlm._compat import call_with_replacements
from idavlm.data import DataError, Sample
from idavlm.data.errors import quote
from idavlm.data.images import MAX_ASPECT_RATIO, MAX_PIXELS
from idavlm.data.messages import (
    IMAGE_KEYS,
    OTHER_PARTS,
    Conversation,
    Photo,
    conversation_of_text,
    has_identities,
    images_of_texts,
    is_batch,
    read_conversation,
    read_identities,
    sample_to_messages,
)
from idavlm.data.photos import PhotoLoader
from idavlm.data.special_tokens import special_tokens
from idavlm.models.boxes import BoxFormat, smart_resize
from idavlm.models.chat_rendering import (
    ChatTemplate,
    Expansion,
    Span,
    references_in_text,
    tokens_in_spans,
    tokens_of_span,
    with_reference_lines,
)
from idavlm.models.crop_box import FULL_IMAGE, crop_box
from idavlm.models.identity_batch import (
    BOX_FIELDS,
    IDENTITY_FIELDS,
    collate_identities,
    concatenate,
    identity_fields,
    pad,
)
from idavlm.models.packed_identities import FIELD, pack_identities
from idavlm.models.resized_size import resized_size
from idavlm.utils import IGNORE_INDEX, check_choice, check_positive

FILE = "identity_processor.json"
"""File of the options, next to the files of the wrapped processor."""

WRITTEN_IMAGE = "<image>"
"""Placeholder that people write, whatever the image token of the model is."""

# Token that stands for one image token, where it is not the image token of the processor.
_PLACEHOLDERS = {"Ovis2Processor": "<IMG_ATOM>"}

_CALL_OPTIONS = {"text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs", "common_kwargs"} | {
    *TextKwargs.__annotations__,
    *ImagesKwargs.__annotations__,
    "return_mm_token_type_ids",
    "return_text_replacement_offsets",
}


class IdentityProcessor(ProcessorMixin):
    """Adds identities to the processor of any vision-language model of transformers.

    Messages may hold ``{"type": "identity", "name": "Kate", "images": [...]}``. The photos are rendered as one line
    each (``Kate is <image>``), and the output gets the fields that a model with an attached ID-Former takes. Everything
    else is the work of the wrapped processor; without identities, its output is returned unchanged.

    Attributes and methods that are not documented here are those of the wrapped processor.

    Args:
        processor: a processor of transformers, for example from ``AutoProcessor.from_pretrained``.
        identity_format: line of a reference; ``{name}`` and ``{image}`` are replaced.
        read_references: whether lines such as ``Kate is <image>`` in the text of ``__call__`` introduce Kate.
        image_root: folder that relative image paths are relative to, and that they must not leave; the working
            directory by default. It is not saved.
        allow_urls: whether URLs and base64 text are allowed as images.
        max_pixels: limit on width x height of an image.
        max_aspect_ratio: limit on the long side of an image, relative to the short side.
        box_format: text form of boxes, see :class:`BoxFormat`.
        max_length: largest number of tokens of a sample for :meth:`encode`. A longer sample is an error and never cut.
        placeholder: token that stands for one image token in ``input_ids``, for a family where it is neither the
            ``image_token`` of the tokenizer nor that of the processor.
        pack_identities: ``__call__`` packs the identities into ``mm_token_type_ids``, see
            :mod:`idavlm.models.packed_identities`. TRL's ``GRPOTrainer`` passes no other field on to the model.
        identity_inputs: whether outputs have the fields that an attached ID-Former takes. Use False for a model without
            one; references are then images of the prompt like all others.

    Raises:
        ValueError: an argument that does not fit, with the remedy.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        *,
        identity_format: str = "{name} is {image}\n",
        read_references: bool = True,
        image_root: str | Path | None = None,
        allow_urls: bool = False,
        max_pixels: int = MAX_PIXELS,
        max_aspect_ratio: int = MAX_ASPECT_RATIO,
        box_format: str = "thousand",
        max_length: int | None = None,
        placeholder: str | None = None,
        pack_identities: bool = False,
        identity_inputs: bool = True,
    ):
        if isinstance(processor, IdentityProcessor):
            raise ValueError("processor is an IdentityProcessor already; pass the processor that it wraps.")
        if not isinstance(processor, ProcessorMixin) or getattr(processor, "image_token", None) is None:
            raise ValueError(
                f"processor={type(processor).__name__} is not the processor of a vision-language model that writes an "
                "image token into its text; pass the result of AutoProcessor.from_pretrained."
            )
        for field in ("{name}", "{image}"):
            if identity_format.count(field) != 1:
                raise ValueError(f"identity_format={identity_format!r} must contain {field} once.")
        if not identity_format.endswith("\n"):
            raise ValueError(f"identity_format={identity_format!r} must be a line; end it with a line break.")
        if read_references and identity_format != "{name} is {image}\n":
            raise ValueError(
                f"read_references=True reads lines of the form 'Kate is <image>', but identity_format="
                f"{identity_format!r}; set read_references=False."
            )
        check_positive(max_pixels=max_pixels, max_aspect_ratio=max_aspect_ratio, max_length=max_length)
        if pack_identities and not identity_inputs:
            raise ValueError("pack_identities=True packs the fields that identity_inputs=False leaves out; use one.")
        self.processor = processor
        self.identity_format = identity_format
        self.read_references = read_references
        self.image_root = image_root
        self.allow_urls = allow_urls
        self.max_pixels = max_pixels
        self.max_aspect_ratio = max_aspect_ratio
        self.box_format = box_format
        self._boxes()
        self.max_length = max_length
        self.placeholder = placeholder or _PLACEHOLDERS.get(type(processor).__name__)
        self.pack_identities = pack_identities
        self._image_lengths: dict[tuple, int] = {}
        self.identity_inputs = identity_inputs
        if self.placeholder is None:
            self.placeholder = getattr(processor.tokenizer, "image_token", None) or processor.image_token
        if self.placeholder_id is None or self.placeholder_id == processor.tokenizer.unk_token_id:
            raise ValueError(f"placeholder={self.placeholder!r} is not a token of the tokenizer.")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "processor" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.processor, name)

    @property
    def placeholder_id(self) -> int:
        """Id of :attr:`placeholder`; ``image_token_id`` of the model's configuration."""
        return self.processor.tokenizer.convert_tokens_to_ids(self.placeholder)

    @property
    def tokenizer(self):
        """The tokenizer of the wrapped processor."""
        return self.processor.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer) -> None:
        self.processor.tokenizer = tokenizer

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The chat template of the wrapped processor."""
        return self.processor.chat_template

    @chat_template.setter
    def chat_template(self, template: str | dict[str, str] | None) -> None:
        self.processor.chat_template = template

    @property
    def model_input_names(self) -> list[str]:
        return [*self.processor.model_input_names, *IDENTITY_FIELDS]

    @property
    def unused_input_names(self) -> list[str]:
        return self.processor.unused_input_names

    def batch_decode(self, *args, **kwargs):
        return self.processor.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs):
        return self.processor.decode(*args, **kwargs)

    def post_process_image_text_to_text(self, *args, **kwargs):
        return self.processor.post_process_image_text_to_text(*args, **kwargs)

    def parse_response(self, *args, **kwargs):
        return self.processor.parse_response(*args, **kwargs)

    def options(self) -> dict[str, Any]:
        """The arguments of this processor without the wrapped processor and ``image_root``."""
        of_text = ("identity_format", "read_references", "box_format", "max_length", "placeholder", "pack_identities")
        names = (*of_text, "allow_urls", "max_pixels", "max_aspect_ratio", "identity_inputs")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        wrapped = self.processor.to_dict()
        return {**self.options(), "processor": wrapped, "processor_class": type(self).__name__}

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options().items())
        return f"{type(self).__name__}({type(self.processor).__name__}, {options})"

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> list[str]:
        """Save the wrapped processor and the options of this one. ``AutoProcessor`` loads the wrapped processor."""
        files = self.processor.save_pretrained(save_directory)
        file = Path(save_directory) / FILE
        file.write_text(json.dumps(self.options(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return [*files, str(file)]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "IdentityProcessor":
        """Load the processor of a model with ``AutoProcessor`` and wrap it.

        Args:
            pretrained_model_name_or_path: a folder that :meth:`save_pretrained` wrote, or any model whose processor
                ``AutoProcessor`` loads.
            kwargs: options of this class, which replace those that were saved; others go to ``AutoProcessor``.
        """
        named = ("image_root", *_options_of(cls))
        given = {name: kwargs.pop(name) for name in named if name in kwargs}
        file = Path(str(pretrained_model_name_or_path)) / FILE
        saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        processor = AutoProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls(processor, **{**saved, **given})

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """Render messages, and tokenize them with their images, as in transformers.

        Args:
            conversation: messages, or a list of conversations. Images are paths, PIL images or bytes; URLs and base64
                text only with ``allow_urls``.
            kwargs: as in ``ProcessorMixin.apply_chat_template``: ``return_tensors``, ``padding``, variables of the chat
                template, ...

        Returns:
            As in transformers. With ``tokenize`` and ``return_dict``, a batch in which a message introduces an identity
            has :data:`IDENTITY_FIELDS` as well.

        Raises:
            DataError: with the place in the messages: unknown parts, an identity without photos, a name that occurs
                twice, an image that cannot be read, text that holds the image token.
        """
        batched = is_batch(conversation)
        conversations = list(conversation) if batched else [conversation]
        where = ["messages"] if not batched else [f"messages[{row}]" for row in range(len(conversations))]
        read = [read_conversation(entry, where=place) for entry, place in zip(conversations, where, strict=True)]
        options = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        if not any(map(has_identities, conversations)):
            loaded = [self._with_loaded_images(entry) if tokenize else _messages(entry) for entry in read]
            return self.processor.apply_chat_template(
                loaded if batched else loaded[0],
                chat_template=chat_template,
                tokenize=tokenize,
                return_dict=return_dict,
                return_assistant_tokens_mask=return_assistant_tokens_mask,
                **({"processor_kwargs": processor_kwargs} if processor_kwargs is not None else {}),
                **options,
                **kwargs,
            )
        call_options = {
            **(processor_kwargs or {}),
            **{name: kwargs.pop(name) for name in [*kwargs] if self._is_for_call(name)},
        }
        for name in ("load_audio_from_video", "sanitize_control_tokens"):
            if kwargs.pop(name, False):
                raise ValueError(f"{name}=True cannot be combined with identities.")
        if call_options.get("return_tensors") == "auto":
            del call_options["return_tensors"]
        template = self._template(chat_template, kwargs)
        texts, spans = [], []
        for entry in read:
            self._check_texts(entry)
            messages = template.messages_of(entry, self.identity_format)
            text, marked = template.render(messages, with_spans=return_assistant_tokens_mask, **options)
            texts.append(text)
            spans.append(marked)
        if not tokenize:
            return texts if batched else texts[0]
        output = self._process(texts, read, spans if return_assistant_tokens_mask else None, call_options)
        return output if return_dict else output["input_ids"]

    def __call__(self, images=None, text=None, videos=None, audio=None, *, identities=None, **kwargs) -> BatchFeature:
        """Prepare text and images as the wrapped processor does, with references.

        The text holds an image token per image; ``<image>`` is understood as well. The line ``Kate is <image>`` makes
        the image a reference of Kate, unless ``read_references`` is off.

        Args:
            images: images of the texts: one, a list, or a list of lists.
            text: a string or a list of strings.
            videos, audio: as in the wrapped processor; not together with identities.
            identities: references that the text does not hold, which precede it: for each text
                ``[{"name", "images"}, ...]`` or ``{name: photos}``.
            kwargs: arguments of the wrapped processor.

        Returns:
            The output of the wrapped processor; with identities, :data:`IDENTITY_FIELDS` as well.

        Raises:
            DataError: faults in ``identities``, images that cannot be read, another number of images than placeholders.
        """
        single = isinstance(text, str)
        texts = [text] if single else list(text) if isinstance(text, (list, tuple)) else None
        images = self._load_nested(images)
        named = read_identities(identities, len(texts or []))
        if texts is None or not all(isinstance(entry, str) for entry in texts):
            if identities is not None:
                raise ValueError(f"identities need text, but text is {type(text).__name__}; pass strings.")
            return self.processor(images=images, text=text, **_given(videos=videos, audio=audio), **kwargs)
        image_text, header = self._image_and_header()
        written = texts
        if images is not None or any(named):
            texts = [self._with_image_token(entry, image_text) for entry in texts]
        references = [
            self._references(before, entry, image_text, header) for before, entry in zip(written, texts, strict=True)
        ]
        if not any(named) and not any(name is not None for row in references for name in row):
            text = texts[0] if single else texts
            return self.processor(images=images, text=text, **_given(videos=videos, audio=audio), **kwargs)
        for name, value in (("videos", videos), ("audio", audio)):
            if value is not None:
                raise ValueError(f"{name} cannot be combined with identities.")
        rows = images_of_texts(images, [len(row) for row in references])
        conversations = []
        for row, (entry, photos) in enumerate(zip(texts, rows, strict=True)):
            conversations.append(conversation_of_text(named[row], photos, references[row]))
            texts[row] = with_reference_lines(
                entry,
                named[row],
                self.identity_format,
                image_text,
                self.image_token,
                tokenizer=self.tokenizer,
                field=f"text[{row}]",
            )
        if not self.pack_identities:
            return self._process(texts, conversations, None, kwargs)
        output = self._process(texts, conversations, None, {"padding_side": "left", **kwargs})
        if not isinstance(output["input_ids"], Tensor):
            raise ValueError("pack_identities=True needs return_tensors='pt' and, for several texts, padding=True.")
        fields = {name: output.pop(name) for name in IDENTITY_FIELDS}
        output[FIELD] = pack_identities(output["input_ids"], output.get(FIELD), fields, self.placeholder_id)
        return output

    def encode(self, sample: Sample, *, add_generation_prompt: bool = False) -> dict[str, Tensor]:
        """Encode one sample.

        Args:
            sample: a record, or a :class:`Sample` whose images are absolute paths or PIL images.
            add_generation_prompt: end with the header of an assistant turn, for generation; then all labels are -100.

        Returns:
            The fields of the wrapped processor, those of the text without the dimension of the batch; ``labels``
            ``[T]``, the token ids of the assistant turns and -100 elsewhere; ``image_roles``, ``identity_index``,
            ``num_image_tokens`` ``[I]``, ``original_image_sizes`` ``[I, 2]``, ``identity_name_ids`` ``[G, L]``;
            ``boxes`` ``[N, 4]``, ``box_image`` and ``box_identity`` ``[N]`` of the identities with references.

        Raises:
            DataError: as :meth:`apply_chat_template`; boxes outside their image, a sample longer than ``max_length``,
                assistant turns that cannot be located in the text or in the tokens.
        """
        loader = self._loader(sample.image_root if sample.image_root is not None else self.image_root)
        images = [loader.load(image, field=f"sample {sample.id!r}") for image in sample.images]
        sizes = [_size(image) for image in images]
        box_sizes = _scene_sizes(sample, sizes)
        sample = sample.with_pixel_boxes(lambda image: box_sizes[_key(image)])
        _check_boxes(sample, box_sizes)
        conversation = self._conversation(sample, sizes)
        self._check_texts(conversation)
        template = self._template(None, {})
        messages = template.messages_of(conversation, self.identity_format)
        if add_generation_prompt:
            text, spans, prompts = template.render(messages, add_generation_prompt=True)[0], [], []
        else:
            text, spans, prompts = template.answer_spans(messages)
        options = {"return_offsets_mapping": True} if spans else {}
        output, expansion = self._run([text], [images], {"return_tensors": "pt", **options})
        length = output["input_ids"].shape[1]
        if self.max_length is not None and length > self.max_length:
            raise DataError(
                f"sample {sample.id!r} has {length} tokens, more than max_length={self.max_length}; use fewer images "
                "or raise max_length.",
                kind="length",
            )
        ids = output["input_ids"][0]
        offsets = output.pop("offset_mapping")[0].tolist() if spans else []
        labels = self._labels(text, ids, offsets, spans, prompts, expansion)
        of_images = identity_fields([conversation], [sizes], expansion.counts, self._name_ids([conversation]))
        fields = {
            name: value[0] if _is_per_token(value, length) else value
            for name, value in output.items()
            if name not in ("attention_mask", "labels")
        }
        return {
            **fields,
            "labels": labels,
            **{name: value for name, value in of_images.items() if name != "sample_index"},
            "identity_name_ids": of_images["identity_name_ids"][0],
            **self._box_tensors(sample, box_sizes),
        }

    def _conversation(self, sample: Sample, sizes: list[tuple[int, int]]) -> Conversation:
        """The conversation of a sample whose images have the (height, width) ``sizes``."""
        box_sizes = _scene_sizes(sample, sizes)
        sample = sample.with_pixel_boxes(lambda image: box_sizes[_key(image)])
        form = self._boxes()

        def box_text(part) -> str:
            box = sample.box_of_part(part)
            return form.write(part.name, box.box, box_sizes[_key(box.image)])

        return read_conversation(sample_to_messages(sample, box_text), where=f"sample {sample.id!r}: messages")

    def num_tokens(self, sample: Sample) -> int:
        """Number of tokens of :meth:`encode`, without decoding an image: for grouping samples by length.

        The headers of the images are read. The number of tokens of an image is found by processing a blank one of the
        same size, once per size. Text that the wrapped processor adds to a sample is not counted.
        """
        loader = self._loader(sample.image_root if sample.image_root is not None else self.image_root)
        sizes = [_size(image) if isinstance(image, Image.Image) else loader.size(image) for image in sample.images]
        conversation = self._conversation(sample, sizes)
        template = self._template(None, {})
        text, _ = template.render(template.messages_of(conversation, self.identity_format))
        bos = self.tokenizer.bos_token
        with_special = bos is None or not text.startswith(bos)
        ids = self.tokenizer(text, add_special_tokens=with_special)["input_ids"]
        return len(ids) + sum(self._num_image_tokens(size, is_single=len(sizes) == 1) - 1 for size in sizes)

    def _num_image_tokens(self, size: tuple[int, int], *, is_single: bool) -> int:
        """Number of tokens that an image of (height, width) takes in a text, alone or among others."""
        key = size, is_single, self.image_processor.to_json_string()
        if key not in self._image_lengths:
            blank = Image.new("RGB", (size[1], size[0]))

            def length(number: int) -> int:
                output, _ = self._run([self.image_token * number], [[blank] * number], {"return_tensors": "pt"})
                return output["input_ids"].shape[1]

            special = len(self.tokenizer("")["input_ids"])
            self._image_lengths[key] = length(1) - special if is_single else length(3) - length(2)
        return self._image_lengths[key]

    def collate(self, encoded: Sequence[dict[str, Any]], *, padding_side: str = "right") -> dict[str, Any]:
        """Batch encoded samples. Use ``padding_side="left"`` for generation.

        The fields of the images are concatenated as the processors of transformers do: smaller images and missing tiles
        are padded with zeros. A batch without identities, or with ``identity_inputs=False``, has the fields of the
        wrapped processor and ``labels`` only.
        ``source`` and ``sample_ids`` are there if the samples have ``source`` and ``id``.

        Raises:
            ValueError: fields that cannot be concatenated.
        """
        check_choice("padding_side", padding_side, ("right", "left"))
        if not encoded:
            raise ValueError("encoded is empty; pass at least one encoded sample.")
        lengths = [len(sample["input_ids"]) for sample in encoded]
        masks = [torch.ones(length, dtype=torch.long) for length in lengths]
        batch: dict[str, Any] = {"attention_mask": pad(masks, 0, padding_side)}
        for name in dict.fromkeys(name for sample in encoded for name in sample):
            if name in ("source", "id", *IDENTITY_FIELDS, *BOX_FIELDS):
                continue
            values = [sample[name] for sample in encoded if name in sample]
            if [tuple(value.shape) for value in values] == [(length,) for length in lengths]:
                padding = {"input_ids": self.tokenizer.pad_token_id, "labels": IGNORE_INDEX}.get(name, 0)
                batch[name] = pad(values, padding, padding_side)
            else:
                batch[name] = concatenate(name, values)
        for name, batch_name in (("source", "source"), ("id", "sample_ids")):
            values = [sample[name] for sample in encoded if name in sample]
            if values and len(values) != len(encoded):
                raise ValueError(f"{len(values)} of {len(encoded)} samples have {name!r}; set it in all or in none.")
            if values:
                batch[batch_name] = values
        if self.identity_inputs and any(len(sample["identity_name_ids"]) for sample in encoded):
            batch.update(collate_identities(encoded))
        return batch

    def parse_box(self, text: str, image_size: tuple[int, int], *, name: str = "") -> list[float] | None:
        """Return the box in ``text`` in pixels of an image of (height, width), see :meth:`BoxFormat.parse`."""
        return self.read_box(text, image_size, name=name)[0]

    def read_box(
        self, text: str, image_size: tuple[int, int] | None, *, name: str = "", other_names: Sequence[str] = ()
    ) -> tuple[list[float] | None, str | None]:
        """As :meth:`parse_box`, with the reason why there is no box, see :meth:`BoxFormat.read`."""
        return self._boxes().read(text, image_size, name=name, other_names=other_names)

    def read_boxes(self, text: str, image_size: tuple[int, int] | None) -> tuple[list[list[float]], str | None]:
        """All boxes in ``text``, see :meth:`BoxFormat.read_boxes`."""
        return self._boxes().read_boxes(text, image_size)

    def _boxes(self) -> BoxFormat:
        """The box format. ``"resized"`` without settings takes those of the wrapped image processor."""
        image_processor = self.processor.image_processor
        settings = [getattr(image_processor, name, None) for name in ("patch_size", "merge_size", "size")]
        if self.box_format != "resized":
            return BoxFormat(self.box_format)
        if None in settings or not {"shortest_edge", "longest_edge"} <= dict(settings[2]).keys():
            raise ValueError(
                f"box_format='resized': {type(image_processor).__name__} does not resize as Qwen2.5-VL does; pass the "
                "settings, for example 'resized:factor=28,min_pixels=3136,max_pixels=12845056', or another format."
            )
        patch_size, merge_size, size = settings
        size = dict(size)
        options = {"factor": patch_size * merge_size}
        options |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        return BoxFormat("resized", resized_size=functools.partial(smart_resize, **options))

    def _process(
        self,
        texts: list[str],
        conversations: list[Conversation],
        spans: list[list[Span]] | None,
        options: dict[str, Any],
    ) -> BatchFeature:
        """Tokenize texts with their images and add the identity fields; ``spans`` of answers become a mask."""
        loader = self._loader(self.image_root)
        images = []
        for row, (text, conversation) in enumerate(zip(texts, conversations, strict=True)):
            for photo in conversation.photos:
                if photo.key in OTHER_PARTS:
                    raise DataError(f"{photo.field} is a {photo.key}; it cannot be combined with identities.")
            images.append([loader.load(photo.image, field=photo.field, key=photo.key) for photo in conversation.photos])
            if text.count(self.image_token) != len(images[-1]):
                raise DataError(
                    f"text[{row}] has {text.count(self.image_token)} {self.image_token}, but there are "
                    f"{len(images[-1])} images for it; the numbers must be equal.",
                    kind="placeholders",
                )
        wants_offsets = options.get("return_offsets_mapping", False)
        if spans is not None:
            options = {**options, "return_offsets_mapping": True}
        output, expansion = self._run(texts, images, options)
        if spans is not None:
            masks = [
                tokens_in_spans(offsets, [expansion.shifted(row, span) for span in spans[row]])
                for row, offsets in enumerate(_rows(output["offset_mapping"]))
            ]
            output["assistant_masks"] = torch.tensor(masks) if isinstance(output["input_ids"], Tensor) else masks
            if not wants_offsets:
                output.pop("offset_mapping")
        if not self.identity_inputs:
            return output
        sizes = [[_size(image) for image in row] for row in images]
        fields = identity_fields(conversations, sizes, expansion.counts, self._name_ids(conversations))
        for name, value in fields.items():
            output[name] = value
        return output

    def _run(self, texts: list[str], images: list[list], options: dict[str, Any]) -> tuple[BatchFeature, Expansion]:
        """Call the wrapped processor, and find out what it wrote for each image."""
        options = dict(options)
        bos = self.tokenizer.bos_token
        if bos is not None and texts[0].startswith(bos):
            options.setdefault("add_special_tokens", False)
        arguments = {"text": list(texts), **options}
        if not any(images):
            output, replacements = self.processor(**arguments), [[] for _ in texts]
            return output, Expansion(texts, replacements, self.image_token, self.placeholder)
        arguments["images"] = images
        limit = _truncation_limit(options, self.tokenizer)
        output, replacements = call_with_replacements(self.processor, **_untruncated(arguments))
        if limit is not None and self._is_longer(output, limit):
            output, replacements = call_with_replacements(self.processor, **arguments)
        return output, Expansion(texts, replacements, self.image_token, self.placeholder)

    def _is_longer(self, output: BatchFeature, limit: int) -> bool:
        """Whether a row has more than ``limit`` tokens. Checks that truncation cuts no image placeholder."""
        is_longer = False
        for row, (ids, mask) in enumerate(zip(output["input_ids"], output["attention_mask"], strict=True)):
            tokens = [token for token, kept in zip(_rows(ids), _rows(mask), strict=True) if kept]
            if len(tokens) <= limit:
                continue
            is_longer = True
            cut = tokens[limit:] if self.tokenizer.truncation_side == "right" else tokens[: len(tokens) - limit]
            if self.placeholder_id in cut:
                raise ValueError(
                    f"row {row} has {len(tokens)} tokens, {tokens.count(self.placeholder_id)} of them for images; "
                    f"truncation to max_length={limit} would cut image placeholders. Raise max_length or switch "
                    "truncation off, use fewer or smaller images, or shorten the text."
                )
        return is_longer

    def _labels(
        self,
        text: str,
        ids: Tensor,
        offsets: list[Span],
        spans: list[Span],
        prompts: list[str],
        expansion: Expansion,
    ) -> Tensor:
        """Labels on the tokens of ``spans``. Each prompt must be the beginning of the tokens."""
        expanded = expansion.expanded(0, text)
        labels = torch.full_like(ids, IGNORE_INDEX)
        added = next((number for number, (start, end) in enumerate(offsets) if start < end), 0)  # <s>
        for prompt in prompts:
            prompt_ids = self.tokenizer(expansion.expanded(0, prompt), add_special_tokens=False)["input_ids"]
            if ids[added : added + len(prompt_ids)].tolist() != prompt_ids:
                raise DataError(
                    f"the tokens of the generation prompt {prompt[-40:]!r} change if the answer follows; use a chat "
                    "template that ends the prompt with a special token or a line break.",
                    kind="template",
                )
        for span in spans:
            inside = tokens_of_span(offsets, expansion.shifted(0, span), expanded)
            labels[inside] = ids[inside]
        return labels

    def _is_for_call(self, name: str) -> bool:
        """Whether a keyword argument of ``apply_chat_template`` is for ``__call__``, not for the chat template."""
        of_images = getattr(self.processor.image_processor, "valid_kwargs", None)
        return name in _CALL_OPTIONS or name in getattr(of_images, "__annotations__", ())

    def _template(self, chat_template: str | None, options: dict[str, Any]) -> ChatTemplate:
        templates = self.chat_template
        if isinstance(templates, Mapping):
            template = templates.get(chat_template or "default", chat_template)
        else:
            template = chat_template or templates
        if template is None:
            raise ValueError(
                f"{type(self.processor).__name__} has no chat template; set processor.chat_template, or pass text with "
                "placeholders to the processor itself."
            )
        return ChatTemplate(self.tokenizer, template, self.image_token, options)

    @property
    def image_limits(self) -> dict[str, Any]:
        """The limits on images as arguments of :class:`idavlm.data.ImageStore`."""
        limits = {"max_pixels": self.max_pixels, "max_aspect_ratio": self.max_aspect_ratio}
        return {**limits, "resized_size": functools.partial(resized_size, self.image_processor)}

    def _loader(self, image_root) -> PhotoLoader:
        return PhotoLoader(image_root, allow_urls=self.allow_urls, **self.image_limits)

    def _image_and_header(self) -> tuple[str, str]:
        """Text of an image and header of a user turn in the chat template, if it has one for images."""
        try:
            facts = self._template(None, {}).facts
        except ValueError:
            return self.image_token, ""
        return facts.image, facts.header

    def _check_texts(self, conversation: Conversation) -> None:
        """Check that names and text hold no placeholder and no token that the chat template writes."""
        template = str(self.chat_template)
        ends = (self.tokenizer.bos_token, self.tokenizer.eos_token, self.tokenizer.pad_token)
        control = [token for token in special_tokens(self.tokenizer) if token in template or token in ends]
        names = (("the name", name) for name in conversation.identities)
        texts = ((f"the {role} text", text) for role, text in conversation.texts)
        for field, text in (*names, *texts):
            for token in (self.image_token, self.placeholder):
                if token in text:
                    raise DataError(
                        f"{field} {quote(text)} holds the placeholder {token!r}; make it an image part.",
                        kind="placeholders",
                    )
            for token in control:
                if token in text:
                    raise DataError(
                        f"{field} {quote(text)} holds the special token {token!r}, which could end or forge a turn; "
                        "remove it."
                    )

    def _name_ids(self, conversations: list[Conversation]) -> list[list[list[int]]]:
        """Tokens of each name as a question holds them. Many tokenizers join a word with the space before it."""
        before, after = "Where is ", " now"
        return [
            [self._tokens_between(before, name, after) for name in conversation.identities]
            for conversation in conversations
        ]

    def _tokens_between(self, before: str, text: str, after: str) -> list[int]:
        encoded = self.tokenizer(before + text + after, add_special_tokens=False, return_offsets_mapping=True)
        inside = tokens_in_spans(encoded["offset_mapping"], [(len(before), len(before) + len(text))])
        return [token for token, is_inside in zip(encoded["input_ids"], inside, strict=True) if is_inside]

    def _with_loaded_images(self, conversation: Conversation) -> list[dict[str, Any]]:
        """The messages as they were passed, with images in place of paths."""
        loader = self._loader(self.image_root)
        messages = []
        for turn in conversation.turns:
            message = dict(turn.message)
            if isinstance(message.get("content"), (list, tuple)):
                photos = iter(part for part in turn.content if isinstance(part, Photo))
                message["content"] = [self._loaded(part, photos, loader) for part in message["content"]]
            messages.append(message)
        return messages

    @staticmethod
    def _loaded(part: Any, photos: Iterable[Photo], loader: PhotoLoader) -> Any:
        if not isinstance(part, Mapping) or part["type"] == "text":
            return part
        photo = next(photos)
        if photo.key in OTHER_PARTS or photo.image is None:  # a placeholder
            return part
        image = loader.load(photo.image, field=photo.field, key=photo.key)
        others = {name: value for name, value in part.items() if name not in (*IMAGE_KEYS, "type", "image_url")}
        return {**others, "type": "image", "image": image}

    def _load_nested(self, images: Any, field: str = "images") -> Any:
        """Load the paths and bytes among ``images``, which may be nested."""
        if isinstance(images, (list, tuple)):
            return [self._load_nested(image, f"{field}[{number}]") for number, image in enumerate(images)]
        return images if images is None else self._loader(self.image_root).load(images, field=field)

    def _references(self, written: str, text: str, image_text: str, header: str) -> list[str | None]:
        """For each image of a text the name that it is a reference of; ``written`` is the text before replacements."""
        if not self.read_references:
            return [None] * text.count(self.image_token)
        special = special_tokens(self.tokenizer)
        if written != text:  # what takes the place of <image> may hold line breaks
            return references_in_text(written, WRITTEN_IMAGE, WRITTEN_IMAGE, header=header, special=special)
        return references_in_text(text, image_text, self.image_token, header=header, special=special)

    def _with_image_token(self, text: str, image_text: str) -> str:
        """Replace ``<image>``, if it is not the image token."""
        if self.image_token == WRITTEN_IMAGE or self.image_token in text:
            return text
        return text.replace(WRITTEN_IMAGE, image_text)

    def _box_tensors(self, sample: Sample, sizes: dict[Any, tuple[int, int]]) -> dict[str, Tensor]:
        """The boxes of identities with references, as far as the image processor keeps them."""
        number = {identity.name: index for index, identity in enumerate(sample.identities)}
        boxes, box_image, box_identity = [], [], []
        for box in sample.boxes:
            kept = self._kept(box.box, sizes[_key(box.image)])
            if box.name not in number or kept is None:
                continue
            for image, path in enumerate(sample.message_images, len(sample.reference_images)):
                if _key(path) == _key(box.image):  # an image that occurs several times has its boxes each time
                    boxes.append(kept)
                    box_image.append(image)
                    box_identity.append(number[box.name])
        return {
            "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
            "box_image": torch.tensor(box_image, dtype=torch.long),
            "box_identity": torch.tensor(box_identity, dtype=torch.long),
        }

    def _kept(self, box: Sequence[float], size: tuple[int, int]) -> tuple[float, ...] | None:
        """Move a box into the part of the image that the image processor keeps; None if it lies outside."""
        image_processor = self.processor.image_processor
        left, top, right, bottom = crop_box(image_processor, size) if _crops(image_processor) else FULL_IMAGE
        height, width = size
        x1, x2 = ((value / width - left) / (right - left) for value in (box[0], box[2]))
        y1, y2 = ((value / height - top) / (bottom - top) for value in (box[1], box[3]))
        x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in (x1, y1, x2, y2))
        return (x1 * width, y1 * height, x2 * width, y2 * height) if x1 < x2 and y1 < y2 else None


def _scene_sizes(sample: Sample, sizes: list[tuple[int, int]]) -> dict[Any, tuple[int, int]]:
    """Size of each image of the messages."""
    return dict(zip(map(_key, sample.message_images), sizes[len(sample.reference_images) :], strict=True))


def _check_boxes(sample: Sample, sizes: dict[Any, tuple[int, int]]) -> None:
    """Check that the boxes lie in their images."""
    for box in sample.all_boxes:
        height, width = sizes[_key(box.image)]
        if box.box[0] >= width or box.box[1] >= height:
            raise DataError(
                f"sample {sample.id!r}: the box {box.box} of {box.name!r} lies outside its image of {width} x {height} "
                "pixels; boxes are in pixels of the original image."
            )


def _key(image: Any) -> Any:
    """Identifies an image: a path by its text, an image by its object."""
    return image if isinstance(image, str) else str(image) if isinstance(image, Path) else id(image)


def _size(image: Any) -> tuple[int, int]:
    """Height and width."""
    return (image.height, image.width) if isinstance(image, Image.Image) else tuple(get_image_size(image))


def _crops(image_processor) -> bool:
    """Whether the image processor crops images or pads them to a square, without splitting them into tiles."""
    if not getattr(image_processor, "image_grid_pinpoints", None):
        pads = hasattr(image_processor, "pad_to_square") and getattr(image_processor, "do_pad", False)
        return bool(getattr(image_processor, "do_center_crop", False) or pads)
    return False


def _truncation_limit(arguments: dict[str, Any], tokenizer) -> int | None:
    """Number of tokens that a call truncates to, or None."""
    given = {**arguments, **arguments.get("text_kwargs", {})}
    if given.get("truncation") in (None, False, "do_not_truncate"):
        return None
    return given.get("max_length") or tokenizer.model_max_length


def _untruncated(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call without truncation."""
    changed = dict(arguments)
    if changed.get("text_kwargs"):
        changed["text_kwargs"] = _untruncated(changed["text_kwargs"])
    if changed.pop("truncation", None) is not None and changed.get("padding") != "max_length":
        changed.pop("max_length", None)
    return changed


def _rows(values: Any) -> list:
    return values.tolist() if isinstance(values, Tensor) else values


def _is_per_token(value: Any, length: int) -> bool:
    return isinstance(value, Tensor) and tuple(value.shape) == (1, length)


def _messages(conversation: Conversation) -> list[Mapping[str, Any]]:
    return [turn.message for turn in conversation.turns]


def _given(**arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def _options_of(cls: type) -> tuple[str, ...]:
    return tuple(name for name, p in inspect.signature(cls.__init__).parameters.items() if p.kind is p.KEYWORD_ONLY)
