"""From attention of scenes to identities to one map an image: which patch looks at whom."""

import torch
import torch.nn.functional as F
from torch import Tensor

from idavlm.modules.image_groups import ImageGroups, select_images
from idavlm.ops.identity_supervision import IGNORE, NULL


def identity_map(sums: Tensor, groups: ImageGroups, num_patches: int) -> Tensor:
    """Mean over heads, in the order of the batch's images.

    Args:
        sums: ``[S * P, H, G + 1]`` attention that each patch of a scene pays to each identity, and to nobody.
        groups: the images these belong to.
        num_patches: P, queries a scene.

    Returns:
        ``[I, P, G + 1]`` shares that sum to 1; the last column is nobody's.
    """
    scenes = sums.mean(1).unflatten(0, (-1, num_patches))
    num_columns = sums.shape[-1]
    plain = F.one_hot(torch.full((groups.num_independent, num_patches), num_columns - 1), num_columns)
    return select_images(torch.cat([plain.to(scenes), scenes]), groups.inverse)


def with_known(identity_map: Tensor, known: Tensor | None) -> Tensor:
    """``identity_map`` ``[I, P, G + 1]``, all on the identity in ``known`` ``[I, P]`` where that is not ``IGNORE``."""
    if known is None:
        return identity_map
    columns = identity_map.shape[-1]
    certain = F.one_hot(known.masked_fill(known == NULL, columns - 1).clamp(min=0), columns).to(identity_map)
    return torch.where((known == IGNORE)[..., None], identity_map, certain)


def cell_shares(
    identity_map: Tensor, grid_size: tuple[int, int], cells: tuple[int, int], num_identities: int
) -> Tensor:
    """``[I, cells, num_identities]``: the mean share of each identity in each cell of a coarser grid over the image.

    Args:
        identity_map: ``[I, P, G + 1]``.
        grid_size: rows and columns of the patches.
        cells: rows and columns of the coarser grid.
        num_identities: at least 1, and G; behind the first G are zeros.
    """
    identities = F.pad(identity_map[..., :-1], (0, num_identities - identity_map.shape[-1] + 1))
    shares = identities.transpose(1, 2).unflatten(2, grid_size)
    return F.adaptive_avg_pool2d(shares, cells).flatten(2).transpose(1, 2)
