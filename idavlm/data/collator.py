"""Encoded samples to a batch: text padded, images and boxes in one row with indices that say whose they are."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from idavlm.utils import IGNORE_INDEX, check_choice

_TEXT = dict.fromkeys(("input_ids", "labels", "token_identity_index"), (torch.int64, ("T",)))
_TEXT["name_mask"] = (torch.bool, ("T",))
_SEEN = {
    "pixel_values": (torch.float32, ("I", 3, "H", "W")),
    "image_features": (torch.float32, ("I", "P", "Cv")),
}
_UNIT = {"pixel_values": "pixels (height x width)", "image_features": "(patches x channels)"}
_IMAGES = {
    "image_roles": (torch.int64, ("I",)),
    "identity_index": (torch.int64, ("I",)),
    "image_sizes": (torch.int64, ("I", 2)),
}
_BOXES = {
    "boxes": (torch.float32, ("N", 4)),
    "box_image": (torch.int64, ("N",)),
    "box_identity": (torch.int64, ("N",)),
}
FIELDS = {**_TEXT, **_SEEN, **_IMAGES, **_BOXES}
"""Fields of an encoded sample with their dtype and shape; of the first two one. ``source`` may come with them."""


class Collator:
    """``collate_fn`` of a DataLoader over encoded samples.

    Args:
        pad_token_id: id put in place of missing text; ``attention_mask`` is 0 there and ``labels`` -100.
        padding_side: ``"right"`` for training, ``"left"`` for generation.
    """

    def __init__(self, pad_token_id: int, padding_side: str = "right") -> None:
        check_choice("padding_side", padding_side, ("right", "left"))
        if isinstance(pad_token_id, bool) or not isinstance(pad_token_id, int) or pad_token_id < 0:
            raise ValueError(f"pad_token_id={pad_token_id!r} must be an integer >= 0; set the tokenizer's pad_token.")
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Batch encoded samples.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels``, ``token_identity_index``, ``name_mask`` ``[B, T]``; of all samples
            together ``pixel_values`` ``[I, 3, H, W]`` or ``image_features`` ``[I, P, Cv]``, as they have them,
            ``image_roles``, ``identity_index``, ``sample_index`` ``[I]``, ``image_sizes`` ``[I, 2]``; ``boxes``
            ``[N, 4]``, ``box_image`` ``[N]`` (image in the batch), ``box_identity`` ``[N]`` (identity in its sample);
            ``source``, a list of B strings, where the samples have one.

        Raises:
            ValueError: missing or unknown fields, shapes or indices that do not fit, images of different size.
        """
        if not samples:
            raise ValueError("samples is empty; a batch needs at least one.")
        seen = _seen_as(samples[0])
        for number, sample in enumerate(samples):
            _check_sample(number, sample, seen)
        batch = self._text(samples)
        batch |= _images(samples, seen)
        counts = [len(sample[seen]) for sample in samples]
        first_image = torch.tensor([0, *counts[:-1]]).cumsum(0).tolist()
        batch["boxes"] = torch.cat([sample["boxes"] for sample in samples])
        batch["box_image"] = torch.cat(
            [sample["box_image"] + first for sample, first in zip(samples, first_image, strict=True)]
        )
        batch["box_identity"] = torch.cat([sample["box_identity"] for sample in samples])
        sources = [sample["source"] for sample in samples if "source" in sample]
        if sources:
            if len(sources) != len(samples):
                raise ValueError(f"{len(sources)} of {len(samples)} samples have a source; give it to all or none.")
            batch["source"] = sources
        return batch

    def _text(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        lengths = [len(sample["input_ids"]) for sample in samples]
        longest = max(lengths)
        shape = (len(samples), longest)
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORE_INDEX)
        token_identity_index = torch.full(shape, -1)
        name_mask = torch.zeros(shape, dtype=torch.bool)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            place = slice(0, length) if self.padding_side == "right" else slice(longest - length, longest)
            input_ids[row, place] = sample["input_ids"]
            labels[row, place] = sample["labels"]
            token_identity_index[row, place] = sample["token_identity_index"]
            name_mask[row, place] = sample["name_mask"]
            attention_mask[row, place] = 1
        texts = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return texts | {"token_identity_index": token_identity_index, "name_mask": name_mask}


def _seen_as(sample: dict[str, Any]) -> str:
    return next((name for name in _SEEN if name in sample), "pixel_values")


def _images(samples: Sequence[dict[str, Any]], seen: str) -> dict[str, Tensor]:
    images = [sample[seen] for sample in samples]
    shown = [(number, image) for number, image in enumerate(images) if len(image)]
    for number, image in shown:
        first, reference = shown[0]
        if image.shape[1:] != reference.shape[1:]:
            raise ValueError(
                f"images of samples[{first}] are {_size(reference)}, those of samples[{number}] {_size(image)} "
                f"{_UNIT[seen]}; a batch needs one size, let the image processor resize to it."
            )
    batch = {seen: torch.cat([image for _, image in shown] or images[:1])}
    for name in ("image_roles", "identity_index", "image_sizes"):
        batch[name] = torch.cat([sample[name] for sample in samples])
    batch["sample_index"] = torch.repeat_interleave(
        torch.arange(len(samples)), torch.tensor([len(image) for image in images])
    )
    return batch


def _size(image: Tensor) -> str:
    return f"{image.shape[-2]} x {image.shape[-1]}"


def _check_sample(number: int, sample: dict[str, Any], seen: str) -> None:
    fields = {name: field for name, field in FIELDS.items() if name not in _SEEN or name == seen}
    missing, unknown = fields.keys() - sample.keys(), sample.keys() - fields.keys() - {"source"}
    if missing or unknown:
        what = f"lacks {', '.join(sorted(missing))}" if missing else f"has unknown fields {', '.join(sorted(unknown))}"
        raise ValueError(
            f"samples[{number}] {what}; an encoded sample of this batch has {', '.join(fields)} and perhaps source."
        )
    sizes: dict[str, tuple[int, str]] = {}
    for name, (dtype, shape) in fields.items():
        value = sample[name]
        if not isinstance(value, Tensor) or value.dtype != dtype or value.dim() != len(shape):
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"samples[{number}][{name!r}] is {got}; expected {dtype} [{', '.join(map(str, shape))}].")
        for got, letter in zip(value.shape, shape, strict=True):
            expected, owner = (letter, name) if isinstance(letter, int) else sizes.setdefault(letter, (got, name))
            if got != expected:
                rule = f"as {owner}" if owner != name else f"as {list(shape)}"
                raise ValueError(
                    f"samples[{number}][{name!r}] has shape {list(value.shape)}; expected {expected} {rule}."
                )
    if len(sample["input_ids"]) == 0:
        raise ValueError(f"samples[{number}] has no tokens; leave it out.")
    images, box_image = len(sample[seen]), sample["box_image"]
    if len(box_image) and not 0 <= int(box_image.min()) <= int(box_image.max()) < images:
        raise ValueError(
            f"samples[{number}]['box_image']={box_image.tolist()} names no image; it has {images}, from 0."
        )
