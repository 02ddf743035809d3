"""Fixed 2-D position embeddings, sine-cosine or one-hot, and their bicubic resizing to another grid."""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_positions_2d(hidden_size: int, grid_size: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine positions (MAE, Qwen-VL).

    The first half of the channels encodes the column, the second half the row. Each half is ``[sin(p w), cos(p w)]``
    with ``w_i = 10000 ** (-i / (hidden_size / 4))``.

    Args:
        hidden_size: width C; divisible by 4.
        grid_size: rows and columns.

    Returns:
        ``[rows * columns, hidden_size]`` float32, row by row.

    Raises:
        ValueError: ``hidden_size`` is not divisible by 4.
    """
    if hidden_size % 4:
        raise ValueError(f"hidden_size={hidden_size} must be divisible by 4: sine and cosine of column and row.")
    rows, columns = grid_size
    frequency = 10000.0 ** (-torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [position.flatten()[:, None] * frequency for position in (column, row)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float()


def one_hot_positions_2d(hidden_size: int, grid_size: tuple[int, int], *, dtype=None, device=None) -> Tensor:
    """Fixed 2-D positions with orthogonal codes for rows and for columns.

    Channel ``c`` of the first half is non-zero in column ``c * columns // (hidden_size / 2)`` only; the second half
    encodes the row in the same way. The mean square is 1/2, as that of sine-cosine positions. Neighbouring sine-cosine
    positions of a small grid are nearly equal; these are orthogonal, which a frozen language model tells apart sooner.

    Returns:
        ``[rows * columns, hidden_size]``, row by row.

    Raises:
        ValueError: ``hidden_size`` is odd or has fewer channels than the grid needs.
    """
    rows, columns = grid_size
    half = hidden_size // 2
    if hidden_size % 2 or half < max(grid_size):
        raise ValueError(
            f"hidden_size={hidden_size} must be even and at least {2 * max(grid_size)}: one-hot positions need a "
            f"channel for each of {rows} rows and {columns} columns."
        )
    channel = torch.arange(half, device=device)

    def codes(count: int) -> Tensor:
        active = channel * count // half == torch.arange(count, device=device)[:, None]
        return active.to(dtype or torch.float32) * (count / 2) ** 0.5

    return torch.cat([codes(columns).repeat(rows, 1), codes(rows).repeat_interleave(columns, 0)], dim=1)


def resize_positions(positions: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Resize positions ``[rows * columns, C]`` from grid ``source`` to grid ``target`` by bicubic interpolation.

    The interpolation (``align_corners=False``) runs in float32, or in float64 if ``positions`` is float64. The result
    has the dtype of ``positions``.
    """
    if source == target:
        return positions
    dtype = torch.promote_types(positions.dtype, torch.float32)
    rows, columns = (
        _interpolation(*sizes, dtype=dtype, device=positions.device) for sizes in zip(source, target, strict=True)
    )
    grid = positions.to(dtype).unflatten(0, source)
    # As matrix products, along one axis after the other: on a CPU, interpolate takes ten times as long for wide rows.
    # Checks of checkpoints run models on the meta device, which has no autocast.
    in_full = nullcontext() if positions.is_meta else torch.autocast(positions.device.type, enabled=False)
    with in_full:
        resized = rows @ (columns @ grid).flatten(1)
    return resized.view(-1, positions.shape[1]).to(positions.dtype)


def _interpolation(source: int, target: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix ``[target, source]`` that interpolates along one axis."""
    points = torch.eye(source, dtype=dtype, device=device)[None, :, None]
    return F.interpolate(points, size=(1, target), mode="bicubic", align_corners=False)[0, :, 0].T


def square_grid(name: str, count: int) -> tuple[int, int]:
    """Return the sides of the square grid with ``count`` cells.

    Raises:
        ValueError: ``count``, the value of argument ``name``, is not a square number.
    """
    side = math.isqrt(count)
    if side * side != count or count == 0:
        raise ValueError(
            f"{name}={count} is not a square number, and 2-D positions need a grid; choose {max(side, 1) ** 2} or "
            f"{(side + 1) ** 2}, or pass grid_size=(rows, columns) where the argument exists."
        )
    return side, side
