"""2-D positions, sine-cosine or one-hot, and the bicubic resizing of the former to another grid."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_positions_2d(hidden_size: int, grid_size: tuple[int, int]) -> Tensor:
    """Fixed 2-D positions (MAE; Qwen-VL): the first half of the channels encodes the column, the second the row.

    Each half is ``[sin(p w), cos(p w)]`` with ``w_i = 10000 ** (-i / (hidden_size / 4))``.

    Returns:
        ``[rows * columns, hidden_size]`` float32, row by row.
    """
    if hidden_size % 4:
        raise ValueError(f"hidden_size={hidden_size} must be divisible by 4: sine and cosine of column and row.")
    rows, columns = grid_size
    frequency = 10000.0 ** (-torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [position.flatten()[:, None] * frequency for position in (column, row)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float()


def one_hot_positions_2d(hidden_size: int, grid_size: tuple[int, int], *, dtype=None, device=None) -> Tensor:
    """Fixed 2-D positions, one direction a column and one a row, all at right angles: none is like its neighbour.

    Channel ``c`` of the first half is on in column ``c * columns // (hidden_size / 2)`` alone; the second half is for
    the rows. As strong as sine and cosine: the mean square is 1/2.

    Returns:
        ``[rows * columns, hidden_size]``, row by row.
    """
    rows, columns = grid_size
    half = hidden_size // 2
    if hidden_size % 2 or half < max(grid_size):
        raise ValueError(
            f"hidden_size={hidden_size} must be even and at least {2 * max(grid_size)}: a channel for each of "
            f"{rows} rows and {columns} columns."
        )
    channel = torch.arange(half, device=device)
    codes = []
    for count in (columns, rows):
        on = channel * count // half == torch.arange(count, device=device)[:, None]
        codes.append(on.to(dtype or torch.float32) * (count / 2) ** 0.5)
    column, row = codes
    return torch.cat([column.repeat(rows, 1), row.repeat_interleave(columns, 0)], dim=1)


def resize_positions(positions: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Bicubic interpolation (``align_corners=False``) of ``[rows * columns, C]`` positions to another grid.

    Computed in float32 (float64 stays), returned in the type of ``positions``.
    """
    if source == target:
        return positions
    dtype = torch.promote_types(positions.dtype, torch.float32)
    image = positions.to(dtype).view(1, *source, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=target, mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).flatten(0, 2).to(positions.dtype)


def square_grid(name: str, count: int) -> tuple[int, int]:
    """Sides of the square grid of ``count`` cells; ``ValueError`` naming ``name`` where there is none."""
    side = math.isqrt(count)
    if side * side != count or count == 0:
        raise ValueError(
            f"{name}={count} is no square, and 2-D positions need a grid; choose {max(side, 1) ** 2} or "
            f"{(side + 1) ** 2}, or give grid_size=(rows, columns) where the argument exists."
        )
    return side, side
