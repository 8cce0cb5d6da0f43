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


def row_tables(weight: Array, offsets: Array, block: int) -> list[Rows]:
    """Entries of the non-zeros of ``weight`` ``(out, cells)`` in ascending order of their offset, block by block."""
    whole = len(weight) // block * block
    parts = [(0, whole, block)] + ([(whole, len(weight), 1)] if whole < len(weight) else [])
    tables = []
    for first, last, size in parts:
        count = (last - first) // size
        if count == 0:
            continue
        shaped = weight[first:last].reshape(count, size, -1)
        place = offsets[first:last:size]
        order = np.argsort(place, axis=1, kind="stable")
        used = np.take_along_axis((shaped != 0).any(1), order, 1)
        block_index, rank = np.nonzero(used)
        cell = order[block_index, rank]
        tables.append(
            Rows(
                first,
                size,
                np.searchsorted(block_index, np.arange(count + 1)).astype(np.uint32),
                place[block_index, cell].astype(np.uint32),
                np.ascontiguousarray(shaped[block_index, :, cell]),
            )
        )
    return tables
