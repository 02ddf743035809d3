"""Supervision of identity attention by boxes: targets of a batch, and the losses that they define."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from idavlm.models.image_batch import ImageBatch
from idavlm.modules import NULL, IDFormer, identity_patch_targets
from idavlm.modules.positions import square_grid
from idavlm.utils import IGNORE_INDEX, ImageRole


def target_identity_map(
    images: ImageBatch, boxes: Tensor, box_image: Tensor | None, box_identity: Tensor | None, image_sizes: Tensor | None
) -> Tensor:
    """Compute :func:`idavlm.identity_patch_targets` of a batch on the host.

    If a sample introduces an identity that has no box in it, the identity may be anywhere in its scenes. NULL is then
    not a target in these scenes.

    Returns:
        ``[I, P]`` identity, NULL or ``IGNORE_INDEX`` of each patch, on the device of the boxes.

    Raises:
        ValueError: boxes without the tensors that describe them.
    """
    located = (boxes, box_image, box_identity, image_sizes)
    if any(tensor is None for tensor in (*located, *images.roles)):
        raise ValueError(
            "boxes need box_image, box_identity, image_sizes, image_roles, sample_index and identity_index as well; "
            "the collator of the processor makes all of them."
        )
    grid_size = images.grid_size or square_grid("P, the number of patches,", images.features.shape[1])
    on_host, box_image, box_identity, image_sizes = (tensor.cpu() for tensor in located)
    image_roles, sample_index, identity_index = (tensor.cpu() for tensor in images.roles)
    targets = identity_patch_targets(on_host, box_image, box_identity, image_sizes, grid_size, image_roles=image_roles)
    is_reference = image_roles == ImageRole.REFERENCE
    introduced = zip(sample_index[is_reference].tolist(), identity_index[is_reference].tolist(), strict=True)
    boxed = set(zip(sample_index[box_image].tolist(), box_identity.tolist(), strict=True))
    incomplete = sorted({sample for sample, identity in introduced if (sample, identity) not in boxed})
    in_incomplete = torch.isin(sample_index, torch.tensor(incomplete, dtype=sample_index.dtype))
    targets = targets.masked_fill(in_incomplete[:, None] & (targets == NULL), IGNORE_INDEX)
    return targets.to(boxes.device)


def supervision_losses(
    id_former: IDFormer,
    images: ImageBatch,
    identity_maps: tuple[Tensor, ...],
    targets: Tensor,
    *,
    identity_map_loss_weight: float,
    contrastive_loss_weight: float,
) -> dict[str, Tensor]:
    """Compute the losses that the ``targets`` of :func:`target_identity_map` define.

    Returns:
        ``identity_map_loss``, ``contrastive_loss`` (only if its weight is not 0) and ``auxiliary_loss``, their weighted
        sum.
    """
    losses = {"identity_map_loss": id_former.identity_map_loss(identity_maps, targets)}
    total = identity_map_loss_weight * losses["identity_map_loss"]
    if contrastive_loss_weight:
        losses["contrastive_loss"] = id_former.contrastive_loss(
            images.features, *images.roles, targets, grid_size=images.grid_size
        )
        total = total + contrastive_loss_weight * losses["contrastive_loss"]
    return losses | {"auxiliary_loss": total}


def count_supervised_scenes(batch: Mapping[str, Any]) -> int:
    """Count the scenes that the identity-map loss of a batch is a mean over.

    A scene is supervised if its sample has at least one reference and at least one box in the batch.
    """
    box_image, roles, sample_index = (batch.get(name) for name in ("box_image", "image_roles", "sample_index"))
    if box_image is None or len(box_image) == 0 or roles is None or sample_index is None:
        return 0
    with_box = torch.isin(sample_index, sample_index[box_image])
    with_reference = torch.isin(sample_index, sample_index[roles == ImageRole.REFERENCE])
    return int(((roles == ImageRole.SCENE) & with_box & with_reference).sum())
