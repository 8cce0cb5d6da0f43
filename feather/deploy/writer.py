"""What the C functions of a program's steps share: constant tables, kernels, helpers, masks, loops."""

from __future__ import annotations

import numpy as np

from feather.deploy.graph import Array
from feather.deploy.kernels import ConvKernel, MaxKernel, PointwiseKernel, literal
from feather.deploy.layout import Grid
from feather.deploy.program import Maps, Program, Vector
from feather.deploy.tables import Tables


class Writer:
    """Collects what the bodies of the steps use, each once.

    Attributes:
        data: the constant tables.
        kernels, helpers: texts of the C functions that the bodies call, by name.
        widths: floats of the vector types that those use.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.data = Tables()
        self.kernels: dict[str, str] = {}
        self.helpers: dict[str, str] = {}
        self.widths: set[int] = set()
        self.masks: dict[Grid, int] = {}

    def kernel(self, kernel: ConvKernel | MaxKernel | PointwiseKernel) -> str:
        self.widths.add(kernel.width)
        if kernel.name not in self.kernels:
            self.kernels[kernel.name] = kernel.text()
        return kernel.name

    def mask(self, grid: Grid) -> int:
        """Position of the grid's mask: all bits set at pixels, none in gaps."""
        if grid not in self.masks:
            mask = np.zeros(grid.vectors * grid.vector, np.int32)
            mask[grid.pixels()] = -1
            self.masks[grid] = self.data.add(mask, 64)
        return self.masks[grid]

    def at(self, place: Maps | Vector) -> str:
        """Pointer to the first pixel or feature."""
        return f"W + {place.buffer.offset + (place.start if isinstance(place, Maps) else 0)}"

    def borders(self, maps: Maps, first: str, last: str, indent: str) -> str:
        """Clear what kernels leave of planes ``first`` to ``last``."""
        grid = maps.grid
        stored = grid.vectors * grid.vector
        if grid.stride == stored:
            return ""
        plane = f"{self.at(maps)} + (long)c * {grid.stride}"
        return (
            f"{indent}for (int c = {first}; c < {last}; ++c)\n"
            f"{indent}  __builtin_memset({plane} + {stored}, 0, {4 * (grid.stride - stored)});\n"
        )

    def lead(self, maps: Maps, fill: float = 0.0) -> str:
        """Clear what lies before the first plane of a buffer."""
        if maps.channel or not maps.lead:
            return ""
        if fill == 0:
            return f"  __builtin_memset(W + {maps.buffer.offset}, 0, {4 * maps.lead});\n"
        return f"  for (int i = 0; i < {maps.lead}; ++i) W[{maps.buffer.offset} + i] = {literal(fill)};\n"

    def jobs(self, body: list[tuple[int, str]], count: int, borders: str) -> str:
        """Loop over tiles and, with threads, over chunks of ``count`` rows; ``body`` lists (tiles, call)."""
        tiles = sum(n for n, _ in body)
        lines = [
            "  PARALLEL",
            f"  for (int job = 0; job < {tiles} * CHUNKS; ++job) {{",
            f"    const int tile = job / CHUNKS, first = {count} * (job % CHUNKS) / CHUNKS;",
            f"    const int last = {count} * (job % CHUNKS + 1) / CHUNKS;",
            "    (void)tile;",
        ]
        start = 0
        for i, (n, call) in enumerate(body):
            condition = "" if i + 1 == len(body) else f"if (tile < {start + n}) "
            lines.append(f"    {'else ' if i else ''}{condition}{call}")
            start += n
        lines.append(f"    if (tile == {tiles - 1}) {{\n{borders}    }}" if borders else "")
        return "\n".join([*(line for line in lines if line), "  }\n"])

    def weights(self, weights: Array, factors: Array | None, align: int = 4) -> str:
        """Pointer to a table of weights, int8 where they have factors."""
        if factors is None:
            return f"DATA(f32, {self.data.add(weights, align)})"
        return f"DATA(i8, {self.data.add(weights.astype(np.int8), align)})"

    def vector_helper(self, name: str, text: str) -> None:
        """Include a helper at the target's full width."""
        width = self.program.target.floats
        self.widths.add(width)
        self.helpers[name] = text.replace("@", str(width))
