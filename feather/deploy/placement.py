"""Where the values of a graph lie: one layout for each map size, views for strided windows, concatenations in place."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np

from feather.deploy import costs
from feather.deploy.graph import Array, AvgPool, Concat, Conv, Graph, MaxPool, reads
from feather.deploy.layout import LINE, Grid, Taps, cells_of, period, phase_size, round_up, window_taps
from feather.deploy.program import Buffer, Maps, Place, Step, Vector, ViewStep
from feather.deploy.targets import Target

Size = tuple[int, int]
Windowed = Conv | MaxPool | AvgPool
# What a view is: the value, its stride, the size of the output it is laid out for, and what surrounds it.
ViewKey = tuple[str, Size, Size, float]


class Placement:
    """Gives values their places on demand, and appends the steps that lay out views and the network's input.

    Attributes:
        steps: of the program, in order.
        buffers: of the workspace; each knows the first and the last step that uses it.
    """

    def __init__(self, graph: Graph, target: Target, batch: int, aligned: bool | None = None) -> None:
        self.graph, self.target, self.batch, self.aligned = graph, target, batch, aligned
        self.steps: list[Step] = []
        self.buffers: list[Buffer] = []
        self.places: dict[str, Place] = {}
        self.views: dict[ViewKey, tuple[Maps, list[tuple[int, int, int, int]]]] = {}
        self.view_taps = self.collect_views()
        self.grids = self.make_grids()
        self.last_read = {name: i for i, op in enumerate(graph.ops) for name in reads(op)}
        self.last_read[graph.output] = len(graph.ops)
        self.assign_concats()

    def size(self, value: str) -> Size:
        _, height, width = self.graph.shapes[value]
        return height, width

    def key(self, op: Windowed) -> ViewKey | None:
        """The view that a window reads, or None where it reads the map itself."""
        source, out = op.inputs[0], self.size(op.output)
        fill = -math.inf if isinstance(op, MaxPool) else 0.0
        own = op.window.stride == (1, 1) and self.size(source) == out and fill == 0.0 and source != self.graph.input
        return None if own else (source, op.window.stride, out, fill)

    def collect_views(self) -> dict[ViewKey, list[tuple[Taps, Taps]]]:
        views: dict[ViewKey, list[tuple[Taps, Taps]]] = defaultdict(list)
        for op in self.graph.ops:
            if isinstance(op, Windowed) and (key := self.key(op)) is not None:
                views[key].append(window_taps(op.window))
        return dict(views)

    def make_grids(self) -> dict[Size, Grid]:
        """One grid for each map size: its gaps satisfy every window that reads or writes maps of that size."""
        sizes = {self.size(name) for name, shape in self.graph.shapes.items() if len(shape) == 3}
        need = {size: list(size) for size in sizes}
        cells = {size: size[1] for size in sizes}
        demands = [
            (self.size(op.inputs[0]), (1, 1), self.size(op.output), [window_taps(op.window)])
            for op in self.graph.ops
            if isinstance(op, Windowed) and self.key(op) is None
        ]
        demands += [(self.size(source), stride, out, taps) for (source, stride, out, _), taps in self.view_taps.items()]
        for size, stride, out, taps in demands:
            for i in range(2):
                least = period(size[i], stride[i], out[i], [pair[i] for pair in taps])
                need[out][i] = max(need[out][i], least)
            cells[out] = max(cells[out], cells_of(size[1], stride[1], out[1], [columns for _, columns in taps]))
        grids = {}
        for size, (rows, pitch) in need.items():
            widest = Grid(self.batch, *size, rows, pitch, 4).extent
            narrow = next((w for w in self.target.widths()[::-1] if w >= widest), None)
            widths = costs.widths(self.target) if narrow is None else [narrow]
            plain = [Grid(self.batch, *size, rows, pitch, w) for w in widths]
            aligned = [Grid(self.batch, *size, rows, round_up(cells[size], w), w, True) for w in self.target.widths()]
            aligned = [grid for grid in aligned if costs.fits(self.target, grid)]
            if self.aligned is None:
                choices = plain + [grid for grid in aligned if costs.knows(self.target, grid)]
            else:
                choices = aligned if self.aligned and aligned else plain
            grids[size] = min(choices, key=self.cost)
        return grids

    def cost(self, grid: Grid) -> float:
        """Nanoseconds of the convolutions onto maps of this grid."""
        total = 0.0
        for op in self.graph.ops:
            if isinstance(op, Conv) and self.size(op.output) == (grid.height, grid.width):
                weight, reading = op.weight.reshape(len(op.weight), -1), costs.reading(grid, op.window)
                total += costs.best_block(self.target, grid, reading, weight, op.groups)[0]
        return total

    def assign_concats(self) -> None:
        """Give the parts of a concatenation their place in it: where they are written there, it costs nothing."""
        producers = self.graph.producers()
        for op in reversed(self.graph.ops):
            if not isinstance(op, Concat):
                continue
            whole = self.place(op.output)
            assert isinstance(whole, Maps)
            channel = whole.channel
            for name in op.inputs:
                channels = self.graph.shapes[name][0]
                if name in producers and name not in self.places:
                    self.places[name] = Maps(whole.buffer, whole.grid, whole.lead, channel, channels)
                channel += channels

    def buffer(self, size: int) -> Buffer:
        self.buffers.append(Buffer(size))
        return self.buffers[-1]

    def place(self, value: str) -> Place:
        if value not in self.places:
            shape = self.graph.shapes[value]
            if len(shape) == 1:
                size = round_up(self.batch * shape[0], LINE) + LINE
                self.places[value] = Vector(self.buffer(size), shape[0])
            else:
                grid = self.grids[(shape[1], shape[2])]
                self.places[value] = Maps(self.buffer(grid.size(shape[0])), grid, grid.lead, 0, shape[0])
        return self.places[value]

    def maps(self, value: str) -> Maps:
        place = self.place(value)
        assert isinstance(place, Maps)
        return place

    def vector(self, value: str) -> Vector:
        place = self.place(value)
        assert isinstance(place, Vector)
        return place

    def add(self, step: Step, *places: Place | None) -> None:
        """Append a step that uses ``places``."""
        for place in places:
            if place is not None:
                place.buffer.first = len(self.steps) if place.buffer.first < 0 else place.buffer.first
                place.buffer.last = len(self.steps)
        self.steps.append(step)

    def reuse_residual(self, op: Conv, index: int) -> None:
        """Write over the residual of operation ``index`` where nobody reads that again: one buffer less."""
        if op.residual is None or op.output in self.places or op.residual == op.inputs[0]:
            return
        old = self.places[op.residual]
        if not isinstance(old, Maps) or old.buffer.size != old.grid.size(old.channels):
            return
        sharers = [name for name, place in self.places.items() if place.buffer is old.buffer]
        if all(self.last_read.get(name, -1) <= index for name in sharers):
            self.places[op.output] = old

    def maps_of(self, value: str) -> Maps:
        """The planes of a value; the network's input is laid out at its first use."""
        place = self.maps(value)
        if value == self.graph.input and place.buffer.first < 0:
            shape = self.graph.shapes[value]
            size = (shape[0], shape[1], shape[2])
            self.add(ViewStep("input", None, size, place, (1, 1), [(0, 0, *self.size(value))]), place)
        return place

    def read(self, op: Windowed) -> tuple[Maps, list[tuple[int, int, int, int]]]:
        """The planes a window reads and, per channel, which phases they are."""
        key = self.key(op)
        if key is None:
            source = self.maps_of(op.inputs[0])
            return source, [(0, 0, source.grid.height, source.grid.width)]
        if key not in self.views:
            self.views[key] = self.make_view(key)
        return self.views[key]

    def make_view(self, key: ViewKey) -> tuple[Maps, list[tuple[int, int, int, int]]]:
        value, stride, out, fill = key
        grid, (channels, height, width) = self.grids[out], self.graph.shapes[value]
        taps = self.view_taps[key]
        pairs = sorted({pair for rows, columns in taps for pair in _pairs(rows, columns)})
        last_row = {a: max(r.reach(a)[1] for r, _ in taps if a in r.phase) for a, _ in pairs}
        last_column = {b: max(c.reach(b)[1] for _, c in taps if b in c.phase) for _, b in pairs}
        phases = [
            (
                a,
                b,
                phase_size(height, stride[0], a, out[0], last_row[a]),
                phase_size(width, stride[1], b, out[1], last_column[b]),
            )
            for a, b in pairs
        ]
        first = min(q * grid.pitch + c for rows, columns in taps for q in rows.shift for c in columns.shift)
        lead = round_up(max(0, -first), LINE)
        planes = channels * len(phases)
        size = round_up(lead + planes * grid.stride + grid.tail, LINE)
        view = Maps(self.buffer(size), grid, lead, 0, planes)
        source = None if value == self.graph.input else self.maps(value)
        step = ViewStep(f"view of {value}", source, (channels, height, width), view, stride, phases, fill)
        self.add(step, source, view)
        return view, phases

    def offsets(self, op: Windowed) -> tuple[Maps, Array, Array, int]:
        """Where a window's cells lie: the planes; of each cell ``(rows, columns)`` the offset from a channel's first
        plane's pixel, and the shift along the row that remains to be done; the floats from one channel to the next."""
        source, phases = self.read(op)
        rows, columns = window_taps(op.window)
        grid = source.grid
        index = {(a, b): i for i, (a, b, _, _) in enumerate(phases)}
        table = [
            [index[(a, b)] * grid.stride + q * grid.pitch for b in columns.phase]
            for a, q in zip(rows.phase, rows.shift, strict=True)
        ]
        aside = np.tile(columns.shift, (len(rows.shift), 1))
        none = np.zeros_like(aside)
        offsets, shifts = (np.asarray(table), aside) if grid.aligned else (np.asarray(table) + aside, none)
        return source, offsets, shifts, grid.stride * len(phases)


def _pairs(rows: Taps, columns: Taps) -> list[tuple[int, int]]:
    return [(a, b) for a in set(rows.phase) for b in set(columns.phase)]
