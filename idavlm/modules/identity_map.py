"""From attention weights of scenes over reference tokens to one map an image: which patch looks at whom."""

import torch
import torch.nn.functional as F
from torch import Tensor

from idavlm.modules.image_groups import ImageGroups, select_images
from idavlm.utils import outside_compile


@outside_compile
def identity_map(
    weights: Tensor, groups: ImageGroups, num_patches: int, key_length: int, *, nobody_token: bool
) -> Tensor:
    """Mean over heads, sum over the tokens of all photos of an identity, in the order of the batch's images.

    Args:
        weights: ``[N, H, max_seqlen_q, max_seqlen_k]`` of the identity cross-attention.
        groups: the images these weights belong to.
        num_patches: P, queries a scene.
        key_length: K, keys a photo.
        nobody_token: whether each sample's keys begin with the key of nobody.

    Returns:
        ``[I, P, G + 1]`` shares that sum to 1; the last column is nobody's.
    """
    num_samples, most_photos = len(groups.references_per_sample), max(groups.references_per_sample, default=0)
    num_identities = max(groups.identities, default=-1) + 1
    weights = weights.mean(1)
    nobody, photos = weights.split([int(nobody_token), most_photos * key_length], dim=-1)
    photos = photos.unflatten(-1, (most_photos, key_length)).sum(-1)
    nobody = nobody.sum(-1, keepdim=True)

    owner = torch.zeros(num_samples, most_photos, num_identities)
    remaining = iter(groups.identities)
    for sample, count in enumerate(groups.references_per_sample):
        for photo in range(count):
            owner[sample, photo, next(remaining)] = 1
    with torch.autocast(weights.device.type, enabled=False):
        photos = photos @ owner.to(photos, non_blocking=True)
    shares = torch.cat([photos, nobody], dim=-1).reshape(-1, num_patches, num_identities + 1)

    most_scenes = max(groups.scenes_per_sample, default=0)
    rows = [
        sample * most_scenes + scene for sample, count in enumerate(groups.scenes_per_sample) for scene in range(count)
    ]
    scenes = shares[torch.tensor(rows, dtype=torch.long).to(shares.device, non_blocking=True)]
    plain = F.one_hot(torch.full((groups.num_plain, num_patches), num_identities), num_identities + 1)
    maps = torch.cat([plain.to(scenes), scenes])
    return select_images(maps, groups.inverse)
