"""Which identity does a patch show, out of all identities of the batch? A harder question than out of its sample's."""

import torch
from torch import Tensor


def identity_contrast(shares: Tensor, owner: Tensor, target: Tensor) -> Tensor:
    """Mean ``-log`` of the attention that patches pay to the identity they show.

    Args:
        shares: ``[N, R]`` attention of each patch to each reference of the batch; sums to 1 with that to nobody.
        owner: ``[R]`` identity of each reference, numbered over the batch.
        target: ``[N]`` identity each patch shows.
    """
    of_identity = shares.new_zeros(len(shares), int(owner.max()) + 1).index_add(1, owner, shares)
    attention = of_identity.gather(1, target[:, None]).squeeze(1)
    return -attention.clamp(min=torch.finfo(torch.float32).tiny).log().mean()


def number_identities(sample_index: Tensor, identity_index: Tensor) -> Tensor:
    """Identities of a batch from those of its samples: different numbers in different samples."""
    return sample_index * (int(identity_index.max()) + 1 if len(identity_index) else 1) + identity_index
