"""The network as a list of operations on named values: what `capture` writes, `fuse` rewrites and `lower` reads.

A value has the shape of one sample: ``(channels, height, width)`` for a map, ``(features,)`` for a vector. Weights are
numpy arrays, float32, laid out as PyTorch's.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Pair = tuple[int, int]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Activation:
    """``clamp`` to [low, high] (ReLU is [0, inf], ReLU6 [0, 6]) or ``hardswish``: x * clamp(x + 3, 0, 6) / 6."""

    kind: str = "clamp"
    low: float = 0.0
    high: float = float("inf")


@dataclass
class Op:
    """One operation. ``name`` is the layer's name in the model, ``inputs`` and ``output`` are names of values."""

    name: str
    inputs: list[str]
    output: str


@dataclass
class Window:
    """Geometry of a sliding window, each as (rows, columns): cells, not pixels of a batch."""

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)


@dataclass
class Conv(Op):
    """2-d convolution, then ``+ residual`` (a value of the output's shape), then the activation.

    weight is ``(out, in / groups, kernel rows, kernel columns)``, bias ``(out,)``. With ``scale`` ``(out,)`` the
    weights are whole numbers in -127 ... 127 that it multiplies (`quantize`).
    """

    weight: Array
    bias: Array
    window: Window
    groups: int = 1
    residual: str | None = None
    activation: Activation | None = None
    scale: Array | None = None


@dataclass
class Linear(Op):
    """``weight @ x + bias`` for a vector, then ``+ residual``, then the activation; weight is ``(out, in)``, ``scale``
    as for `Conv`."""

    weight: Array
    bias: Array
    residual: str | None = None
    activation: Activation | None = None
    scale: Array | None = None


@dataclass
class Pointwise(Op):
    """``activation(inputs[0] * scale + shift + inputs[1])``, scale and shift per channel; the second input may lack."""

    scale: Array
    shift: Array
    activation: Activation | None = None


@dataclass
class MaxPool(Op):
    """Largest value in each window; cells beyond the border do not count."""

    window: Window


@dataclass
class AvgPool(Op):
    """Sum over each window divided by ``divisors`` (output rows, output columns)."""

    window: Window
    divisors: Array


@dataclass
class GlobalAvg(Op):
    """Mean over all pixels of each channel: a map to a vector."""


@dataclass
class Concat(Op):
    """Maps one after another along the channels."""


@dataclass
class Flatten(Op):
    """A map to a vector in the order channel, row, column."""


@dataclass
class Softmax(Op):
    """exp(x) / sum(exp(x)) of a vector."""


@dataclass
class Graph:
    """Operations in an order in which they can run, the shapes of all values, and the two ends."""

    input: str
    output: str
    shapes: dict[str, Shape]
    ops: list[Op] = field(default_factory=list)

    def uses(self) -> Counter[str]:
        """How often each value is read; the network's result counts as one reading."""
        counts = Counter({self.output: 1})
        for op in self.ops:
            counts.update(reads(op))
        return counts

    def producers(self) -> dict[str, Op]:
        """The operation that computes each value; the network's input has none."""
        return {op.output: op for op in self.ops}


def reads(op: Op) -> list[str]:
    """Every value an operation reads, its residual included."""
    residual = getattr(op, "residual", None)
    return [*op.inputs, residual] if residual is not None else list(op.inputs)
