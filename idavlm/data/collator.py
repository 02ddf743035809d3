"""Collation: encoded samples become a batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from idavlm.utils import IGNORE_INDEX, check_choice

_IMAGE_INPUTS = ("pixel_values", "image_features")
_IMAGE_UNITS = {"pixel_values": "pixels (height x width)", "image_features": "(patches x channels)"}

FIELDS: dict[str, tuple[torch.dtype, tuple[int | str, ...]]] = {
    "input_ids": (torch.int64, ("T",)),
    "labels": (torch.int64, ("T",)),
    "token_identity_index": (torch.int64, ("T",)),
    "name_mask": (torch.bool, ("T",)),
    "pixel_values": (torch.float32, ("I", 3, "H", "W")),
    "image_features": (torch.float32, ("I", "P", "Cv")),
    "image_roles": (torch.int64, ("I",)),
    "identity_index": (torch.int64, ("I",)),
    "image_sizes": (torch.int64, ("I", 2)),
    "boxes": (torch.float32, ("N", 4)),
    "box_image": (torch.int64, ("N",)),
    "box_identity": (torch.int64, ("N",)),
}
"""Fields of an encoded sample, with dtype and shape; docs/reference/models.md says what they mean.

An encoded sample has all of them, but only one of ``pixel_values`` and ``image_features``; ``source`` and ``id`` are
optional. The collator adds ``attention_mask`` ``[B, T]`` and ``sample_index`` ``[I]``, makes ``box_image`` count over
the batch, and calls the ids ``sample_ids``.
B is the number of samples, T of tokens, I of images, P of patches, N of boxes; Cv is the width of the vision tower.
"""


class Collator:
    """``collate_fn`` of a DataLoader over encoded samples.

    Text is padded. Images and boxes of all samples are concatenated.

    Args:
        pad_token_id: id of the padding token. ``attention_mask`` is 0 and ``labels`` is -100 at padding.
        padding_side: ``"right"`` for training, ``"left"`` for generation.
    """

    def __init__(self, pad_token_id: int, padding_side: str = "right") -> None:
        check_choice("padding_side", padding_side, ("right", "left"))
        if isinstance(pad_token_id, bool) or not isinstance(pad_token_id, int) or pad_token_id < 0:
            raise ValueError(f"pad_token_id={pad_token_id!r} must be an integer >= 0; set the tokenizer's pad_token.")
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate encoded samples.

        Returns:
            A batch with the fields in the table of :data:`FIELDS`. ``source`` and ``sample_ids``
            are present if the samples have ``source`` and ``id``.

        Raises:
            ValueError: fields are missing or unknown, shapes or indices are inconsistent, or images differ in size.
        """
        if not samples:
            raise ValueError("samples is empty; pass at least one encoded sample.")
        image_input = next((name for name in _IMAGE_INPUTS if name in samples[0]), "pixel_values")
        for number, sample in enumerate(samples):
            _check_sample(number, sample, image_input)
        batch: dict[str, Any] = self._pad_text(samples) | _concatenate_images(samples, image_input)
        num_images = [len(sample[image_input]) for sample in samples]
        first_image = torch.tensor([0, *num_images[:-1]]).cumsum(0).tolist()
        batch["boxes"] = torch.cat([sample["boxes"] for sample in samples])
        batch["box_image"] = torch.cat(
            [sample["box_image"] + first for sample, first in zip(samples, first_image, strict=True)]
        )
        batch["box_identity"] = torch.cat([sample["box_identity"] for sample in samples])
        for name, batch_name in (("source", "source"), ("id", "sample_ids")):
            values = [sample[name] for sample in samples if name in sample]
            if values and len(values) != len(samples):
                raise ValueError(f"{len(values)} of {len(samples)} samples have {name!r}; set it in all or in none.")
            if values:
                batch[batch_name] = values
        return batch

    def _pad_text(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        lengths = [len(sample["input_ids"]) for sample in samples]
        longest = max(lengths)
        shape = (len(samples), longest)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORE_INDEX),
            "token_identity_index": torch.full(shape, -1),
            "name_mask": torch.zeros(shape, dtype=torch.bool),
        }
        for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            columns = slice(0, length) if self.padding_side == "right" else slice(longest - length, longest)
            batch["attention_mask"][row, columns] = 1
            for name in ("input_ids", "labels", "token_identity_index", "name_mask"):
                batch[name][row, columns] = sample[name]
        return batch


def _concatenate_images(samples: Sequence[dict[str, Any]], image_input: str) -> dict[str, Tensor]:
    images = [sample[image_input] for sample in samples]
    not_empty = [(number, image) for number, image in enumerate(images) if len(image)]
    for number, image in not_empty:
        first, expected = not_empty[0]
        if image.shape[1:] != expected.shape[1:]:
            raise ValueError(
                f"images of samples[{first}] are {_size(expected)}, images of samples[{number}] are {_size(image)} "
                f"{_IMAGE_UNITS[image_input]}; set the image processor to resize all images to one size."
            )
    batch = {image_input: torch.cat([image for _, image in not_empty] or images[:1])}
    for name in ("image_roles", "identity_index", "image_sizes"):
        batch[name] = torch.cat([sample[name] for sample in samples])
    batch["sample_index"] = torch.repeat_interleave(
        torch.arange(len(samples)), torch.tensor([len(image) for image in images])
    )
    return batch


def _size(image: Tensor) -> str:
    return f"{image.shape[-2]} x {image.shape[-1]}"


def _check_sample(number: int, sample: dict[str, Any], image_input: str) -> None:
    fields = {name: field for name, field in FIELDS.items() if name not in _IMAGE_INPUTS or name == image_input}
    missing, unknown = fields.keys() - sample.keys(), sample.keys() - fields.keys() - {"source", "id"}
    if missing or unknown:
        fault = f"lacks {', '.join(sorted(missing))}" if missing else f"has unknown fields {', '.join(sorted(unknown))}"
        raise ValueError(
            f"samples[{number}] {fault}; an encoded sample of this batch has {', '.join(fields)} and optionally source "
            "and id."
        )
    sizes: dict[str, tuple[int, str]] = {}
    for name, (dtype, shape) in fields.items():
        value = sample[name]
        if not isinstance(value, Tensor) or value.dtype != dtype or value.dim() != len(shape):
            found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"samples[{number}][{name!r}] is {found}; expected {dtype} [{', '.join(map(str, shape))}]."
            )
        for size, letter in zip(value.shape, shape, strict=True):
            expected, owner = (letter, name) if isinstance(letter, int) else sizes.setdefault(letter, (size, name))
            if size != expected:
                reason = f"as in {owner}" if owner != name else f"as in {list(shape)}"
                raise ValueError(
                    f"samples[{number}][{name!r}] has shape {list(value.shape)}; expected {expected} {reason}."
                )
    if len(sample["input_ids"]) == 0:
        raise ValueError(f"samples[{number}] has no tokens; remove it.")
    num_images, box_image = len(sample[image_input]), sample["box_image"]
    if len(box_image) and not 0 <= int(box_image.min()) <= int(box_image.max()) < num_images:
        raise ValueError(
            f"samples[{number}]['box_image']={box_image.tolist()} is out of range; the sample has {num_images} images."
        )
