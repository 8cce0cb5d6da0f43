"""What the kernels cost, from times that ``scripts/deploy/calibrate.py`` measured and wrote to ``costs.json``.

A kernel that keeps v vectors of each of b output channels in registers takes a time linear in v for each entry of its
list, and another for each group of b channels whose results it stores: four measured numbers for each b, each width of
a vector, and each way of reading. Half of the widest vector may win: fewer of its loads cross a cache line. A target
that has not been measured takes the numbers of one that has.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from feather.deploy.graph import Array, Window
from feather.deploy.layout import Grid, window_taps
from feather.deploy.rows import entries
from feather.deploy.targets import Target

FILE = Path(__file__).with_name("costs.json")


READINGS = ("between", "aligned", "shifted")
"""Loads at any offset; of whole vectors; of whole vectors, with sums that are shifted along the row."""


def reading(grid: Grid, window: Window) -> str:
    """How a kernel reads the cells of a window."""
    rows, columns = window_taps(window)
    if grid.aligned:
        return "shifted" if any(columns.shift) else "aligned"
    return "between" if any(rows.shift) or any(columns.shift) else "aligned"


def tiles(target: Target, grid: Grid, block: int, shifted: bool) -> list[tuple[int, int]]:
    """How a plane is cut: (vectors, how many tiles of that many), as equal as possible.

    What is shifted is whole rows, and has two sets of sums in registers at once.
    """
    unit = grid.pitch // grid.vector if shifted else 1
    most = most_vectors(target, block, shifted) // unit
    units = grid.vectors // unit
    count = -(-units // most)
    small, extra = divmod(units, count)
    return [(size * unit, n) for size, n in ((small + 1, extra), (small, count - extra)) if n]


def fits(target: Target, grid: Grid) -> bool:
    """Whether a row of an aligned grid fits into registers."""
    return grid.pitch // grid.vector <= most_vectors(target, 1, True)


def knows(target: Target, grid: Grid) -> bool:
    """Whether kernels that shift were measured on this very target with vectors of this width."""
    return target.name in _all()["targets"] and str(grid.vector) in _measured(target)["shifted"]


def convolution(target: Target, grid: Grid, reading: str, block: int, blocks: int, entries: int) -> float:
    """Nanoseconds of a convolution with ``blocks`` groups of ``block`` channels and ``entries`` in all their lists."""
    tables = _measured(target)[reading]
    measured = tables.get(str(grid.vector), next(iter(tables.values())))[str(block)]
    total = 0.0
    for vectors, count in tiles(target, grid, block, reading == "shifted"):
        entry = measured["entry"] + vectors * measured["entry_vector"]
        group = measured["group"] + vectors * measured["group_vector"]
        total += count * (entries * entry + blocks * group)
    return total


def best_block(target: Target, grid: Grid, reading: str, weight: Array, groups: int) -> tuple[float, int]:
    """Of a convolution ``(out, cells)`` onto ``grid``: nanoseconds, and the channels that share loads at that cost."""
    choices = blocks(target, grid, reading, len(weight), groups)
    return min((convolution(target, grid, reading, b, *entries(weight, b)), b) for b in choices)


def blocks(target: Target, grid: Grid, reading: str, outputs: int, groups: int) -> list[int]:
    """How many of a convolution's output channels may share loads."""
    row = grid.pitch // grid.vector if reading == "shifted" else 1
    able = [b for b in target.tiles if row <= most_vectors(target, b, reading == "shifted")]
    return [b for b in able if (outputs // groups) % b == 0 or (groups == 1 and b <= outputs)]


def widths(target: Target) -> list[int]:
    """Floats of a vector among which the costs can choose, widest first."""
    return [w for w in target.widths() if str(w) in _measured(target)["between"]] or [target.floats]


def most_vectors(target: Target, block: int, shifted: bool) -> int:
    """Vectors of each channel that stay in registers; with sums that are shifted a third of them, and at least one."""
    return max(1, target.tiles[block] // 3) if shifted else target.tiles[block]


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
