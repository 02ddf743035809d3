"""From attention of scenes to identities to one map an image: which patch looks at whom."""

import torch
import torch.nn.functional as F
from torch import Tensor

from idavlm.modules.image_groups import ImageGroups, select_images


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
    plain = F.one_hot(torch.full((groups.num_plain, num_patches), num_columns - 1), num_columns)
    return select_images(torch.cat([plain.to(scenes), scenes]), groups.inverse)
