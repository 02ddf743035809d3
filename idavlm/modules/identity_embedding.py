"""Learned embeddings that tell the identities of a sample apart, and the images of a sample."""

import torch
from torch import Tensor, nn

from idavlm.utils import ImageRole


class IdentityEmbedding(nn.Embedding):
    """One learned embedding for identity 0, 1, ... of a sample.

    An embedding belongs to the number of an identity within its sample, not to a particular individual. An
    :class:`IDFormer` adds it to the reference tokens of the identity, and to the tokens of a scene in proportion to the
    identity map. :class:`IDAVLMForConditionalGeneration` adds it to the name of the identity in the prompt as well, so
    that the language model can connect the three.

    Args:
        max_identities: largest number of identities in a sample.
        hidden_size: width C.
        init_std: standard deviation of the initial embeddings. The default is twice the root mean square of normalised
            tokens, since the identity map dilutes the embedding.
    """

    def __init__(self, max_identities: int, hidden_size: int, *, init_std: float = 2.0):
        super().__init__(max_identities, hidden_size)
        nn.init.normal_(self.weight, std=init_std)

    def table(self) -> Tensor:
        """Return all embeddings ``[G, C]``. Unlike ``weight``, they are whole under ZeRO-3 and FSDP."""
        return self(torch.arange(self.num_embeddings, device=self.weight.device))

    def check(self, num_identities: int) -> None:
        """Raise ``ValueError`` if a sample has more than ``max_identities`` identities."""
        if num_identities > self.num_embeddings:
            raise ValueError(
                f"a sample has {num_identities} identities but max_identities={self.num_embeddings}; build the "
                f"IDFormer with max_identities={num_identities} or more, or with identity_embedding=None."
            )


class ImageIndexEmbedding(nn.Embedding):
    """One learned embedding for the first, second, ... image of a sample; references are not counted.

    The prompt says "Picture 2: <image>". This embedding marks the tokens of that image directly, so the language model
    need not carry the number over from the text. Flamingo (arXiv 2204.14198) numbers video frames in the same way.

    Args:
        max_images: largest number of images in a sample, references excluded.
        hidden_size: width C.
        init_std: standard deviation of the initial embeddings.
    """

    def __init__(self, max_images: int, hidden_size: int, *, init_std: float = 1.0):
        super().__init__(max_images, hidden_size)
        nn.init.normal_(self.weight, std=init_std)

    def embed_images(self, image_roles: Tensor, sample_index: Tensor) -> Tensor:
        """Return the embedding of each image of a batch, ``[I, C]``; zeros for references.

        Args:
            image_roles: ``[I]``, see :class:`ImageRole`. Read on the host.
            sample_index: ``[I]``, the sample of each image. Read on the host.

        Raises:
            ValueError: a sample has more images than ``max_images``.
        """
        roles, samples = image_roles.cpu(), sample_index.cpu()
        is_counted = roles != ImageRole.REFERENCE
        same_sample = samples[:, None] == samples[None]
        index = (same_sample & is_counted[None]).tril().sum(1) - 1
        most = int(index.max()) + 1 if len(index) else 0
        if most > self.num_embeddings:
            raise ValueError(
                f"a sample has {most} images (references not counted) but max_images={self.num_embeddings}; build the "
                f"model with max_images={most} or more, or with max_images=None."
            )
        embeddings = self(index.clamp(min=0).to(self.weight.device))
        return embeddings * is_counted.to(self.weight.device)[:, None]
