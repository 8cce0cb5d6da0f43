"""What `lower` writes and `emit` prints: steps on buffers of one static workspace, with every offset known."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from feather.deploy.graph import Activation, Array, Shape
from feather.deploy.layout import Grid
from feather.deploy.targets import Target


@dataclass
class Buffer:
    """A range of the workspace: ``offset`` (floats) is planned, ``first`` to ``last`` are the steps that use it."""

    size: int
    first: int = -1
    last: int = -1
    offset: int = -1


@dataclass(frozen=True)
class Maps:
    """Channels ``channel`` onwards of a buffer that holds planes on ``grid``."""

    buffer: Buffer
    grid: Grid
    lead: int
    channel: int
    channels: int

    @property
    def start(self) -> int:
        """Offset within the buffer of the first pixel of the first channel."""
        return self.lead + self.channel * self.grid.stride


@dataclass(frozen=True)
class Vector:
    """Features of each image, one image after another, in a buffer."""

    buffer: Buffer
    features: int


Place = Maps | Vector


@dataclass
class Step:
    """One C function. ``name`` is the layer's."""

    name: str


@dataclass
class ViewStep(Step):
    """Split a map (or, where ``source`` is None, the network's input) into phases on the grid of an output.

    ``phases`` lists (row phase, column phase, rows, columns) of each plane of a channel; cells around are ``fill``.
    """

    source: Maps | None
    size: tuple[int, int, int]
    target: Maps
    stride: tuple[int, int]
    phases: list[tuple[int, int, int, int]]
    fill: float = 0.0


@dataclass
class Rows:
    """Output channels ``first`` onwards, ``block`` at a time, each block with a list of taps for each of ``shifts``.

    ``pointers[j]`` to ``pointers[j + 1]``, j = i * len(shifts) + s, are the entries of block i and shift s in
    ``offsets`` (floats from the input's base) and in ``weights``, ``(entries, block)``. Their sum goes to the pixels
    that lie ``shifts[s]`` to the left of where it was taken.
    """

    first: int
    block: int
    shifts: tuple[int, ...]
    pointers: NDArray[np.uint32]
    offsets: NDArray[np.uint32]
    weights: Array

    @property
    def blocks(self) -> int:
        return (len(self.pointers) - 1) // len(self.shifts)


@dataclass
class ConvStep(Step):
    """``target = activation(scale * (bias + sum of weight * source[offset]) + residual)``, masked.

    With ``factors``, one for each channel, the weights are int8 and their sum is multiplied before the bias is added.
    """

    source: Maps
    target: Maps
    residual: Maps | None
    activation: Activation | None
    bias: Array
    rows: list[Rows]
    scale: Array | None = None  # per pixel of the grid, (vectors * vector,)
    factors: Array | None = None


@dataclass
class MaxStep(Step):
    """``target = largest of source[offset]`` for every channel; ``channel_stride`` floats between their sources.

    ``offsets`` lists those of each shift, as for `Rows`.
    """

    source: Maps
    target: Maps
    channel_stride: int
    offsets: dict[int, list[int]]


@dataclass
class PointwiseStep(Step):
    """``target = activation(source * scale + shift + other)`` per channel; no scale: a copy or plain addition."""

    source: Place
    other: Place | None
    target: Place
    scale: Array | None
    shift: Array | None
    activation: Activation | None


@dataclass
class MeanStep(Step):
    """Mean of every plane."""

    source: Maps
    target: Vector


@dataclass
class FlattenStep(Step):
    """Pixels of all planes without the gaps; ``target`` None is the network's output."""

    source: Maps
    target: Vector | None


@dataclass
class LinearStep(Step):
    """Matrix times vector; ``pointers`` None means all weights, row after row, else the non-zeros of each row.

    ``factors`` as for `ConvStep`.
    """

    source: Vector
    target: Vector
    residual: Vector | None
    activation: Activation | None
    bias: Array
    weights: Array
    pointers: NDArray[np.uint32] | None = None
    columns: NDArray[np.uint32] | None = None
    factors: Array | None = None


@dataclass
class SoftmaxStep(Step):
    """Softmax of each image's vector."""

    source: Vector
    target: Vector


@dataclass
class InputStep(Step):
    """Copy of a vector input."""

    target: Vector


@dataclass
class OutputStep(Step):
    """Copy of the result to the caller."""

    source: Vector


@dataclass
class Layer:
    """Of the report: a layer with weights, how many of them are not zero, products per image, and its kernel."""

    name: str
    shape: Shape
    nonzeros: int
    macs: int
    kernel: str


@dataclass
class Program:
    """Everything the C file needs."""

    target: Target
    batch: int
    input_shape: Shape
    output_shape: Shape
    steps: list[Step] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    workspace: int = 0  # floats
