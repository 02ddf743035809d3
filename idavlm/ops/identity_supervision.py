"""Supervision of the identity attention map from boxes: "this patch shows reference k, or nobody"."""

import torch
import torch.nn.functional as F
from torch import Tensor

from idavlm.utils import ImageRole

NULL = -1
"""Target of a patch that shows none of the references; indexes the last column of an identity attention map."""

IGNORE = -100
"""Target of a patch that is left out of the loss."""


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
    """Label every patch with the identity whose box covers it.

    A box covers a patch by ``intersection / min(patch area, box area)``, so that a box smaller than a patch counts
    too. A patch belongs to the one identity that covers at least ``min_coverage`` of it. It is :data:`IGNORE` where
    two identities do, or where a box's edge cuts it (some coverage, but too little), and :data:`NULL` elsewhere.

    Args:
        boxes: ``[N, 4]`` pixels ``[x1, y1, x2, y2]`` of the original image.
        box_image: ``[N]`` index of each box's image in the batch.
        box_identity: ``[N]`` index of the identity within its sample, as in ``identity_index`` of :class:`IDFormer`.
            Leave out boxes of persons without a reference: to the model they are nobody.
        image_sizes: ``[I, 2]`` height and width of the original images in pixels.
        grid_size: rows and columns of patches; patches cover the whole image.
        image_roles: ``[I]``; where given, only scenes are labelled and a box in another image is an error.
        min_coverage: in (0, 1].

    Returns:
        ``[I, P]`` int64 targets, patches row by row.

    Raises:
        ValueError: shapes, indices or boxes that do not fit.
    """
    boxes = boxes if boxes.is_floating_point() else boxes.float()
    num_images, num_boxes = image_sizes.shape[0], boxes.shape[0]
    _check_boxes(boxes, box_image, box_identity, image_sizes, image_roles)
    if not 0 < min_coverage <= 1:
        raise ValueError(f"min_coverage={min_coverage} must lie in (0, 1].")
    rows, columns = grid_size
    device = boxes.device
    height, width = image_sizes[box_image].to(boxes.dtype).unbind(-1)
    x1, y1, x2, y2 = (boxes / torch.stack([width, height, width, height], -1)).clamp(0, 1).unbind(-1)

    def overlap(low: Tensor, high: Tensor, cells: int) -> Tensor:
        """``[N, cells]`` length shared by ``low..high`` and each of the cells that divide 0..1."""
        edges = torch.linspace(0, 1, cells + 1, device=device, dtype=boxes.dtype)
        return (torch.minimum(high[:, None], edges[1:]) - torch.maximum(low[:, None], edges[:-1])).clamp(min=0)

    intersection = overlap(y1, y2, rows)[:, :, None] * overlap(x1, x2, columns)[:, None, :]
    area = ((x2 - x1) * (y2 - y1)).clamp(max=1 / (rows * columns))
    coverage = intersection.flatten(1) / area.clamp(min=torch.finfo(boxes.dtype).tiny)[:, None]

    num_identities = int(box_identity.max()) + 1 if num_boxes else 0
    claims = boxes.new_zeros(num_images * num_identities, rows * columns)
    cell = (box_image * num_identities + box_identity).long()[:, None].expand_as(coverage)
    claims = claims.scatter_reduce(0, cell, coverage, "amax").view(num_images, num_identities, rows * columns)
    # A hair below the threshold: halves of a patch must count as halves whatever the rounding.
    claimed = claims >= min_coverage - 1e-4
    targets = torch.full((num_images, rows * columns), NULL, device=device)
    targets[(claims > 1e-4).any(1)] = IGNORE
    single = claimed.sum(1) == 1
    if num_identities:
        targets[single] = claimed.int().argmax(1)[single]
    if image_roles is not None:
        targets[image_roles.to(device) != ImageRole.SCENE] = IGNORE
    return targets


