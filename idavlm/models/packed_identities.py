"""Identities of a batch in one integer per token.

Some training loops pass only the fields that they know on to the model, and reorder and split them by rows: TRL's
``GRPOTrainer`` keeps ``mm_token_type_ids`` ``[B, T]``, which says for each token whether it is text or an image.
:func:`pack_identities` adds the role, the identity and the borders of each image to its placeholders, and the names of
the identities to the first columns of each row. :func:`unpack_identities` restores the fields and the token types.

:class:`IDAVLMForConditionalGeneration` takes two fields of tokens in place of the names: :func:`pack_token_identities`
and :func:`unpack_token_identities` do the same for it.
"""

from typing import Any

import torch
from torch import Tensor

FIELD = "mm_token_type_ids"

_TYPE_BITS, _ROLE_BITS, _IDENTITY_BITS = 3, 2, 16
_ROLE = _TYPE_BITS
_IS_ODD = _ROLE + _ROLE_BITS
_IDENTITY = _IS_ODD + 1
_NAME = _IDENTITY + _IDENTITY_BITS
_IMAGE_BITS = (1 << _NAME) - 1


def pack_identities(
    input_ids: Tensor, token_types: Tensor | None, fields: dict[str, Tensor], placeholder_id: int
) -> Tensor:
    """Return ``mm_token_type_ids`` that hold the identity fields of a batch.

    Args:
        input_ids: ``[B, T]``.
        token_types: ``[B, T]`` in 0..7, or None for a model that takes no token types.
        fields: ``image_roles``, ``sample_index``, ``identity_index``, ``num_image_tokens`` and ``identity_name_ids``.
        placeholder_id: token id of an image token.
    """
    packed = torch.zeros_like(input_ids) if token_types is None else token_types.clone()
    _add_images(packed, input_ids == placeholder_id, fields, fields["num_image_tokens"])
    for row, names in enumerate(fields["identity_name_ids"].tolist()):
        tokens = [(token << 1 | (place == 0)) + 2 for name in names for place, token in enumerate(name) if token >= 0]
        packed[row, : len(tokens)] |= torch.tensor(tokens, dtype=torch.long) << _NAME
    return packed


def _add_images(
    packed: Tensor, is_placeholder: Tensor, fields: dict[str, Tensor], num_image_tokens: Tensor | int
) -> None:
    """Add the role, the identity and the borders of each image to its placeholders, in place."""
    roles, samples, identities = (fields[name] for name in ("image_roles", "sample_index", "identity_index"))
    number = torch.zeros_like(samples)  # of the image within its row
    for row in samples.unique().tolist():
        number[samples == row] = torch.arange(int((samples == row).sum()))
    codes = ((roles + 1) << _ROLE) | ((number % 2) << _IS_ODD) | (identities << _IDENTITY)
    packed[is_placeholder] |= codes.repeat_interleave(num_image_tokens)


def pack_token_identities(input_ids: Tensor, fields: dict[str, Tensor], placeholder_id: int, image_seq_length: int):
    """Return ``mm_token_type_ids`` ``[B, T]`` that hold the identity fields of a batch of ``IDAVLMProcessor``.

    Args:
        input_ids: ``[B, T]``.
        fields: ``image_roles``, ``sample_index``, ``identity_index``, ``token_identity_index`` and ``name_mask``.
        placeholder_id: token id of an image token.
        image_seq_length: number of image tokens per image.
    """
    packed = ((fields["token_identity_index"] + 2) << 1 | fields["name_mask"].long()) << _NAME
    _add_images(packed, input_ids == placeholder_id, fields, image_seq_length)
    return packed


def unpack_token_identities(packed: Tensor) -> dict[str, Tensor]:
    """The identity fields that :func:`pack_token_identities` packed; none if nothing is packed.

    Tokens that a trainer has appended to a row are about the identity at the end of its prompt, as in generation.
    """
    if not (packed >> _TYPE_BITS).any():
        return {}
    roles, samples, identities, _ = _images(packed)
    tokens = packed >> _NAME
    columns = torch.arange(packed.shape[1], device=packed.device).expand_as(packed)
    is_packed = tokens > 0
    last = columns.where(is_packed, 0).amax(1, keepdim=True)
    index = (tokens >> 1) - 2
    index = torch.where(columns > last, index.gather(1, last), index.where(is_packed, -1))
    return {
        "image_roles": roles,
        "sample_index": samples,
        "identity_index": identities,
        "token_identity_index": index,
        "name_mask": is_packed & (tokens & 1).bool(),
    }


def _images(packed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Role, row, identity and number of placeholders of each image."""
    rows, columns = (packed & _IMAGE_BITS >= 1 << _ROLE).nonzero(as_tuple=True)
    codes = (packed[rows, columns] & _IMAGE_BITS) >> _ROLE
    images, counts = torch.stack([rows, codes], 1).unique_consecutive(dim=0, return_counts=True)
    samples, codes = images.unbind(1)
    return (codes & ((1 << _ROLE_BITS) - 1)) - 1, samples, codes >> _IDENTITY - _ROLE, counts


def unpack_identities(arguments: dict[str, Any]) -> None:
    """Replace packed identities among the arguments of a model by the fields that they stand for, in place.

    Arguments without packed identities are left as they are.
    """
    packed = arguments.get(FIELD)
    if packed is None or not (packed >> _TYPE_BITS).any():
        return
    types = packed & ((1 << _TYPE_BITS) - 1)
    if types.any():
        arguments[FIELD] = types
    else:  # the model takes no token types
        del arguments[FIELD]
    roles, samples, identities, counts = _images(packed)
    names = [_names(row) for row in (packed >> _NAME).tolist()]
    num_identities = max(map(len, names))
    length = max((len(name) for row in names for name in row), default=0)
    name_ids = packed.new_full((len(names), num_identities, length), -1)
    for row, of_row in enumerate(names):
        for identity, name in enumerate(of_row):
            name_ids[row, identity, : len(name)] = packed.new_tensor(name)
    arguments.update(
        image_roles=roles,
        sample_index=samples,
        identity_index=identities,
        num_image_tokens=counts,
        identity_name_ids=name_ids,
    )


def _names(values: list[int]) -> list[list[int]]:
    """The token ids of each name of a row."""
    names: list[list[int]] = []
    for value in values:
        if not value:
            break
        if (value - 2) & 1:
            names.append([])
        names[-1].append(value - 2 >> 1)
    return names
