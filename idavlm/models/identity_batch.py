"""Fields of batches with identities, and the collation of encoded samples for models of transformers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from idavlm.data.messages import Conversation
from idavlm.utils import ImageRole

IDENTITY_FIELDS = (
    "image_roles",
    "sample_index",
    "identity_index",
    "num_image_tokens",
    "identity_name_ids",
    "original_image_sizes",
)
"""Fields that the processor adds to batches with identities, see :class:`idavlm.models.IdentityInputs`."""

BOX_FIELDS = ("boxes", "box_image", "box_identity")
"""Fields of the boxes of identities with references."""

_ZERO_PADDED = ("pixel_values", "pixel_attention_mask", "pixel_mask")
"""Fields that transformers' processors pad with zeros to the largest image or number of tiles of a batch."""


def image_fields(conversations: Sequence[Conversation]) -> dict[str, Tensor]:
    """``image_roles``, ``sample_index`` and ``identity_index`` of the images of a batch, ``[I]`` each."""
    roles, samples, identities = [], [], []
    for row, conversation in enumerate(conversations):
        other = ImageRole.SCENE if conversation.identities else ImageRole.GENERAL
        for photo in conversation.photos:
            roles.append(other if photo.identity is None else ImageRole.REFERENCE)
            samples.append(row)
            identities.append(photo.identity or 0)
    return {
        "image_roles": torch.tensor(roles, dtype=torch.long),
        "sample_index": torch.tensor(samples, dtype=torch.long),
        "identity_index": torch.tensor(identities, dtype=torch.long),
    }


def identity_fields(
    conversations: list[Conversation],
    sizes: list[list[tuple[int, int]]],
    counts: list[int],
    name_ids: list[list[list[int]]],
) -> dict[str, Tensor]:
    """The fields of :data:`IDENTITY_FIELDS` for a batch."""
    return image_fields(conversations) | {
        "num_image_tokens": torch.tensor(counts, dtype=torch.long),
        "identity_name_ids": _name_tensor(name_ids),
        "original_image_sizes": torch.tensor([size for row in sizes for size in row], dtype=torch.long).view(-1, 2),
    }


def _name_tensor(name_ids: list[list[list[int]]]) -> Tensor:
    """``[num_samples, G, L]``, -1 at padding."""
    num_identities = max(map(len, name_ids), default=0)
    length = max((len(name) for names in name_ids for name in names), default=0)
    tensor = torch.full((len(name_ids), num_identities, length), -1)
    for row, names in enumerate(name_ids):
        for identity, name in enumerate(names):
            tensor[row, identity, : len(name)] = torch.tensor(name, dtype=torch.long)
    return tensor


def collate_identities(encoded: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The identity fields and boxes of a batch of encoded samples."""
    num_images = [len(sample["image_roles"]) for sample in encoded]
    first = torch.tensor([0, *num_images[:-1]]).cumsum(0).tolist()
    names = [[name[name >= 0].tolist() for name in sample["identity_name_ids"]] for sample in encoded]
    concatenated = (
        "image_roles",
        "identity_index",
        "num_image_tokens",
        "original_image_sizes",
        "boxes",
        "box_identity",
    )
    return {
        **{name: torch.cat([sample[name] for sample in encoded]) for name in concatenated},
        "sample_index": torch.arange(len(encoded)).repeat_interleave(torch.tensor(num_images)),
        "identity_name_ids": _name_tensor(names),
        "box_image": torch.cat([sample["box_image"] + start for sample, start in zip(encoded, first, strict=True)]),
    }


def pad(values: Sequence[Tensor], padding: int, side: str) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding, padding_side=side)


def concatenate(name: str, values: Sequence[Tensor]) -> Tensor:
    """Concatenate a field of images. Images and tiles of several sizes are padded with zeros at their ends."""
    shapes = {tuple(value.shape[1:]) for value in values}
    if len(shapes) > 1:
        if name not in _ZERO_PADDED or len({len(shape) for shape in shapes}) > 1:
            raise ValueError(
                f"{name} of the samples has shapes {sorted(map(list, shapes))} per image, and it is not known how the "
                "processor pads them; use batches of one sample."
            )
        largest = [max(sides) for sides in zip(*shapes, strict=True)]
        padded = []
        for value in values:
            pads = [
                pad for side, full in zip(value.shape[:0:-1], largest[::-1], strict=True) for pad in (0, full - side)
            ]
            padded.append(torch.nn.functional.pad(value, pads))
        values = padded
    return torch.cat(list(values))