def identity_map_loss(identity_attention: Tensor, targets: Tensor) -> Tensor:
    """Mean ``-log`` of the attention each labelled patch pays to its target; 0 where no patch is labelled.

    Images that look at no reference have nothing to learn and do not count.

    Args:
        identity_attention: ``[I, P, G + 1]``, a map of :class:`IDFormer`: one column an identity, the last nobody's.
        targets: ``[I, P]`` identity 0..G-1, :data:`NULL` (-1) or :data:`IGNORE` (-100).

    A map made without ``null_token`` cannot say "nobody": its last column is 0 for every patch of an image with
    references. Use :meth:`IDFormer.identity_map_loss`, which leaves those patches out.

    Raises:
        ValueError: shapes that do not fit, or a target that names an identity the image's sample does not have.
    """
    if identity_attention.dim() != 3 or identity_attention.shape[:2] != targets.shape:
        raise ValueError(
            f"identity_attention has shape {tuple(identity_attention.shape)} and targets {tuple(targets.shape)}; "
            "expected [I, P, G + 1] and [I, P]."
        )
    num_identities = identity_attention.shape[-1] - 1
    present = (identity_attention.detach()[..., :-1] != 0).any(1)
    known = F.pad(present, (0, 1), value=True)
    labelled = targets != IGNORE
    column = targets.masked_fill(~labelled | (targets == NULL), num_identities)
    outside = (column < 0) | (column > num_identities)
    wrong = outside | ~known.gather(1, column.masked_fill(outside, num_identities)) | (targets == num_identities)
    if wrong.any():
        image, patch = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"targets[{image}, {patch}]={int(targets[image, patch])}, but image {image} has no reference of that "
            f"identity (it has {present[image].nonzero().flatten().tolist()}); use -1 for nobody, -100 to leave out."
        )
    attention = identity_attention.float().gather(-1, column[..., None]).squeeze(-1)
    nll = -attention.clamp(min=torch.finfo(torch.float32).tiny).log()
    counted = labelled & present.any(-1, keepdim=True)
    return (nll * counted).sum() / counted.sum().clamp(min=1)


def _check_boxes(
    boxes: Tensor, box_image: Tensor, box_identity: Tensor, image_sizes: Tensor, image_roles: Tensor | None
) -> None:
    num_boxes, num_images = boxes.shape[0], image_sizes.shape[0]
    if boxes.dim() != 2 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes has shape {tuple(boxes.shape)}; expected [N, 4] pixels [x1, y1, x2, y2].")
    if image_sizes.dim() != 2 or image_sizes.shape[-1] != 2:
        raise ValueError(f"image_sizes has shape {tuple(image_sizes.shape)}; expected [I, 2] heights and widths.")
    for name, index in (("box_image", box_image), ("box_identity", box_identity)):
        if index.shape != (num_boxes,) or index.is_floating_point():
            raise ValueError(
                f"{name} has shape {tuple(index.shape)}, dtype {index.dtype}; expected [{num_boxes}] integers."
            )
    if image_roles is not None and image_roles.shape != (num_images,):
        raise ValueError(
            f"image_roles has shape {tuple(image_roles.shape)}; image_sizes speaks of {num_images} images."
        )
    for number, (box, image, identity) in enumerate(
        zip(boxes.tolist(), box_image.tolist(), box_identity.tolist(), strict=True)
    ):
        if not 0 <= image < num_images:
            raise ValueError(f"box_image[{number}]={image} names no image; the batch has {num_images}, from 0.")
        if image_roles is not None and image_roles[image] != ImageRole.SCENE:
            raise ValueError(
                f"box_image[{number}]={image} has role {int(image_roles[image])}; boxes belong to scenes (1)."
            )
        if identity < 0:
            raise ValueError(f"box_identity[{number}]={identity} must be at least 0; leave out boxes of nobody known.")
        if not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(f"boxes[{number}]={box} is empty; expected [x1, y1, x2, y2] with x1 < x2 and y1 < y2.")
        height, width = image_sizes[image].tolist()
        if box[2] <= 0 or box[3] <= 0 or box[0] >= width or box[1] >= height:
            raise ValueError(
                f"boxes[{number}]={box} lies outside its image of {width} x {height} pixels; are the boxes in pixels "
                "of the original image?"
            )
