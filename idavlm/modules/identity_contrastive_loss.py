"""Which identity does a patch show, out of all identities of the batch? A harder question than out of its sample's."""

import math

import torch
from torch import Tensor


def identity_contrastive_loss(q: Tensor, k: Tensor, owner: Tensor, target: Tensor, *, num_null: int) -> Tensor:
    """Mean ``-log`` of the attention, mean over heads, that patches pay to the identity they show; in float32.

    Args:
        q: ``[N, H, D]`` projected patches.
        k: ``[num_null + R * L, H, D]`` projected keys: of nobody, then L of each of the R references of the batch.
        owner: ``[R]`` identity of each reference, numbered over the batch.
        target: ``[N]`` identity each patch shows; it has a reference.
        num_null: 0 or 1.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.einsum("nhd,khd->hnk", q.to(dtype) * q.shape[-1] ** -0.5, k.to(dtype))
        nobody, of_references = scores[..., :num_null], scores[..., num_null:]
        of_references = of_references.unflatten(-1, (len(owner), -1)).logsumexp(-1)
        own = of_references.masked_fill(owner != target[:, None], -torch.inf).logsumexp(-1)
        log_shares = own - torch.cat([nobody, of_references], -1).logsumexp(-1)
        return math.log(q.shape[1]) - log_shares.logsumexp(0).mean()


def number_identities(sample_index: Tensor, identity_index: Tensor) -> Tensor:
    """Identities of a batch from those of its samples: different numbers in different samples."""
    return sample_index * (int(identity_index.max()) + 1 if len(identity_index) else 1) + identity_index
