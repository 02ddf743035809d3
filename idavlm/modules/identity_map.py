"""The identity map: the share of attention that each patch pays to each identity, and how boxes supervise it."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from idavlm.modules.image_groups import ImageGroups, select_images
from idavlm.utils import IGNORE_INDEX, ImageRole, check_choice
from idavlm.utils.sharding import gather_rows, process_index

NULL = -1
"""Target of a patch that shows no reference. It indexes the last column of an identity map."""


def identity_map_from_attention(sums: Tensor, groups: ImageGroups, num_patches: int) -> Tensor:
    """Average the attention of scenes over heads and arrange it in the order of the batch, ``[I, P, G + 1]``.

    ``sums`` ``[S * P, H, G + 1]`` is the attention of each patch of the S scenes, summed over the keys of each identity
    and, in the last column, over the null token. Images that attend to no reference have all of it in the last column.
    """
    scenes = rearrange(sums.mean(1), "(s p) g -> s p g", p=num_patches)
    num_columns = sums.shape[-1]
    # Not one_hot, for which torch.compile compiles once per number of identities.
    columns = torch.arange(num_columns, device=scenes.device)
    independent = (columns == num_columns - 1).to(scenes).expand(groups.num_independent, num_patches, -1)
    return select_images(torch.cat([independent, scenes]), groups.inverse)


def teacher_forced_map(identity_map: Tensor, target_identity_map: Tensor | None) -> Tensor:
    """Replace the predicted identity map ``[I, P, G + 1]`` by the ground truth ``[I, P]`` wherever it has a target.

    ``IGNORE_INDEX`` keeps the prediction of a patch, and None the whole prediction.
    """
    if target_identity_map is None:
        return identity_map
    columns = identity_map.shape[-1]
    classes = target_identity_map.masked_fill(target_identity_map == NULL, columns - 1).clamp(min=0)
    ground_truth = F.one_hot(classes, columns).to(identity_map)
    return torch.where((target_identity_map == IGNORE_INDEX)[..., None], identity_map, ground_truth)


def pool_identity_map(
    identity_map: Tensor, grid_size: tuple[int, int], token_grid: tuple[int, int], num_identities: int
) -> Tensor:
    """Average the identity map ``[I, P, G + 1]`` over the cell of each token, ``[I, Q, num_identities]``.

    ``grid_size`` and ``token_grid`` are the rows and columns of the patches and of the tokens. The null share is left
    out. ``num_identities`` is at least 1 and at least G; the columns after the first G are zeros.
    """
    identities = F.pad(identity_map[..., :-1], (0, num_identities - identity_map.shape[-1] + 1))
    shares = rearrange(identities, "i (h w) g -> i g h w", h=grid_size[0])
    return rearrange(F.adaptive_avg_pool2d(shares, token_grid), "i g h w -> i (h w) g")


def identity_patch_targets(
    boxes: Tensor,
    box_image: Tensor,
    box_identity: Tensor,
    image_sizes: Tensor,
    grid_size: tuple[int, int],
    *,
    image_roles: Tensor | None = None,
    min_coverage: float = 0.5,
) -> Tensor:
    """Label each patch with the identity whose box covers it.

    The coverage of a patch by a box is ``intersection / min(patch area, box area)``, so a box smaller than a patch can
    cover it. A patch belongs to the one identity that covers at least ``min_coverage`` of it. It is ``IGNORE_INDEX`` if
    two identities do, or if a box covers only a smaller part of it. All other patches are :data:`NULL`.

    Args:
        boxes: ``[N, 4]`` pixels ``[x1, y1, x2, y2]`` of the original image.
        box_image: ``[N]`` index of each box's image in the batch.
        box_identity: ``[N]`` index of the identity within its sample, as ``identity_index`` of :class:`IDFormer`.
            Leave out boxes of identities without a reference: for the model they are null.
        image_sizes: ``[I, 2]`` height and width of the original images in pixels.
        grid_size: rows and columns of the patches, which cover the whole image.
        image_roles: ``[I]``. If given, only scenes are labelled, and a box in another image is an error.
        min_coverage: threshold in (0, 1].

    Returns:
        ``[I, P]`` int64 targets, patches row by row.

    Raises:
        ValueError: shapes, indices or boxes that do not fit.
    """
    boxes = boxes if boxes.is_floating_point() else boxes.float()
    _check_boxes(boxes, box_image, box_identity, image_sizes, image_roles)
    if not 0 < min_coverage <= 1:
        raise ValueError(f"min_coverage={min_coverage} must lie in (0, 1].")
    rows, columns = grid_size
    num_images, num_patches = len(image_sizes), rows * columns
    device = boxes.device
    height, width = image_sizes[box_image].to(boxes.dtype).unbind(-1)
    x1, y1, x2, y2 = (boxes / torch.stack([width, height, width, height], -1)).clamp(0, 1).unbind(-1)

    intersection = cell_overlap(y1, y2, rows)[:, :, None] * cell_overlap(x1, x2, columns)[:, None, :]
    area = ((x2 - x1) * (y2 - y1)).clamp(max=1 / num_patches)
    coverage = intersection.flatten(1) / area.clamp(min=torch.finfo(boxes.dtype).tiny)[:, None]

    num_identities = int(box_identity.max()) + 1 if len(boxes) else 0
    claims = boxes.new_zeros(num_images * num_identities, num_patches)
    cell = (box_image * num_identities + box_identity).long()[:, None].expand_as(coverage)
    claims = claims.scatter_reduce(0, cell, coverage, "amax").view(num_images, num_identities, num_patches)
    # Slightly below the threshold, so that rounding does not decide about patches that are covered by exactly one half.
    claimed = claims >= min_coverage - 1e-4
    targets = torch.full((num_images, num_patches), NULL, device=device)
    targets[(claims > 1e-4).any(1)] = IGNORE_INDEX
    single = claimed.sum(1) == 1
    if num_identities:
        targets[single] = claimed.int().argmax(1)[single]
    if image_roles is not None:
        targets[image_roles.to(device) != ImageRole.SCENE] = IGNORE_INDEX
    return targets


def cell_overlap(low: Tensor, high: Tensor, cells: int) -> Tensor:
    """``[N, cells]`` length that each interval ``low..high`` ``[N]`` shares with each of the cells that divide 0..1."""
    edges = torch.linspace(0, 1, cells + 1, device=low.device, dtype=low.dtype)
    return (torch.minimum(high[:, None], edges[1:]) - torch.maximum(low[:, None], edges[:-1])).clamp(min=0)


def connected_cells(mask: Tensor, cell: int, *, diagonals: bool = True) -> Tensor | None:
    """The cells of ``mask`` ``[rows, columns]`` that are connected with ``cell``.

    Args:
        mask: boolean.
        cell: number of the cell, row by row.
        diagonals: whether cells that touch at a corner are connected.

    Returns:
        A mask, or None if ``cell`` is not in ``mask``.
    """
    region = torch.zeros_like(mask)
    region.view(-1)[cell] = True
    if not mask.view(-1)[cell]:
        return None
    kernels = [(3, 3)] if diagonals else [(1, 3), (3, 1)]
    while True:
        grown = region
        for rows, columns in kernels:
            near = F.max_pool2d(region[None].float(), (rows, columns), 1, (rows // 2, columns // 2))[0]
            grown = grown | near.bool() & mask
        if torch.equal(grown, region):
            return region
        region = grown


def identity_map_loss(
    identity_map: Tensor, targets: Tensor, has_reference: Tensor, *, reduction: str = "mean"
) -> Tensor:
    """Negative log share of attention that each labelled patch pays to its target.

    The loss of an image is the mean over its labelled patches. Images that attend to no reference do not count. Without
    ``null_token`` the last column is 0 for every patch of an image with references, so NULL cannot be learned.
    :meth:`IDFormer.identity_map_loss` leaves those patches out.

    Args:
        identity_map: ``[I, P, G + 1]``, a map of :class:`IDFormer`: one column per identity, the last for null.
        targets: ``[I, P]`` identity 0..G-1, :data:`NULL` (-1) or ``IGNORE_INDEX`` (-100).
        has_reference: ``[I, G]`` bool, whether an image attends to a reference of an identity, from
            :func:`identities_of_scenes`. The map itself does not tell: attention to a reference may underflow to 0.
        reduction: ``"mean"`` over the images that count and have a labelled patch, 0 if there are none; or ``"none"``.

    Returns:
        Scalar, at least float32; with ``reduction="none"`` the loss of each image ``[I]``, 0 for images without one.

    Raises:
        ValueError: shapes that do not fit, or a target identity that has no reference in the sample of the image.
    """
    check_choice("reduction", reduction, ("mean", "none"))
    if identity_map.dim() != 3 or identity_map.shape[:2] != targets.shape:
        raise ValueError(
            f"identity_map has shape {tuple(identity_map.shape)} and targets {tuple(targets.shape)}; "
            "expected [I, P, G + 1] and [I, P]."
        )
    num_identities = identity_map.shape[-1] - 1
    if has_reference.shape != (len(identity_map), num_identities):
        raise ValueError(
            f"has_reference has shape {tuple(has_reference.shape)} and identity_map {tuple(identity_map.shape)}; "
            "expected [I, G] and [I, P, G + 1]."
        )
    has_reference = has_reference.to(targets.device)
    labelled = targets != IGNORE_INDEX
    is_identity = labelled & (targets != NULL)
    is_known = F.pad(has_reference, (0, 1)).gather(1, targets.clamp(0, num_identities))
    wrong = is_identity & ((targets < 0) | ~is_known)
    if wrong.any():
        image, patch = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"targets[{image}, {patch}]={int(targets[image, patch])}, but image {image} has no reference of that "
            f"identity (it has {has_reference[image].nonzero().flatten().tolist()}); use -1 for NULL and -100 to leave "
            "the patch out."
        )
    column = targets.where(is_identity, num_identities)
    dtype = torch.promote_types(identity_map.dtype, torch.float32)
    share = identity_map.to(dtype).gather(-1, column[..., None]).squeeze(-1)
    nll = -share.clamp(min=torch.finfo(torch.float32).tiny).log()
    counted = labelled & has_reference.any(-1, keepdim=True)
    per_image = (nll * counted).sum(1) / counted.sum(1).clamp(min=1)
    return per_image if reduction == "none" else per_image.sum() / counted.any(1).sum().clamp(min=1)


def identities_of_scenes(
    image_roles: Tensor, sample_index: Tensor, identity_index: Tensor | None, num_identities: int
) -> Tensor:
    """Return which identities an image attends to, ``[I, G]`` bool on the CPU: those with a reference in its sample.

    Rows of references and of general images are False.

    Args:
        image_roles, sample_index, identity_index: see :meth:`IDFormer.forward`.
        num_identities: G, the largest number of identities in a sample.
    """
    roles, samples = image_roles.cpu(), sample_index.cpu()
    is_reference = roles == ImageRole.REFERENCE
    if identity_index is None:  # each reference is an identity of its own
        same_sample = samples[:, None] == samples[None]
        identities = (same_sample & is_reference[None]).tril(-1).sum(1)
    else:
        identities = identity_index.cpu()
    num_samples = int(samples[-1]) + 1 if len(samples) else 0
    introduced = torch.zeros(num_samples, num_identities, dtype=torch.bool)
    introduced[samples[is_reference], identities[is_reference]] = True
    return introduced[samples] & (roles == ImageRole.SCENE)[:, None]


def identity_contrastive_loss(
    q: Tensor, k: Tensor, owner: Tensor, target: Tensor, *, num_null: int, gather_references: bool = False
) -> Tensor:
    """Sum of the negative log attention that patches pay to their identity among all identities of the batch.

    :func:`identity_map_loss` compares a patch with the few identities of its sample. This loss compares it with the
    references of all samples, which is a harder task.

    Attention is averaged over heads before the logarithm. The result is at least float32; 0 without patches.

    Args:
        q: ``[N, H, D]`` projected patches.
        k: ``[num_null + K, H, D]`` projected keys: the null token, then the K keys of all references.
        owner: ``[K]`` identity that each key belongs to, numbered over the batch.
        target: ``[N]`` identity that each patch shows. It has a reference in the batch.
        num_null: 0 or 1, number of null tokens.
        gather_references: compare the patches with the references of all processes. All of them must call the function.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q, k = q.to(dtype), k.to(dtype)
        if gather_references:
            keys, process = gather_rows(k[num_null:])
            k = torch.cat([k[:num_null], keys])
            owner = gather_rows(owner)[0].masked_fill(process != process_index(), -1)  # targets are at least 0
        scores = torch.einsum("nhd,khd->hnk", q * q.shape[-1] ** -0.5, k)
        correct = scores[..., num_null:].masked_fill(owner != target[:, None], -torch.inf).logsumexp(-1)
        log_share = correct - scores.logsumexp(-1)
        return (math.log(q.shape[1]) - log_share.logsumexp(0)).sum()


