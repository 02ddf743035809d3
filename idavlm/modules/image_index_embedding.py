"""Learned marks that tell the pictures of a sample from one another."""

from torch import Tensor, nn

from idavlm.utils import ImageRole


class ImageIndexEmbedding(nn.Embedding):
    """One embedding ``[C]`` for the first, second, ... picture of a sample, whatever it shows; none for references.

    "Picture 2: <image>" says which picture it is in words, which a language model has to carry over to the image's
    tokens before it can answer with it; here they know from the start. (Flamingo, arXiv 2204.14198, numbers the frames
    of a video in this way.)

    Args:
        num_slots: the most pictures a sample may have.
        hidden_size: C.
    """

    def __init__(self, num_slots: int, hidden_size: int):
        super().__init__(num_slots, hidden_size)
        nn.init.normal_(self.weight)  # as strong as normalised tokens

    def of(self, image_roles: Tensor, sample_index: Tensor) -> Tensor:
        """``[I, C]`` marks of the images of a batch, counted within their sample; 0 for references.

        Args:
            image_roles: ``[I]`` see :class:`idavlm.ImageRole`; read on the host, as the next.
            sample_index: ``[I]`` the sample of each image.

        Raises:
            ValueError: there are not so many slots.
        """
        roles, samples = image_roles.cpu(), sample_index.cpu()
        pictures = roles != ImageRole.REFERENCE
        same_sample = samples[:, None] == samples[None]
        numbers = (same_sample & pictures[None]).tril().sum(1) - 1
        if len(numbers) and int(numbers.max()) >= self.num_embeddings:
            raise ValueError(
                f"a sample has {int(numbers.max()) + 1} pictures but max_images={self.num_embeddings}; build "
                "the model with more, or with 0 for none."
            )
        marks = self(numbers.clamp(min=0).to(self.weight.device))
        return marks * pictures.to(self.weight.device)[:, None]
