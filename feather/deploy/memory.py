"""Static memory: every buffer gets its place in one workspace before the program ever runs."""

from __future__ import annotations

from collections.abc import Iterable

from feather.deploy.layout import LINE, round_up
from feather.deploy.program import Buffer


def plan(buffers: Iterable[Buffer]) -> int:
    """Set ``offset`` (in floats, on cache lines) of every buffer; returns the workspace's size in floats.

    Largest first, each at the lowest place that is free during its whole life.
    """
    placed: list[Buffer] = []
    total = 0
    for buffer in sorted(buffers, key=lambda b: (-b.size, b.first)):
        offset = 0
        for other in sorted(placed, key=lambda b: b.offset):
            apart = other.last < buffer.first or other.first > buffer.last
            if not apart and offset < other.offset + other.size and other.offset < offset + buffer.size:
                offset = round_up(other.offset + other.size, LINE)
        buffer.offset = offset
        placed.append(buffer)
        total = max(total, offset + buffer.size)
    return round_up(total, LINE)
