"""Who is in one frame, and where: from the identity map of the whole cast."""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from idavlm.models import IdentityBank
from idavlm.modules.identity_map import connected_cells
from idavlm.modules.positions import square_grid

Box = tuple[float, float, float, float]
"""``(x1, y1, x2, y2)`` in pixels of the frame."""


PEAK = 1 / 16
"""Share of the patches whose attention makes the score. A single patch is noisy; a person covers several."""

INSIDE = 0.4
"""Share of attention from which a patch belongs to the region of a person."""


@dataclass(frozen=True)
class Detection:
    """One person in one frame.

    Attributes:
        score: how much the frame looks like it shows the person, 0..1: the mean share of attention of the patches that
            pay most attention to the photos of the person.
        box: box of the region around the best patch; None if no patch pays enough attention to this person.
    """

    score: float
    box: Box | None


def detect(bank: IdentityBank, image: Image.Image) -> dict[str, Detection]:
    """Look for all identities of a bank in one image. The vision tower encodes the image once.

    Args:
        bank: the cast.
        image: the frame.

    Returns:
        A detection per identity of the bank.

    Raises:
        ValueError: the image tokens of the model form no grid, so that there are no boxes.
    """
    identity_map = bank.identity_map(image)
    shares = identity_map.log_shares.exp().float().cpu()
    grid_size = identity_map.grid_size or square_grid("P, the number of patches,", shares.shape[1])
    kept = bank.processor.crop_box((image.height, image.width))
    return {
        name: _detection(share.view(grid_size), kept, image.size)
        for name, share in zip(identity_map.names, shares, strict=True)
    }


def _detection(share: Tensor, kept: Box, size: tuple[int, int]) -> Detection:
    """``share`` ``[rows, columns]`` of one person; ``kept`` is the crop box, ``size`` width and height of the image."""
    count = max(1, round(PEAK * share.numel()))
    score = float(share.flatten().topk(count).values.mean())
    cells = connected_cells(share > INSIDE, int(share.argmax()))
    if cells is None:
        return Detection(score, None)
    rows, columns = share.shape
    x1, x2 = _edges(torch.where(cells, share, 0).amax(0))
    y1, y2 = _edges(torch.where(cells, share, 0).amax(1))
    left, top, right, bottom = kept
    width, height = size
    x1, x2 = ((left + (right - left) * x / columns) * width for x in (x1, x2))
    y1, y2 = ((top + (bottom - top) * y / rows) * height for y in (y1, y2))
    return Detection(score, (max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)))


def _edges(profile: Tensor) -> tuple[float, float]:
    """First and last cell of a region, as positions between cells.

    A cell at the edge counts by its share: 1 is inside as a whole, 0.5 is inside up to its half.
    """
    inside = profile.nonzero().flatten().tolist()
    first, last = inside[0], inside[-1]
    return first + 1 - float(profile[first]), last + float(profile[last])
