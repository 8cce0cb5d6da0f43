"""From a fused `Graph` to a `Program`: layouts, weight tables, kernel choice, memory."""

from __future__ import annotations

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
)
from feather.deploy.layout import Grid
from feather.deploy.placement import Placement
from feather.deploy.program import (
    ConvStep,
    FlattenStep,
    InputStep,
    Layer,
    LinearStep,
    Maps,
    MaxStep,
    MeanStep,
    OutputStep,
    PointwiseStep,
    Program,
    SoftmaxStep,
    Vector,
)
from feather.deploy.rows import row_tables
from feather.deploy.targets import Target


def lower(graph: Graph, target: Target, batch: int, block: int | None = None, aligned: bool | None = None) -> Program:
    """Lay out, choose kernels, plan memory.

    Args:
        graph: fused.
        batch: images per call, at least 1.
        block: output channels that share their loads, for all layers; None lets the cost model choose for each.
        aligned: whether grids are, wherever they can be; None lets the cost model choose for each.
    """
    return _Lowering(graph, target, batch, block, aligned).program


class _Lowering:
    def __init__(self, graph: Graph, target: Target, batch: int, block: int | None, aligned: bool | None) -> None:
        self.graph, self.target, self.block = graph, target, block
        self.program = Program(target, batch, graph.shapes[graph.input], graph.shapes[graph.output])
        self.placement = Placement(graph, target, batch, aligned)
        if len(self.program.input_shape) == 1:
            vector = self.placement.vector(graph.input)
            self.placement.add(InputStep("input", vector), vector)
        for self.index, op in enumerate(graph.ops):
            self.translate(op)
        result = self.placement.places[graph.output]
        if isinstance(result, Vector):
            self.placement.add(OutputStep("output", result), result)
        else:
            self.placement.add(FlattenStep("output", result, None), result)
        self.program.workspace = memory.plan(buffer for buffer in self.placement.buffers if buffer.first >= 0)
        self.program.steps = self.placement.steps

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
                source, vector = self.placement.maps_of(op.inputs[0]), self.placement.vector(op.output)
                self.placement.add(MeanStep(op.name, source, vector), source, vector)
            case Flatten():
                source, vector = self.placement.maps_of(op.inputs[0]), self.placement.vector(op.output)
                self.placement.add(FlattenStep(op.name, source, vector), source, vector)
            case Softmax():
                first, second = self.placement.vector(op.inputs[0]), self.placement.vector(op.output)
                self.placement.add(SoftmaxStep(op.name, first, second), first, second)
            case _:
                raise TypeError(type(op).__name__)

    def convolution(self, op: Conv) -> None:
        source, taps, shifts, step = self.placement.offsets(op)
        if op.residual is not None:
            self.placement.maps_of(op.residual)
            self.placement.reuse_residual(op, self.index)
        target = self.placement.maps(op.output)
        residual = None if op.residual is None else self.placement.maps(op.residual)
        outputs, per_group = op.weight.shape[:2]
        group = np.arange(outputs) // (outputs // op.groups)
        channels = group[:, None] * per_group + np.arange(per_group)[None, :]
        offsets = (channels * step)[:, :, None] + taps.reshape(1, 1, -1)
        offsets = offsets.reshape(outputs, -1) + source.lead + source.channel * source.grid.stride
        weight = op.weight.reshape(outputs, -1)
        choice = self.choose_block(op, weight, target.grid)
        rows = row_tables(weight, offsets, np.tile(shifts.reshape(-1), per_group), choice)
        conv = ConvStep(op.name, source, target, residual, op.activation, op.bias, rows, factors=op.scale)
        self.placement.add(conv, source, target, residual)
        nonzeros = int(np.count_nonzero(op.weight))
        kernel = "sparse" if choice == 1 else f"blocks of {choice} channels"
        macs = nonzeros * target.grid.height * target.grid.width
        self.program.layers.append(Layer(op.name, op.weight.shape, nonzeros, macs, kernel))

    def choose_block(self, op: Conv, weight: Array, grid: Grid) -> int:
        """Channels that share loads: many for dense weights, one for sparse ones, as the measured costs say."""
        reading = costs.reading(grid, op.window)
        if self.block is not None:
            return max(b for b in costs.blocks(self.target, grid, reading, len(weight), op.groups) if b <= self.block)
        return costs.best_block(self.target, grid, reading, weight, op.groups)[1]

    def avg_pool(self, op: AvgPool) -> None:
        """A depthwise convolution with equal weights, or with ones and a divisor for every pixel."""
        source, taps, shifts, step = self.placement.offsets(op)
        target = self.placement.maps(op.output)
        uniform = bool((op.divisors == op.divisors[0, 0]).all())
        weight = np.full((target.channels, taps.size), 1 / op.divisors[0, 0] if uniform else 1, np.float32)
        start = source.lead + source.channel * source.grid.stride
        offsets = np.arange(target.channels)[:, None] * step + taps.reshape(1, -1) + start
        scale = None
        if not uniform:
            scale = np.zeros(target.grid.vectors * target.grid.vector, np.float32)
            scale[target.grid.pixels()] = 1 / op.divisors
        bias = np.zeros(target.channels, np.float32)
        rows = row_tables(weight, offsets, shifts.reshape(-1), 1)
        self.placement.add(ConvStep(op.name, source, target, None, None, bias, rows, scale), source, target)

    def max_pool(self, op: MaxPool) -> None:
        source, taps, shifts, step = self.placement.offsets(op)
        target = self.placement.maps(op.output)
        lists: dict[int, list[int]] = {}
        for tap, shift in zip(taps.reshape(-1), shifts.reshape(-1), strict=True):
            lists.setdefault(int(shift), []).append(int(tap))
        self.placement.add(MaxStep(op.name, source, target, step, lists), source, target)

    def linear(self, op: Linear) -> None:
        source, target = self.placement.vector(op.inputs[0]), self.placement.vector(op.output)
        residual = None if op.residual is None else self.placement.vector(op.residual)
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
        self.placement.add(step, source, target, residual)
        kernel = "sparse" if sparse else "dense"
        self.program.layers.append(Layer(op.name, op.weight.shape, nonzeros, nonzeros, kernel))

    def pointwise(self, op: Pointwise) -> None:
        places = [
            self.placement.place(name) if len(self.graph.shapes[name]) == 1 else self.placement.maps_of(name)
            for name in op.inputs
        ]
        target = self.placement.place(op.output)
        plain = bool((op.scale == 1).all() and (op.shift == 0).all())
        other = places[1] if len(places) == 2 else None
        scale, shift = (None, None) if plain else (op.scale, op.shift)
        self.placement.add(
            PointwiseStep(op.name, places[0], other, target, scale, shift, op.activation), *places, target
        )

    def concat(self, op: Concat) -> None:
        """Copy the parts that could not be written in place."""
        whole = self.placement.maps(op.output)
        channel = whole.channel
        for name in op.inputs:
            source = self.placement.maps_of(name)
            if source.buffer is not whole.buffer or source.channel != channel:
                part = Maps(whole.buffer, whole.grid, whole.lead, channel, source.channels)
                self.placement.add(PointwiseStep(op.name, source, None, part, None, None, None), source, part)
            channel += source.channels
