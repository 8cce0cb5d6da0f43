"""ONNX without the onnx package: a `Graph` written as protocol-buffer bytes, and the weights of a file read back.

Field numbers are those of onnx.proto; the operator set is 17 (HardSwish needs 14). The first dimension of the input and
of the output is free.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feather.deploy.errors import DeployError
from feather.deploy.graph import (
    Activation,
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
    Window,
)

_FLOAT = 1  # TensorProto.DataType
_INT, _INTS, _FLOAT_ATTRIBUTE = 2, 7, 1  # AttributeProto.AttributeType


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: int | float | str | bytes) -> bytes:
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _attribute(name: str, value: Any) -> bytes:
    if isinstance(value, float):
        return _field(1, name) + _field(2, value) + _field(20, _FLOAT_ATTRIBUTE)
    if isinstance(value, int):
        return _field(1, name) + _field(3, value) + _field(20, _INT)
    return _field(1, name) + b"".join(_field(8, int(item)) for item in value) + _field(20, _INTS)


def _value_info(name: str, shape: tuple[int, ...]) -> bytes:
    sizes = [_field(1, _field(2, "batch"))] + [_field(1, _field(1, size)) for size in shape]
    tensor = _field(1, _FLOAT) + _field(2, b"".join(sizes))
    return _field(1, name) + _field(2, _field(1, tensor))


class _Writer:
    """Nodes and weights of one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[bytes] = []
        self.weights: list[bytes] = []

    def content(self) -> bytes:
        graph = self.graph
        for op in graph.ops:
            self.operation(op)
        body = b"".join(_field(1, node) for node in self.nodes) + _field(2, "feather")
        body += b"".join(_field(5, weight) for weight in self.weights)
        body += _field(11, _value_info(graph.input, graph.shapes[graph.input]))
        body += _field(12, _value_info(graph.output, graph.shapes[graph.output]))
        opset = _field(1, "") + _field(2, 17)
        return _field(1, 8) + _field(2, "feather") + _field(7, body) + _field(8, opset)

    def weight(self, name: str, array: NDArray[np.float32]) -> str:
        sizes = b"".join(_field(1, size) for size in array.shape)
        self.weights.append(sizes + _field(2, _FLOAT) + _field(8, name) + _field(9, array.astype("<f4").tobytes()))
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        content = b"".join(_field(1, name) for name in inputs) + _field(2, output) + _field(4, kind)
        content += _field(3, output)
        self.nodes.append(content + b"".join(_field(5, _attribute(k, v)) for k, v in attributes.items()))
        return output

    def operation(self, op: Op) -> None:
        source = op.inputs[0]
        match op:
            case Conv():
                names = [
                    source,
                    self.weight(f"{op.output}.weight", op.weight),
                    self.weight(f"{op.output}.bias", op.bias),
                ]
                (top, left), (height, width) = op.window.padding, op.window.kernel
                x = self.node(
                    "Conv", names, self.inner(op, 0),
                    kernel_shape=[height, width], strides=op.window.stride, dilations=op.window.dilation,
                    pads=[top, left, top, left], group=op.groups,
                )  # fmt: skip
                self.finish(op, x, op.residual, op.activation)
            case Linear():
                names = [
                    source,
                    self.weight(f"{op.output}.weight", op.weight),
                    self.weight(f"{op.output}.bias", op.bias),
                ]
                x = self.node("Gemm", names, self.inner(op, 0), transB=1)
                self.finish(op, x, op.residual, op.activation)
            case Pointwise():
                shape = (-1,) + (1,) * (len(self.graph.shapes[op.output]) - 1)
                x = source
                if not ((op.scale == 1).all() and (op.shift == 0).all()):
                    scale = self.weight(f"{op.output}.scale", op.scale.reshape(shape))
                    shift = self.weight(f"{op.output}.shift", op.shift.reshape(shape))
                    x = self.node("Mul", [x, scale], self.inner(op, 1))
                    x = self.node("Add", [x, shift], self.inner(op, 2))
                self.finish(op, x, op.inputs[1] if len(op.inputs) == 2 else None, op.activation)
            case MaxPool():
                self.node("MaxPool", [source], op.output, **self.window(op, op.window))
            case AvgPool():
                area = math.prod(op.window.kernel)
                options = self.window(op, op.window)
                del options["dilations"]
                x = self.node("AveragePool", [source], self.inner(op, 0), count_include_pad=1, **options)
                if (op.divisors == area).all():
                    self.finish(op, x, None, None)
                else:
                    factor = self.weight(f"{op.output}.factor", (area / op.divisors).astype(np.float32))
                    self.node("Mul", [x, factor], op.output)
            case GlobalAvg():
                self.node("Flatten", [self.node("GlobalAveragePool", [source], self.inner(op, 0))], op.output, axis=1)
            case Concat():
                self.node("Concat", op.inputs, op.output, axis=1)
            case Flatten():
                self.node("Flatten", [source], op.output, axis=1)
            case Softmax():
                self.node("Softmax", [source], op.output, axis=1)
            case _:
                raise TypeError(type(op).__name__)

    @staticmethod
    def inner(op: Op, stage: int) -> str:
        return f"{op.output}.{stage}"

    def finish(self, op: Op, x: str, residual: str | None, activation: Activation | None) -> None:
        """Addition and activation, under the operation's own name at the end."""
        if residual is not None:
            x = self.node("Add", [x, residual], op.output if activation is None else self.inner(op, 3))
        if activation is None:
            if residual is None:
                self.node("Identity", [x], op.output)
        elif activation == Activation():
            self.node("Relu", [x], op.output)
        elif activation.kind == "hardswish":
            self.node("HardSwish", [x], op.output)
        else:
            bounds = [
                self.weight(f"{op.output}.{name}", np.asarray(value, np.float32)) if math.isfinite(value) else ""
                for name, value in (("low", activation.low), ("high", activation.high))
            ]
            self.node("Clip", [x, *bounds], op.output)

    def window(self, op: Op, window: Window) -> dict[str, Any]:
        """Attributes of a pooling whose windows may overhang: padded behind until the output has its size."""
        size, out = self.graph.shapes[op.inputs[0]][1:], self.graph.shapes[op.output][1:]
        behind = [
            max(
                0,
                (out[i] - 1) * window.stride[i]
                + window.dilation[i] * (window.kernel[i] - 1)
                + 1
                - size[i]
                - window.padding[i],
            )
            for i in range(2)
        ]
        return {
            "kernel_shape": window.kernel,
            "strides": window.stride,
            "dilations": window.dilation,
            "pads": [*window.padding, *behind],
        }


