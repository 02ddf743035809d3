"""Identities marked by the embeddings of their own names: who is where, in words the language model knows already."""

import torch.nn.functional as F
from torch import Tensor

from idavlm.modules.identity_map import cell_shares
from idavlm.modules.positions import square_grid
from idavlm.utils import ImageRole


def name_marks(
    inputs_embeds: Tensor,
    names: tuple[Tensor, Tensor],
    roles: tuple[Tensor, Tensor, Tensor],
    identity_map: Tensor,
    grid_size: tuple[int, int] | None,
    cells: tuple[int, int],
    nobody: Tensor | None = None,
) -> Tensor:
    """What is added to image tokens: names, each by the share of attention that a token's cell pays to its person.

    All tokens of a photo get the name of its person. A name is the mean of the embeddings of its tokens, wherever it
    stands in the prompt. What is left of a scene's shares goes to ``nobody``.

    Args:
        inputs_embeds: ``[B, T, C]`` embeddings of the text.
        names: ``token_identity_index``, ``name_mask`` ``[B, T]``.
        roles: ``image_roles``, ``sample_index``, ``identity_index`` ``[I]``.
        identity_map: ``[I, P, G + 1]`` shares of attention, the last to nobody.
        grid_size: rows and columns of the patches; the square of P where it is None.
        cells: rows and columns of the image tokens.
        nobody: ``[C]`` embedding of a word for nobody; nothing is added if not given.

    Returns:
        ``[I, cells, C]``.

    Raises:
        ValueError: there are identities, but ``names`` or ``roles`` are not all given.
    """
    if identity_map.shape[-1] == 1:  # nobody is introduced
        mark = inputs_embeds.new_zeros(inputs_embeds.shape[-1]) if nobody is None else nobody
        return mark.expand(len(identity_map), cells[0] * cells[1], -1)
    if any(tensor is None for tensor in (*names, *roles)):
        raise ValueError(
            "names_as_marks=True needs token_identity_index, name_mask, image_roles, sample_index and identity_index beside "
            "images; the processor's encode and collate make them."
        )
    device, dtype = inputs_embeds.device, inputs_embeds.dtype
    token_identity_index, name_mask = (tensor.to(device) for tensor in names)
    image_roles, sample_index, identity_index = (tensor.to(device) for tensor in roles)
    num_identities = identity_map.shape[-1] - 1
    name_mask = name_mask & (token_identity_index < num_identities)
    spelled = F.one_hot(token_identity_index.where(name_mask, num_identities), num_identities + 1)[..., :-1].to(dtype)
    embeddings = spelled.mT @ inputs_embeds / spelled.sum(1).clamp(min=1)[..., None]
    grid_size = grid_size or square_grid("P, the number of patches,", identity_map.shape[1])
    shares = cell_shares(identity_map, grid_size, cells, num_identities)
    shown = F.one_hot(identity_index.clamp(max=num_identities), num_identities + 1)[:, None, :-1].to(shares)
    shares = shown.where((image_roles == ImageRole.REFERENCE)[:, None, None], shares)
    marks = shares.to(dtype) @ embeddings[sample_index]
    return marks if nobody is None else marks + (1 - shares.to(dtype).sum(-1, keepdim=True)) * nobody
