"""Learned marks that tell the identities of a sample from one another."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from idavlm.modules.identity_map import cell_shares


class IdentityEmbedding(nn.Embedding):
    """One embedding ``[C]`` for identity 0, 1, ... of a sample, whoever that is.

    Args:
        num_slots: the most identities a sample may have.
        hidden_size: C.
    """

    STRENGTH = 2.0
    """Root mean square of a new mark: twice that of normalised tokens, as marks are diluted by shares of attention."""

    def __init__(self, num_slots: int, hidden_size: int):
        super().__init__(num_slots, hidden_size)
        nn.init.normal_(self.weight, std=self.STRENGTH)

    def of(self, identities: Sequence[int]) -> Tensor:
        """``[R, C]`` marks of identities, counted within their sample.

        Raises:
            ValueError: there are not so many slots.
        """
        self._check(max(identities, default=0))
        return self(torch.tensor(identities, dtype=torch.long).to(self.weight.device))

    def of_cells(self, identity_map: Tensor, grid_size: tuple[int, int], cells: tuple[int, int]) -> Tensor:
        """Marks by what the patches of each cell look at.

        Args:
            identity_map: ``[I, P, G + 1]`` shares of attention, the last to nobody.
            grid_size: rows and columns of the patches.
            cells: rows and columns of a coarser grid over the image.

        Returns:
            ``[I, cells, C]``: the slots, each by the mean share of its identity.

        Raises:
            ValueError: there are not so many slots.
        """
        self._check(identity_map.shape[-1] - 2)
        shares = cell_shares(identity_map, grid_size, cells, self.num_embeddings)
        return shares.to(self.weight.dtype) @ self.weight

    def _check(self, highest: int) -> None:
        if highest >= self.num_embeddings:
            raise ValueError(
                f"a sample has identity {highest} but max_identities={self.num_embeddings}; build the IDFormer "
                f"with at least {highest + 1} slots, or with 0 for none."
            )