def save(graph: Graph, path: str | Path) -> None:
    """Write a fused graph."""
    Path(path).write_bytes(_Writer(graph).content())


def weights(path: str | Path) -> dict[str, NDArray[np.float32]]:
    """The float32 weights that an ONNX file holds, by name.

    Raises:
        DeployError: the file cannot be read or is no ONNX file.
    """
    try:
        content = Path(path).read_bytes()
        model = [value for number, value in _fields(content) if number == 7]
        found = {}
        for number, value in _fields(model[0]):
            if number == 5:
                parts = list(_fields(value))
                shape = [part for number, part in parts if number == 1]
                name = next(part for number, part in parts if number == 8).decode()
                raw = next((part for number, part in parts if number == 9), b"")
                found[name] = np.frombuffer(raw, "<f4").reshape(shape)
        return found
    except OSError as error:
        raise DeployError(f"{path} cannot be read ({error.strerror})") from None
    except (IndexError, ValueError, StopIteration, AttributeError, TypeError):
        raise DeployError(f"{path} is no ONNX file") from None


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of a message: integers, or the bytes of what has a length."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = content[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(content):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
        elif kind == 5:
            at += 4
        elif kind == 1:
            at += 8
        elif kind == 2:
            size = varint()
            if at + size > len(content):
                raise ValueError("truncated")
            at += size
            yield key >> 3, content[at - size : at]
        else:
            raise ValueError("unknown wire type")