def attention_energies(q: Tensor, k: Tensor, lengths: Sequence[int]) -> Tensor:
    """Logarithm of the attention that each query would pay to each group of keys, before it is normalised.

    Args:
        q: ``[N, H, D]`` projected patches of a scene.
        k: ``[K, H, D]`` projected keys, group after group.
        lengths: number of keys of each of the R groups.

    Returns:
        ``[R, N]``, mean over heads, in float32.
    """
    scores = torch.einsum("nhd,khd->khn", q.float() * q.shape[-1] ** -0.5, k.float())
    return torch.stack([group.logsumexp(0).mean(0) for group in scores.split(list(lengths))])


def _check_boxes(
    boxes: Tensor, box_image: Tensor, box_identity: Tensor, image_sizes: Tensor, image_roles: Tensor | None
) -> None:
    num_boxes, num_images = len(boxes), len(image_sizes)
    for name, tensor, shape in (
        ("boxes", boxes, (num_boxes, 4)),
        ("box_image", box_image, (num_boxes,)),
        ("box_identity", box_identity, (num_boxes,)),
        ("image_sizes", image_sizes, (num_images, 2)),
        ("image_roles", image_roles, (num_images,)),
    ):
        if tensor is not None and (tensor.shape != shape or (name.startswith("box_") and tensor.is_floating_point())):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; expected {list(shape)}, integers "
                "for indices."
            )
    described = zip(boxes.tolist(), box_image.tolist(), box_identity.tolist(), strict=True)
    for number, (box, image, identity) in enumerate(described):
        if not 0 <= image < num_images:
            raise ValueError(
                f"box_image[{number}]={image} is out of range; the batch has {num_images} images, numbered from 0."
            )
        if image_roles is not None and image_roles[image] != ImageRole.SCENE:
            raise ValueError(
                f"box_image[{number}]={image} has role {int(image_roles[image])}; boxes belong to scenes (1)."
            )
        if identity < 0:
            raise ValueError(
                f"box_identity[{number}]={identity} must be at least 0; leave out boxes of identities without a "
                "reference."
            )
        if not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(f"boxes[{number}]={box} is empty; expected [x1, y1, x2, y2] with x1 < x2 and y1 < y2.")
        height, width = image_sizes[image].tolist()
        if box[2] <= 0 or box[3] <= 0 or box[0] >= width or box[1] >= height:
            raise ValueError(
                f"boxes[{number}]={box} lies outside its image of {width} x {height} pixels; are the boxes in pixels "
                "of the original image?"
            )
