"""How maps lie in memory, so that a weight is one (offset, value) pair and every access is a run of whole vectors.

A channel is a *plane*: its rows follow one another at a pitch a little above their width, and the zeros in between
serve as the right border of one row and the left border of the next. Zero rows divide images of a batch and planes
alike. A convolution of stride 1 is then ``out[i] += weight * in[i + offset]`` over one flat range of floats, the gaps
included; a mask clears them again as the result is stored. A strided convolution reads a *view*: the input split into
its phases (even and odd columns, for stride 2), each laid out at the pitch of the output, where the same formula holds.

Most of these offsets are no multiple of a vector, and a load across two cache lines costs twice. On an *aligned* grid
rows begin at whole vectors and need no gap for their neighbours' sake: the sums over all weights that look the same way
along the row are shifted once, in registers, before they are added up, ``out[i] += shifted[i + shift]``, and every load
is of a whole vector at its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feather.deploy.graph import Pair, Window

LINE = 16  # floats in a cache line


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class Grid:
    """Layout of the planes of one map size; all numbers count floats or rows.

    Attributes:
        batch, height, width: what the plane holds.
        rows, pitch: from the first row of an image to that of the next, and from a row to the next.
        vector: floats per vector of the kernels on this grid.
        aligned: whether every row is whole vectors, so that kernels shift sums instead of loading between vectors.
    """

    batch: int
    height: int
    width: int
    rows: int
    pitch: int
    vector: int
    aligned: bool = False

    @property
    def extent(self) -> int:
        """Floats from the first pixel to the last, or to the end of its row where rows are whole vectors."""
        last = self.pitch if self.aligned else self.width
        return ((self.batch - 1) * self.rows + self.height - 1) * self.pitch + last

    @property
    def vectors(self) -> int:
        """Vectors that cover the extent."""
        return -(-self.extent // self.vector)

    @property
    def stride(self) -> int:
        """From one plane to the next. An odd number of cache lines, or all planes would share the same cache sets."""
        size = round_up(self.batch * self.rows * self.pitch, self.vector)
        if size >= 16 * LINE:
            size = round_up(size, LINE)
            size += LINE * (1 - size // LINE % 2)
        return size

    @property
    def lead(self) -> int:
        """Zeros before the first plane."""
        return round_up((self.rows - self.height) * self.pitch + self.pitch - self.width, LINE)

    @property
    def tail(self) -> int:
        """Floats behind the last plane that a kernel may read (and then masks)."""
        reach = (self.rows - self.height) * self.pitch + self.pitch - self.width
        return round_up(max(0, self.vectors * self.vector + reach - self.stride), LINE)

    def size(self, channels: int) -> int:
        """Floats of a whole map, zeros around it included."""
        return round_up(self.lead + channels * self.stride + self.tail, LINE)

    @property
    def dense(self) -> bool:
        """Whether every float that kernels store is a pixel, so that nothing needs masking."""
        return self.extent == self.batch * self.height * self.width == self.vectors * self.vector

    def pixels(self) -> NDArray[np.int64]:
        """Flat position of every pixel, ``(batch, height, width)``."""
        image = np.arange(self.batch)[:, None, None] * self.rows
        row = np.arange(self.height)[None, :, None]
        column = np.arange(self.width)[None, None, :]
        return (image + row) * self.pitch + column


@dataclass(frozen=True)
class Taps:
    """One dimension of a window: kernel cell k reads, for output position x, cell ``x + shift[k]`` of ``phase[k]``."""

    phase: tuple[int, ...]
    shift: tuple[int, ...]

    @staticmethod
    def of(kernel: int, stride: int, padding: int, dilation: int) -> Taps:
        pairs = [divmod(k * dilation - padding, stride) for k in range(kernel)]
        return Taps(tuple(p for _, p in pairs), tuple(q for q, _ in pairs))

    def reach(self, phase: int) -> Pair:
        """Smallest and largest shift within a phase."""
        shifts = [q for p, q in zip(self.phase, self.shift, strict=True) if p == phase]
        return min(shifts), max(shifts)


def window_taps(window: Window) -> tuple[Taps, Taps]:
    """Taps of the rows and of the columns."""
    rows, columns = (
        Taps.of(window.kernel[i], window.stride[i], window.padding[i], window.dilation[i]) for i in range(2)
    )
    return rows, columns


def phase_size(size: int, stride: int, phase: int, out: int, last: int) -> int:
    """Cells of a phase that exist and are read: those up to the shift ``last`` of the last output position."""
    return max(0, min(-(-(size - phase) // stride), out + last))


def cells_of(size: int, stride: int, out: int, taps: Iterable[Taps]) -> int:
    """Cells of the longest phase that windows with these taps read."""
    pairs = {(phase, one.reach(phase)[1]) for one in taps for phase in one.phase}
    return max(phase_size(size, stride, phase, out, last) for phase, last in pairs)


def period(size: int, stride: int, out: int, taps: Iterable[Taps]) -> int:
    """Least distance of rows (or of images) at which the zeros between them hide each from its neighbours' windows."""
    pairs = {(phase, one.reach(phase)) for one in taps for phase in one.phase}
    cells = cells_of(size, stride, out, taps)
    # Phases lie behind one another: what one needs before it, the longest of the others must leave behind it.
    before = max(0, -min(first for _, (first, _) in pairs))
    behind = max(0, max(last for _, (_, last) in pairs))
    return max(cells + before, out + behind)
