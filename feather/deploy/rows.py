"""The lists of non-zeros that a convolution walks."""

from __future__ import annotations

import numpy as np

from feather.deploy.graph import Array
from feather.deploy.program import Rows


def entries(weight: Array, block: int) -> tuple[int, int]:
    """Blocks, and entries in all of them, if ``block`` channels share their offsets."""
    blocks, rest = divmod(len(weight), block)
    used = (weight[: blocks * block] != 0).reshape(blocks, block, -1).any(1)
    return blocks + rest, int(used.sum()) + int(np.count_nonzero(weight[blocks * block :]))


def row_tables(weight: Array, offsets: Array, shifts: Array, block: int) -> list[Rows]:
    """Entries of the non-zeros of ``weight`` ``(out, cells)``, block by block, by shift, in ascending order of offset.

    Args:
        weight: the weights.
        offsets: of each weight's cell, of ``weight``'s shape.
        shifts: of each cell, ``(cells,)``.
        block: output channels that share offsets.
    """
    kinds = sorted({int(shift) for shift in shifts}, key=lambda shift: (abs(shift), shift))
    kind = np.array([kinds.index(int(shift)) for shift in shifts])
    whole = len(weight) // block * block
    parts = [(0, whole, block)] + ([(whole, len(weight), 1)] if whole < len(weight) else [])
    tables = []
    for first, last, size in parts:
        count = (last - first) // size
        if count == 0:
            continue
        shaped = weight[first:last].reshape(count, size, -1)
        place = offsets[first:last:size]
        order = np.lexsort((place, np.broadcast_to(kind, place.shape)), axis=1)
        used = np.take_along_axis((shaped != 0).any(1), order, 1)
        block_index, rank = np.nonzero(used)
        cell = order[block_index, rank]
        lists = block_index * len(kinds) + kind[cell]
        tables.append(
            Rows(
                first,
                size,
                tuple(kinds),
                np.searchsorted(lists, np.arange(count * len(kinds) + 1)).astype(np.uint32),
                place[block_index, cell].astype(np.uint32),
                np.ascontiguousarray(shaped[block_index, :, cell]),
            )
        )
    return tables
