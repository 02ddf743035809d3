"""The images of a batch as they pass through the model: features, grid, roles, and whose they are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from idavlm.utils import ImageRole


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Features of all images of a batch and the tensors that describe them.

    Attributes:
        features: ``[I, P, Cv]`` features of the vision tower.
        grid_size: rows and columns of the patches, or None if they are not a known grid.
        image_roles: ``[I]``, see :class:`idavlm.ImageRole`.
        sample_index: ``[I]`` row of the batch each image belongs to.
        identity_index: ``[I]`` identity of each reference within its sample, or None.
    """

    features: Tensor
    grid_size: tuple[int, int] | None
    image_roles: Tensor
    sample_index: Tensor
    identity_index: Tensor | None

    @classmethod
    def build(
        cls,
        features: Tensor,
        grid_size: tuple[int, int] | None,
        image_roles: Tensor | None,
        sample_index: Tensor | None,
        identity_index: Tensor | None,
        *,
        has_id_former: bool,
        has_image_index_embedding: bool,
    ) -> "ImageBatch":
        """Complete and check the description of the images. Without ``image_roles`` all are general images.

        Raises:
            ValueError: no ``sample_index``, although roles or the image index embedding need it.
        """
        if sample_index is None and (has_image_index_embedding or (has_id_former and image_roles is not None)):
            raise ValueError("images without sample_index: pass the row of the batch that each image belongs to.")
        if image_roles is None:
            image_roles = torch.full((len(features),), int(ImageRole.GENERAL))
        if sample_index is None:
            sample_index = torch.zeros(len(features), dtype=torch.long)
        return cls(features, grid_size, image_roles, sample_index, identity_index)
