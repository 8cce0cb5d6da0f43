"""From a fused `Graph` to a `Program`: layouts, weight tables, kernel choice, memory."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np

from feather.deploy import costs, memory
from feather.deploy.graph import (
    Array,
    AvgPool,
    Concat,
    Conv,
    Flatten,
    GlobalAvg,
    Graph,
    Linear,
    MaxPool,
    Op,
    Pointwise,
    Softmax,
    reads,
)
from feather.deploy.layout import LINE, Grid, Taps, period, phase_size, round_up, window_taps
from feather.deploy.program import (
    Buffer,
    ConvStep,
    FlattenStep,
    InputStep,
    Layer,
    LinearStep,
    Maps,
    MaxStep,
    MeanStep,
    OutputStep,
    Place,
    PointwiseStep,
    Program,
    Rows,
    SoftmaxStep,
    Step,
    Vector,
    ViewStep,
)
from feather.deploy.targets import Target

Size = tuple[int, int]
Windowed = Conv | MaxPool | AvgPool
# What a view is: the value, its stride, the size of the output it is laid out for, and what surrounds it.
ViewKey = tuple[str, Size, Size, float]


def lower(graph: Graph, target: Target, batch: int, block: int | None = None) -> Program:
    """Lay out, choose kernels, plan memory.

    Args:
        graph: fused.
        batch: images per call, at least 1.
        block: output channels that share their loads, for all layers; None lets the cost model choose for each.
    """
    return _Lowering(graph, target, batch, block).program


class _Lowering:
    def __init__(self, graph: Graph, target: Target, batch: int, block: int | None) -> None:
        self.graph, self.target, self.batch, self.block = graph, target, batch, block
        self.program = Program(target, batch, graph.shapes[graph.input], graph.shapes[graph.output])
        self.view_taps = self.collect_views()
        self.grids = self.make_grids()
        self.places: dict[str, Place] = {}
        self.views: dict[ViewKey, tuple[Maps, list[tuple[int, int, int, int]]]] = {}
        self.buffers: list[Buffer] = []
        self.last_read = {name: i for i, op in enumerate(graph.ops) for name in reads(op)}
        self.last_read[graph.output] = len(graph.ops)
        self.assign_concats()
        self.steps: list[Step] = []
        if len(self.program.input_shape) == 1:
            place = self.place(graph.input)
            assert isinstance(place, Vector)
            self.add(InputStep("input", place), place)
        for self.index, op in enumerate(graph.ops):
            self.translate(op)
        result = self.places[graph.output]
        if isinstance(result, Vector):
            self.add(OutputStep("output", result), result)
        else:
            self.add(FlattenStep("output", result, None), result)
        used = [buffer for buffer in self.buffers if buffer.first >= 0]
        self.program.workspace = memory.plan(used)
        self.program.steps = self.steps

    # -- layouts ------------------------------------------------------------------------------------------------------

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
        grids = {}
        for size, (rows, pitch) in need.items():
            widest = Grid(self.batch, *size, rows, pitch, 4).extent
            vector = next((w for w in self.target.widths()[::-1] if w >= widest), self.target.floats)
            grids[size] = Grid(self.batch, *size, rows, pitch, vector)
        return grids

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

    def reuse_residual(self, op: Conv) -> None:
        """Write the result over the residual where nobody reads that again: one buffer less."""
        if op.residual is None or op.output in self.places or op.residual == op.inputs[0]:
            return
        old = self.places[op.residual]
        if not isinstance(old, Maps) or old.buffer.size != old.grid.size(old.channels):
            return
        sharers = [name for name, place in self.places.items() if place.buffer is old.buffer]
        if all(self.last_read.get(name, -1) <= self.index for name in sharers):
            self.places[op.output] = old

    # -- operations ---------------------------------------------------------------------------------------------------

    def translate(self, op: Op) -> None:
        match op:
            case Conv():
                self.convolution(op)
            case MaxPool():
                self.max_pool(op)
            case AvgPool():
                self.avg_pool(op)
            case Linear():
                self.linear(op)
            case Pointwise():
                self.pointwise(op)
            case Concat():
                self.concat(op)
            case GlobalAvg():
                source, vector = self.maps_of(op.inputs[0]), self.vector(op.output)
                self.add(MeanStep(op.name, source, vector), source, vector)
            case Flatten():
                source, vector = self.maps_of(op.inputs[0]), self.vector(op.output)
                self.add(FlattenStep(op.name, source, vector), source, vector)
            case Softmax():
                first, second = self.vector(op.inputs[0]), self.vector(op.output)
                self.add(SoftmaxStep(op.name, first, second), first, second)
            case _:
                raise TypeError(type(op).__name__)

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

    def offsets(self, op: Windowed) -> tuple[Maps, Array, int]:
        """Where a window's cells lie: the planes, ``(rows, columns)`` offsets from a channel's first plane's pixel, and
        the floats from one channel to the next."""
        source, phases = self.read(op)
        rows, columns = window_taps(op.window)
        stride = source.grid.stride
        index = {(a, b): i for i, (a, b, _, _) in enumerate(phases)}
        table = [
            [
                index[(a, b)] * stride + q * source.grid.pitch + c
                for b, c in zip(columns.phase, columns.shift, strict=True)
            ]
            for a, q in zip(rows.phase, rows.shift, strict=True)
        ]
        return source, np.asarray(table), stride * len(phases)

    def convolution(self, op: Conv) -> None:
        source, taps, step = self.offsets(op)
        if op.residual is not None:
            self.maps_of(op.residual)
        self.reuse_residual(op)
        target = self.maps(op.output)
        residual = None if op.residual is None else self.maps(op.residual)
        outputs, per_group = op.weight.shape[:2]
        group = np.arange(outputs) // (outputs // op.groups)
        channels = group[:, None] * per_group + np.arange(per_group)[None, :]
        offsets = (channels * step)[:, :, None] + taps.reshape(1, 1, -1)
        offsets = offsets.reshape(outputs, -1) + source.lead + source.channel * source.grid.stride
        weight = op.weight.reshape(outputs, -1)
        choice = self.choose_block(op, weight, target.grid)
        rows = _tables(weight, offsets, choice)
        conv = ConvStep(op.name, source, target, residual, op.activation, op.bias, rows, factors=op.scale)
        self.add(conv, source, target, residual)
        nonzeros = int(np.count_nonzero(op.weight))
        kernel = "sparse" if choice == 1 else f"blocks of {choice} channels"
        macs = nonzeros * target.grid.height * target.grid.width
        self.program.layers.append(Layer(op.name, op.weight.shape, nonzeros, macs, kernel))

    def choose_block(self, op: Conv, weight: Array, grid: Grid) -> int:
        """Channels that share loads: many for dense weights, one for sparse ones, as the measured costs say."""
        allowed = [
            b for b in self.target.tiles if (len(weight) // op.groups) % b == 0 or (op.groups == 1 and b <= len(weight))
        ]
        if self.block is not None:
            return max(b for b in allowed if b <= self.block)
        return min(allowed, key=lambda b: costs.convolution(self.target, grid, b, *_entries(weight, b)))

    def avg_pool(self, op: AvgPool) -> None:
        """A depthwise convolution with equal weights, or with ones and a divisor for every pixel."""
        source, taps, step = self.offsets(op)
        target = self.maps(op.output)
        uniform = bool((op.divisors == op.divisors[0, 0]).all())
        weight = np.full((target.channels, taps.size), 1 / op.divisors[0, 0] if uniform else 1, np.float32)
        start = source.lead + source.channel * source.grid.stride
        offsets = np.arange(target.channels)[:, None] * step + taps.reshape(1, -1) + start
        scale = None
        if not uniform:
            scale = np.zeros(target.grid.vectors * target.grid.vector, np.float32)
            scale[target.grid.pixels()] = 1 / op.divisors
        bias = np.zeros(target.channels, np.float32)
        rows = _tables(weight, offsets, 1)
        self.add(ConvStep(op.name, source, target, None, None, bias, rows, scale), source, target)

    def max_pool(self, op: MaxPool) -> None:
        source, taps, step = self.offsets(op)
        target = self.maps(op.output)
        self.add(MaxStep(op.name, source, target, step, [int(t) for t in taps.reshape(-1)]), source, target)

    def linear(self, op: Linear) -> None:
        source, target = self.vector(op.inputs[0]), self.vector(op.output)
        residual = None if op.residual is None else self.vector(op.residual)
        nonzeros = int(np.count_nonzero(op.weight))
        step = LinearStep(op.name, source, target, residual, op.activation, op.bias, op.weight, factors=op.scale)
        sparse = (
            costs.linear_is_sparse(self.target, op.weight.size, nonzeros) if self.block is None else self.block == 1
        )
        if sparse:
            rows, columns = np.nonzero(op.weight)
            step.pointers = np.searchsorted(rows, np.arange(len(op.weight) + 1)).astype(np.uint32)
            step.columns = columns.astype(np.uint32)
            step.weights = op.weight[rows, columns]
        self.add(step, source, target, residual)
        kernel = "sparse" if sparse else "dense"
        self.program.layers.append(Layer(op.name, op.weight.shape, nonzeros, nonzeros, kernel))

    def pointwise(self, op: Pointwise) -> None:
        places = [self.place(name) if len(self.graph.shapes[name]) == 1 else self.maps_of(name) for name in op.inputs]
        target = self.place(op.output)
        plain = bool((op.scale == 1).all() and (op.shift == 0).all())
        other = places[1] if len(places) == 2 else None
        scale, shift = (None, None) if plain else (op.scale, op.shift)
        self.add(PointwiseStep(op.name, places[0], other, target, scale, shift, op.activation), *places, target)

    def concat(self, op: Concat) -> None:
        """Copy the parts that could not be written in place."""
        whole = self.maps(op.output)
        channel = whole.channel
        for name in op.inputs:
            source = self.maps_of(name)
            if source.buffer is not whole.buffer or source.channel != channel:
                part = Maps(whole.buffer, whole.grid, whole.lead, channel, source.channels)
                self.add(PointwiseStep(op.name, source, None, part, None, None, None), source, part)
            channel += source.channels


def _pairs(rows: Taps, columns: Taps) -> list[tuple[int, int]]:
    return [(a, b) for a in set(rows.phase) for b in set(columns.phase)]


def _entries(weight: Array, block: int) -> tuple[int, int]:
    """Blocks, and entries in all of them, if ``block`` channels share their offsets."""
    blocks, rest = divmod(len(weight), block)
    used = (weight[: blocks * block] != 0).reshape(blocks, block, -1).any(1)
    return blocks + rest, int(used.sum()) + int(np.count_nonzero(weight[blocks * block :]))


def _tables(weight: Array, offsets: Array, block: int) -> list[Rows]:
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
