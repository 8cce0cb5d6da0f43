"""What the kernels cost, from times that ``scripts/deploy/calibrate.py`` measured and wrote to ``costs.json``.

A kernel that keeps v vectors of each of b output channels in registers takes a time linear in v for each entry of its
list, and another for each group of b channels whose results it stores: four measured numbers for each b and each width
of a vector. Half of the widest may win: fewer of its unaligned loads cross a cache line. A target that has not been
measured takes the numbers of one that has.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from feather.deploy.graph import Array
from feather.deploy.layout import Grid
from feather.deploy.rows import entries
from feather.deploy.targets import Target

FILE = Path(__file__).with_name("costs.json")


def tiles(target: Target, grid: Grid, block: int) -> list[tuple[int, int]]:
    """How a plane is cut: (vectors, how many tiles of that many), as equal as possible."""
    most = target.tiles[block]
    count = -(-grid.vectors // most)
    small, extra = divmod(grid.vectors, count)
    return [(size, n) for size, n in ((small + 1, extra), (small, count - extra)) if n]


def convolution(target: Target, grid: Grid, block: int, blocks: int, entries: int) -> float:
    """Nanoseconds of a convolution with ``blocks`` groups of ``block`` channels and ``entries`` in all their lists."""
    tables = _measured(target)["convolution"]
    measured = tables.get(str(grid.vector), next(iter(tables.values())))[str(block)]
    total = 0.0
    for vectors, count in tiles(target, grid, block):
        entry = measured["entry"] + vectors * measured["entry_vector"]
        group = measured["group"] + vectors * measured["group_vector"]
        total += count * (entries * entry + blocks * group)
    return total


def best_block(target: Target, grid: Grid, weight: Array, groups: int) -> tuple[float, int]:
    """Of a convolution ``(out, cells)`` onto ``grid``: nanoseconds, and the channels that share loads at that cost."""
    return min((convolution(target, grid, b, *entries(weight, b)), b) for b in blocks(target, len(weight), groups))


def blocks(target: Target, outputs: int, groups: int) -> list[int]:
    """How many of a convolution's output channels may share loads."""
    return [b for b in target.tiles if (outputs // groups) % b == 0 or (groups == 1 and b <= outputs)]


def widths(target: Target) -> list[int]:
    """Floats of a vector among which the costs can choose, widest first."""
    return [w for w in target.widths() if str(w) in _measured(target)["convolution"]] or [target.floats]


def linear_is_sparse(target: Target, size: int, nonzeros: int) -> bool:
    """Whether the list of non-zeros beats the plain matrix."""
    measured = _measured(target)["linear"]
    return bool(nonzeros * measured["sparse"] < size * measured["dense"])


@cache
def _all() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text())
    return content


def _measured(target: Target) -> dict[str, Any]:
    measured: dict[str, Any] = _all()["targets"]
    like = target.name if target.name in measured else _all()["others_like"]
    return dict(measured[like])
