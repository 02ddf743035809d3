"""The images of a batch as they pass through the model: features, grid, roles, and whose they are."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Features ``[I, P, Cv]`` of all images of a batch, their grid if it is known, and the tensors that describe them.

    Attributes as in :meth:`idavlm.IDFormer.forward`.
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
