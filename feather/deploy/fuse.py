"""Rewrites of a `Graph` that leave its result as it is: fewer passes over memory, and no work for what nobody reads."""

from __future__ import annotations

import numpy as np

from feather.deploy.graph import (
    AvgPool,
    Concat,
    Conv,
    GlobalAvg,
    Graph,
    Linear,
    MaxPool,
    Op,
    Pointwise,
    reads,
)


def fuse(graph: Graph) -> Graph:
    """Fold normalisation, additions and activations into the operation before; drop unread operations and channels."""
    _drop_unread(graph)
    _merge_pointwise(graph)
    _fold_into_weights(graph)
    _drop_unread_channels(graph)
    for op in graph.ops:
        if isinstance(op, Pointwise):
            op.scale, op.shift = op.scale.astype(np.float32), op.shift.astype(np.float32)
    return graph


def _drop_unread(graph: Graph) -> None:
    while True:
        uses = graph.uses()
        kept = [op for op in graph.ops if uses[op.output]]
        if len(kept) == len(graph.ops):
            return
        graph.ops = kept


def _replace(graph: Graph, op: Op, value: str, by: str) -> None:
    op.inputs = [by if name == value else name for name in op.inputs]


def _merge_pointwise(graph: Graph) -> None:
    """An activation or normalisation behind a pointwise operation that nobody else reads becomes part of it."""
    changed = True
    while changed:
        changed = False
        uses, producers = graph.uses(), graph.producers()
        for op in graph.ops:
            if not isinstance(op, Pointwise) or len(op.inputs) != 1:
                continue
            before = producers.get(op.inputs[0])
            if not isinstance(before, Pointwise) or uses[before.output] != 1 or before.activation is not None:
                continue
            plain = bool((op.scale == 1).all() and (op.shift == 0).all())
            if not plain and len(before.inputs) != 1:
                continue
            before.shift = before.shift * op.scale + op.shift
            before.scale = before.scale * op.scale
            before.activation = op.activation
            before.output = op.output
            graph.ops.remove(op)
            changed = True
            break


def _fold_into_weights(graph: Graph) -> None:
    """``pointwise(conv(x), y)`` becomes one convolution with a residual, where the order of execution allows it."""
    changed = True
    while changed:
        changed = False
        uses, producers = graph.uses(), graph.producers()
        place = {op.output: i for i, op in enumerate(graph.ops)}
        for op in graph.ops:
            if not isinstance(op, Pointwise):
                continue
            # The operand computed last takes the other in: then the other exists when it runs.
            ranked = sorted(range(len(op.inputs)), key=lambda i: -place.get(op.inputs[i], -1))
            at = ranked[0]
            target = producers.get(op.inputs[at])
            if not isinstance(target, Conv | Linear) or uses[target.output] != 1:
                continue
            if target.activation is not None or target.residual is not None:
                continue
            if len(op.inputs) == 2 and at == 1 and not ((op.scale == 1).all() and (op.shift == 0).all()):
                continue
            shape = (-1,) + (1,) * (target.weight.ndim - 1)
            scale = op.scale.astype(np.float64)
            target.weight = (target.weight * scale.reshape(shape)).astype(np.float32)
            target.bias = (target.bias * scale + op.shift).astype(np.float32)
            target.activation = op.activation
            if len(op.inputs) == 2:
                target.residual = op.inputs[1 - at]
            target.output = op.output
            graph.ops.remove(op)
            changed = True
            break


def _drop_unread_channels(graph: Graph) -> None:
    """Empty the weights of channels that no later layer has a weight for: their value is then a constant nobody reads.

    One walk from the end, since what a layer needs depends on what is needed of it.
    """
    needed = {name: np.zeros(shape[0], bool) for name, shape in graph.shapes.items()}
    needed[graph.output][:] = True
    for op in reversed(graph.ops):
        out = needed[op.output]
        if isinstance(op, Conv | Linear):
            op.weight = op.weight.copy()
            op.weight[~out] = 0
            op.bias = np.where(out, op.bias, 0).astype(np.float32)
            if op.residual is not None:
                needed[op.residual] |= out
            used = np.asarray(op.weight != 0)
            if isinstance(op, Linear):
                needed[op.inputs[0]] |= used.any(0)
            else:
                groups = used.reshape(op.groups, -1, *used.shape[1:]).any((1, 3, 4))
                needed[op.inputs[0]] |= groups.reshape(-1)
        elif isinstance(op, Concat):
            start = 0
            for name in op.inputs:
                size = graph.shapes[name][0]
                needed[name] |= out[start : start + size]
                start += size
        elif isinstance(op, Pointwise | MaxPool | AvgPool | GlobalAvg):
            for name in reads(op):
                needed[name] |= out
        else:
            for name in reads(op):
                needed[name][:] = True
