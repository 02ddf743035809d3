"""Supervision of identity attention by boxes: targets of a batch, and the losses that they define."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from idavlm.models.image_batch import ImageBatch
from idavlm.modules import NULL, IDFormer, ImageTokens, identity_patch_targets
from idavlm.modules.positions import square_grid
from idavlm.utils import IGNORE_INDEX, ImageRole


def supervised_scenes(
    image_roles: Tensor, sample_index: Tensor, identity_index: Tensor, box_image: Tensor, box_identity: Tensor
) -> Tensor:
    """Return which images of a batch the boxes supervise, ``[I]`` bool on the CPU.

    A scene of a sample with references is supervised if it holds a box, or if every identity that its sample introduces
    has a box in some scene of the sample: the scene then shows none of them. Otherwise an identity may be anywhere in
    the scene, and nothing is known about it.

    Args:
        image_roles, sample_index, identity_index: ``[I]``, see :meth:`idavlm.IDFormer.forward`.
        box_image, box_identity: ``[N]``, see :class:`IDAVLMForConditionalGeneration`.
    """
    image_roles, sample_index, box_image = image_roles.cpu(), sample_index.cpu(), box_image.cpu()
    is_incomplete = _in_incomplete_samples(image_roles, sample_index, identity_index, box_image, box_identity)
    holds_box = torch.zeros(len(image_roles), dtype=torch.bool)
    holds_box[box_image] = True
    has_references = torch.isin(sample_index, sample_index[image_roles == ImageRole.REFERENCE])
    return (image_roles == ImageRole.SCENE) & has_references & (holds_box | ~is_incomplete)


def count_supervised_scenes(batch: Mapping[str, Any]) -> int:
    """Number of :func:`supervised_scenes` of a collated batch; 0 if it has no field ``boxes``."""
    if batch.get("boxes") is None or len(batch["boxes"]) == 0:
        return 0
    fields = ("image_roles", "sample_index", "identity_index", "box_image", "box_identity")
    return int(supervised_scenes(*(batch[name] for name in fields)).sum())


def target_identity_map(
    images: ImageBatch,
    boxes: Tensor | None,
    box_image: Tensor | None,
    box_identity: Tensor | None,
    image_sizes: Tensor | None,
) -> Tensor:
    """Compute :func:`idavlm.identity_patch_targets` of a batch on the host.

    If a sample introduces an identity that has no box in it, the identity may be anywhere in its scenes. NULL is then
    not a target in these scenes. Without boxes there are no targets.

    Returns:
        ``[I, P]`` identity, NULL or ``IGNORE_INDEX`` of each patch, on the device of the boxes.

    Raises:
        ValueError: boxes without the tensors that describe them.
    """
    if boxes is None:
        return torch.full(images.features.shape[:2], IGNORE_INDEX, device=images.features.device)
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
    is_incomplete = _in_incomplete_samples(image_roles, sample_index, identity_index, box_image, box_identity)
    targets = targets.masked_fill(is_incomplete[:, None] & (targets == NULL), IGNORE_INDEX)
    return targets.to(boxes.device)


def token_targets(
    images: ImageTokens,
    boxes: Tensor,
    box_image: Tensor,
    box_identity: Tensor,
    image_sizes: Tensor,
    image_roles: Tensor,
    sample_index: Tensor,
    identity_index: Tensor,
) -> Tensor:
    """:func:`target_identity_map` for images of different grids, ``[N]`` for the N tokens of all images.

    Tokens of images without a grid have no target.
    """
    device = boxes.device
    boxes, box_image, box_identity, image_sizes = (x.cpu() for x in (boxes, box_image, box_identity, image_sizes))
    image_roles, sample_index = image_roles.cpu(), sample_index.cpu()
    is_incomplete = _in_incomplete_samples(image_roles, sample_index, identity_index, box_image, box_identity)
    targets = []
    for image, (length, grid) in enumerate(zip(images.lengths, images.grids, strict=True)):
        of_image = box_image == image
        if of_image.any() and image_roles[image] != ImageRole.SCENE:
            raise ValueError(
                f"box_image holds {image}, which has role {int(image_roles[image])}; boxes belong to scenes."
            )
        if grid is None or image_roles[image] != ImageRole.SCENE:
            targets.append(torch.full((length,), IGNORE_INDEX))
            continue
        found = identity_patch_targets(
            boxes[of_image],
            torch.zeros(int(of_image.sum()), dtype=torch.long),
            box_identity[of_image],
            image_sizes[image : image + 1],
            grid,
        ).flatten()
        targets.append(found.masked_fill(found == NULL, IGNORE_INDEX) if is_incomplete[image] else found)
    return torch.cat([*targets, torch.zeros(0, dtype=torch.long)]).to(device)


def _in_incomplete_samples(
    image_roles: Tensor, sample_index: Tensor, identity_index: Tensor, box_image: Tensor, box_identity: Tensor
) -> Tensor:
    """Return whether the sample of an image introduces an identity that has no box in the sample, ``[I]`` bool."""
    is_reference = image_roles == ImageRole.REFERENCE
    references = zip(sample_index[is_reference].tolist(), identity_index.cpu()[is_reference].tolist(), strict=True)
    located = set(zip(sample_index[box_image].tolist(), box_identity.tolist(), strict=True))
    incomplete = sorted({sample for sample, identity in references if (sample, identity) not in located})
    return torch.isin(sample_index, torch.tensor(incomplete, dtype=sample_index.dtype))


def supervision_losses(
    id_former: IDFormer,
    images: ImageBatch,
    identity_maps: tuple[Tensor, ...],
    targets: Tensor,
    *,
    num_scenes: int,
    identity_map_loss_weight: float,
    contrastive_loss_weight: float,
    gather_references: bool = False,
) -> dict[str, Tensor]:
    """Compute the losses that the ``targets`` of :func:`target_identity_map` define.

    ``identity_map_loss`` is the mean over ``num_scenes`` scenes, those that :func:`supervised_scenes` counts.
    ``gather_references``: see :meth:`idavlm.IDFormer.contrastive_loss`.

    Returns:
        ``identity_map_loss``, ``contrastive_loss`` (only if its weight is not 0) and ``auxiliary_loss``, their weighted
        sum.
    """
    # Divided by a number that is known before the model runs, so that a trainer can make the loss of a large batch from
    # those of its parts.
    per_image = id_former.identity_map_loss(identity_maps, targets, *images.roles, reduction="none")
    losses = {"identity_map_loss": per_image.sum() / max(num_scenes, 1)}
    total = identity_map_loss_weight * losses["identity_map_loss"]
    if contrastive_loss_weight:
        identity_index = images.identity_index
        summed = id_former.contrastive_loss(
            images.features,
            images.image_roles,
            images.sample_index,
            torch.zeros_like(images.sample_index) if identity_index is None else identity_index,
            targets,
            grid_size=images.grid_size,
            reduction="sum",
            gather_references=gather_references,
        )
        losses["contrastive_loss"] = mean_contrastive_loss(
            summed, int((targets >= 0).sum()), num_scenes, over_processes=gather_references
        )
        total = total + contrastive_loss_weight * losses["contrastive_loss"]
    return losses | {"auxiliary_loss": total}


def mean_contrastive_loss(summed: Tensor, num_labelled: int, num_scenes: int, *, over_processes: bool) -> Tensor:
    """The contrastive loss of a batch: the mean over the patches or tokens that show an identity.

    The loss of several processes is one number, too: ``over_processes`` makes that mean from the losses of the
    processes, each with the share of its supervised scenes as its weight, as :class:`idavlm.IDTrainer` weights them.

    Args:
        summed: the sum over the patches of this process.
        num_labelled: number of these patches.
        num_scenes: number of supervised scenes of this process.
        over_processes: take the mean over the patches of all processes. All of them must call this function.
    """
    if not over_processes:
        return summed / max(num_labelled, 1)
    counts = torch.tensor([num_labelled, num_scenes], device=summed.device)
    dist.all_reduce(counts)
    all_labelled, all_scenes = counts.tolist()
    return summed * all_scenes / (max(num_scenes, 1) * max(all_labelled, 1))
