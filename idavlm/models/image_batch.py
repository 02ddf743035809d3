"""The images of a batch as they pass through the model: features, grid, roles, and whose they are."""

from dataclasses import dataclass

from torch import Tensor


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

    @property
    def roles(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The second to fourth argument of :meth:`idavlm.IDFormer.forward`."""
        return self.image_roles, self.sample_index, self.identity_index
