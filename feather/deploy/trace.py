"""The graph that grows while `capture` walks an exported program, and the questions that layers ask about a node."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import numpy as np
from torch.fx import Node

from feather.deploy.errors import DeployError
from feather.deploy.graph import Activation, Array, Graph, Pointwise, Shape

SUPPORTED = (
    "Conv2d, BatchNorm, ReLU, ReLU6, Hardtanh, Hardswish, addition, concatenation of channels, MaxPool2d, AvgPool2d, "
    "AdaptiveAvgPool2d, Linear, Flatten, Softmax and Dropout"
)


def layer_of(node: Node) -> str:
    """The innermost module that the node came from, or the node's own name."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    return str(paths[-1]) if paths else node.name


def refuse(node: Node, why: str = "") -> NoReturn:
    """Raise the error that names the node's layer."""
    stack = node.meta.get("nn_module_stack") or {}
    kind = str(list(stack.values())[-1][1]).rsplit(".", 1)[-1].strip("'>") if stack else ""
    where = f"Layer {layer_of(node)}" + (f" ({kind})" if kind else "")
    what = why or f"computes {operation_of(node)}, which has no C translation"
    raise DeployError(f"{where} {what}; supported are {SUPPORTED}")


def operation_of(node: Node) -> str:
    """Name of the torch operation."""
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def shape_of(node: Node) -> Shape:
    """Shape of one sample; a batch that is not one and symbolic sizes are refused."""
    meta = node.meta["val"]
    tensor = meta[0] if isinstance(meta, tuple | list) else meta
    sizes = list(tensor.shape)
    if not all(isinstance(size, int) for size in sizes):
        raise DeployError("The model was exported with dynamic shapes: export it for one sample of fixed size")
    if len(sizes) not in (2, 4) or sizes[0] != 1:
        refuse(node, f"gives a tensor of shape {tuple(sizes)}, not one map or vector for one sample")
    return tuple(sizes[1:])


class Trace:
    """What is known so far.

    Attributes:
        result: the graph.
        constants: weights and statistics by the name of their node.
        values: node name -> value name; several nodes may share a value.
    """

    def __init__(self, constants: dict[str, Array], source: str, shape: Shape) -> None:
        self.result = Graph("input", "", {"input": shape})
        self.constants = constants
        self.values = {source: "input"}

    def value(self, arg: Any, node: Node) -> str:
        """The value that an argument of ``node`` stands for."""
        if not isinstance(arg, Node) or arg.name not in self.values:
            refuse(node, f"uses {getattr(arg, 'name', arg)} as an activation, which is none")
        return self.values[arg.name]

    def constant(self, arg: Any, node: Node) -> Array:
        """The weights that an argument of ``node`` stands for."""
        if not isinstance(arg, Node) or arg.name not in self.constants:
            refuse(node, "computes its weights on the way, which has no C translation")
        return self.constants[arg.name]

    def arguments(self, node: Node, names: str, *defaults: Any) -> list[Any]:
        """Arguments by position or keyword; the last ``len(defaults)`` of ``names`` have defaults."""
        keys = names.split()
        values = dict(zip(keys[len(keys) - len(defaults) :], defaults, strict=True))
        values.update(zip(keys, node.args, strict=False))
        values.update({key: value for key, value in node.kwargs.items() if key in keys})
        return [values[key] for key in keys]

    def emit(self, node: Node, op: Any) -> None:
        """Append an operation whose output is the node's value."""
        self.result.ops.append(op)
        self.values[node.name] = op.output
        self.result.shapes.setdefault(op.output, shape_of(node))

    def is_vector(self, value: str) -> bool:
        return len(self.result.shapes[value]) == 1

    def emit_vector(self, node: Node, op: Any) -> None:
        """Append an operation with a vector result, whatever ones the torch shape ends in."""
        self.result.shapes[op.output] = (math.prod(shape_of(node)),)
        self.emit(node, op)

    def pointwise(
        self, node: Node, inputs: list[str], scale: Any = None, shift: Any = None, activation: Activation | None = None
    ) -> None:
        """Append ``activation(inputs[0] * scale + shift + inputs[1])``."""
        shape = self.result.shapes[inputs[0]]
        scale = np.ones(shape[0]) if scale is None else scale
        shift = np.zeros(shape[0]) if shift is None else shift
        self.result.shapes[node.name] = shape
        # float64 until `fuse` has multiplied it into weights: one rounding, not two
        self.emit(node, Pointwise(layer_of(node), inputs, node.name, scale, shift, activation))

    def same(self, node: Node) -> None:
        """The node's value is that of its first argument."""
        self.values[node.name] = self.value(node.args[0], node)

    def spatial(self, arg: Any, node: Node) -> str:
        """The map that an argument of a pooling ``node`` stands for."""
        value = self.value(arg, node)
        if self.is_vector(value):
            refuse(node, "pools a vector")
        return value
