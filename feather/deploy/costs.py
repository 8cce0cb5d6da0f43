"""What the kernels cost, as `calibrate` measured it."""

from __future__ import annotations

from feather.deploy.layout import Grid
from feather.deploy.targets import Target


def tiles(target: Target, grid: Grid, block: int) -> list[tuple[int, int]]:
    """How a plane is cut: (vectors, how many tiles of that many), as equal as possible."""
    most = target.tiles[block]
    count = -(-grid.vectors // most)
    small, extra = divmod(grid.vectors, count)
    return [(size, n) for size, n in ((small + 1, extra), (small, count - extra)) if n]


def convolution(target: Target, grid: Grid, block: int, blocks: int, entries: int) -> float:
    """Time of a convolution in arbitrary units."""
    total = 0.0
    for vectors, count in tiles(target, grid, block):
        total += count * (entries * (2 + vectors + block) + blocks * (10 + 3 * block * vectors))
    return total


def linear_is_sparse(target: Target, size: int, nonzeros: int) -> bool:
    """Whether the list of non-zeros beats the plain matrix."""
    return nonzeros * 8 < size * 2
