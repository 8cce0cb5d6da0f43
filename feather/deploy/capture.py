"""From a torch module to a `Graph`, by torch.export. What has no translation is refused with the layer's name."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from feather.deploy.errors import DeployError
from feather.deploy.graph import (
    Activation,
    Array,
    AvgPool,
    Concat,
    Conv,
    Flatten,
    GlobalAvg,
    Graph,
    Linear,
    MaxPool,
    Pointwise,
    Shape,
    Softmax,
    Window,
)

SUPPORTED = (
    "Conv2d, BatchNorm, ReLU, ReLU6, Hardtanh, Hardswish, addition, concatenation of channels, MaxPool2d, AvgPool2d, "
    "AdaptiveAvgPool2d, Linear, Flatten, Softmax and Dropout"
)


def capture(model: nn.Module | ExportedProgram, input_shape: Shape) -> Graph:
    """Trace ``model`` in eval mode.

    Args:
        model: a module on any device (it is left as it was), or what ``torch.export.export`` returned for one sample.
        input_shape: of one sample: ``(channels, height, width)`` or ``(features,)``.

    Raises:
        DeployError: a layer outside `SUPPORTED`, more than one input or output, dynamic shapes, or a wrong input shape.
    """
    return _Capture(_export(model, input_shape)).graph()


def _export(model: nn.Module | ExportedProgram, input_shape: Shape) -> ExportedProgram:
    if isinstance(model, ExportedProgram):
        return _decompose(model)
    if len(input_shape) not in (1, 3) or min(input_shape) < 1:
        raise DeployError(f"Input shape {input_shape} is none: expected (channels, height, width) or (features,)")
    parameter = next(model.parameters(), torch.zeros(()))
    example = torch.zeros(1, *input_shape, dtype=parameter.dtype, device=parameter.device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return _decompose(torch.export.export(model, (example,)))
    except Exception as error:  # torch.export raises many unrelated classes, whose texts fill pages
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise DeployError(
            f"{type(model).__name__} cannot be captured for an input of shape {tuple(input_shape)}: {reason}"
        ) from error
    finally:
        for module, training in modes:
            module.training = training


def _decompose(program: ExportedProgram) -> ExportedProgram:
    """Without in-place operations, but with whole layers."""
    functional: ExportedProgram = program.run_decompositions({})
    return functional


def _array(tensor: Tensor) -> Array:
    return np.ascontiguousarray(tensor.detach().to("cpu", torch.float32).numpy())


def _pair(value: Any) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[-1])


def _output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


class _Capture:
    """Walks an exported program once, node by node."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.constants = self._constants()
        self.values: dict[str, str] = {}  # node name -> value name; several nodes may share a value
        self.result: Graph
        self.handlers: dict[str, Callable[[Node], None]] = {
            "conv2d": self.convolution,
            "convolution": self.refuse,
            "batch_norm": self.batch_norm,
            "_native_batch_norm_legit_no_training": self.batch_norm,
            "relu": lambda node: self.activation(node, Activation()),
            "relu6": lambda node: self.activation(node, Activation(high=6.0)),
            "hardtanh": self.hardtanh,
            "clamp": self.clamp,
            "clamp_min": self.clamp,
            "hardswish": lambda node: self.activation(node, Activation("hardswish")),
            "add": self.add,
            "cat": self.concatenate,
            "max_pool2d": self.max_pool,
            "avg_pool2d": self.avg_pool,
            "adaptive_avg_pool2d": self.adaptive_avg_pool,
            "mean": self.mean,
            "linear": self.linear,
            "softmax": self.softmax,
            "_softmax": self.softmax,
            **dict.fromkeys(("view", "reshape", "flatten", "_unsafe_view", "squeeze"), self.reshape),
            **dict.fromkeys(("dropout", "clone", "contiguous", "alias", "detach", "feature_dropout"), self.same),
        }

    def graph(self) -> Graph:
        """Translate every node."""
        placeholders = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        inputs = [node for node in placeholders if node.name not in self.constants]
        if len(inputs) != 1 or not isinstance(inputs[0].meta.get("val"), Tensor):
            raise DeployError(f"The model has {len(inputs)} inputs: expected one tensor")
        shape = self.shape_of(inputs[0])
        if not inputs[0].meta["val"].dtype.is_floating_point:
            raise DeployError(f"The model's input is {inputs[0].meta['val'].dtype}: expected floating point")
        self.result = Graph("input", "", {"input": shape})
        self.values[inputs[0].name] = "input"
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self.translate(node)
            elif node.op == "output":
                results = [arg for arg in node.args[0] if isinstance(arg, Node)]
                if len(results) != 1 or len(node.args[0]) != 1:
                    raise DeployError(f"The model has {len(node.args[0])} outputs: expected one tensor")
                self.result.output = self.value(results[0], node)
        if self.result.output == "input":
            raise DeployError("The model returns its input: there is nothing to compile")
        return self.result

    def _constants(self) -> dict[str, Array]:
        found: dict[str, Array] = {}
        program = self.program
        for spec in program.graph_signature.input_specs:
            if spec.kind == InputKind.USER_INPUT or spec.target is None:
                continue
            tensor = program.state_dict.get(spec.target, program.constants.get(spec.target))
            name = getattr(spec.arg, "name", None)
            if isinstance(tensor, Tensor) and name is not None:
                found[name] = _array(tensor)
        return found

    # -- helpers ------------------------------------------------------------------------------------------------------

    def layer(self, node: Node) -> str:
        """The innermost module that the node came from, or the node's own name."""
        stack = node.meta.get("nn_module_stack") or {}
        paths = [path for path, _ in stack.values() if path]
        return str(paths[-1]) if paths else node.name

    def refuse(self, node: Node, why: str = "") -> None:
        stack = node.meta.get("nn_module_stack") or {}
        kind = str(list(stack.values())[-1][1]).rsplit(".", 1)[-1].strip("'>") if stack else ""
        where = f"Layer {self.layer(node)}" + (f" ({kind})" if kind else "")
        what = why or f"computes {self.operation(node)}, which has no C translation"
        raise DeployError(f"{where} {what}; supported are {SUPPORTED}")

    @staticmethod
    def operation(node: Node) -> str:
        target = node.target
        return target if isinstance(target, str) else getattr(target, "__name__", str(target))

    def translate(self, node: Node) -> None:
        if node.target is operator.getitem:
            source, index = node.args
            if index != 0 or not isinstance(source, Node):
                self.refuse(node)
            assert isinstance(source, Node)
            self.values[node.name] = self.value(source, node)
            return
        name = self.operation(node).split(".")[0]
        handler = self.handlers.get(name) or self.handlers.get(name.removesuffix("_"))
        if handler is None:
            self.refuse(node)
            return
        handler(node)

    def value(self, arg: Any, node: Node) -> str:
        if not isinstance(arg, Node) or arg.name not in self.values:
            self.refuse(node, f"uses {getattr(arg, 'name', arg)} as an activation, which is none")
        return self.values[arg.name]

    def constant(self, arg: Any, node: Node) -> Array | None:
        if arg is None:
            return None
        if not isinstance(arg, Node) or arg.name not in self.constants:
            self.refuse(node, "computes its weights on the way, which has no C translation")
        return self.constants[arg.name]

    def shape_of(self, node: Node) -> Shape:
        """Shape of one sample; a batch that is not one and symbolic sizes are refused."""
        meta = node.meta["val"]
        tensor = meta[0] if isinstance(meta, tuple | list) else meta
        sizes = list(tensor.shape)
        if not all(isinstance(size, int) for size in sizes):
            raise DeployError("The model was exported with dynamic shapes: export it for one sample of fixed size")
        if len(sizes) not in (2, 4) or sizes[0] != 1:
            self.refuse(node, f"gives a tensor of shape {tuple(sizes)}, not one map or vector for one sample")
        return tuple(sizes[1:])

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
        self.result.shapes.setdefault(op.output, self.sample_shape(node))

    def sample_shape(self, node: Node) -> Shape:
        return self.shape_of(node)

    def is_vector(self, value: str) -> bool:
        return len(self.result.shapes[value]) == 1

    # -- layers -------------------------------------------------------------------------------------------------------

    def convolution(self, node: Node) -> None:
        x, w, b, stride, padding, dilation, groups = self.arguments(
            node, "input weight bias stride padding dilation groups", None, 1, 0, 1, 1
        )
        source, weight, bias = self.value(x, node), self.constant(w, node), self.constant(b, node)
        assert weight is not None
        if bias is None:
            bias = np.zeros(weight.shape[0], np.float32)
        kernel, stride, dilation = _pair(weight.shape[2:]), _pair(stride), _pair(dilation)
        if padding == "valid":
            padding = 0
        elif padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            if any(t % 2 for t in total):
                self.refuse(node, "pads one side more than the other (padding='same' with an even kernel)")
            padding = [t // 2 for t in total]
        window = Window(kernel, stride, _pair(padding), dilation)
        if self.is_vector(source):  # behind a global pooling: only the middle tap meets data
            tap = [p // d if p % d == 0 else None for p, d in zip(window.padding, dilation, strict=True)]
            if self.shape_of(node)[1:] != (1, 1) or groups != 1 or None in tap:
                self.refuse(node, "is a convolution of a single pixel that is not a plain linear layer")
            self.emit_vector(
                node,
                Linear(self.layer(node), [source], node.name, np.ascontiguousarray(weight[:, :, tap[0], tap[1]]), bias),
            )
            return
        self.emit(node, Conv(self.layer(node), [source], node.name, weight, bias, window, groups))

    def emit_vector(self, node: Node, op: Any) -> None:
        """Append an operation with a vector result, whatever ones the torch shape ends in."""
        self.result.shapes[op.output] = (math.prod(self.shape_of(node)),)
        self.emit(node, op)

    def linear(self, node: Node) -> None:
        x, w, b = self.arguments(node, "input weight bias", None)
        source, weight, bias = self.value(x, node), self.constant(w, node), self.constant(b, node)
        assert weight is not None
        if not self.is_vector(source):
            self.refuse(node, "is a Linear on a map: flatten it first")
        if bias is None:
            bias = np.zeros(weight.shape[0], np.float32)
        self.emit_vector(node, Linear(self.layer(node), [source], node.name, weight, bias))

    def batch_norm(self, node: Node) -> None:
        if self.operation(node).startswith("batch_norm"):
            x, w, b, mean, var, training, _, eps, _ = self.arguments(
                node, "input weight bias mean var training momentum eps cudnn", False
            )
            if training:
                self.refuse(node, "is a BatchNorm in training mode: export the model in eval mode")
        else:
            x, w, b, mean, var, _, eps = self.arguments(node, "input weight bias mean var momentum eps")
        source = self.value(x, node)
        center, spread = self.constant(mean, node), self.constant(var, node)
        if center is None or spread is None:
            self.refuse(node, "is a BatchNorm without running statistics")
        assert center is not None
        assert spread is not None
        weight, bias = self.constant(w, node), self.constant(b, node)
        scale = 1 / np.sqrt(spread.astype(np.float64) + eps)
        if weight is not None:
            scale = scale * weight
        shift = -center * scale + (0 if bias is None else bias)
        self.pointwise(node, [source], scale, shift)

    def pointwise(
        self, node: Node, inputs: list[str], scale: Any = None, shift: Any = None, activation: Activation | None = None
    ) -> None:
        shape = self.result.shapes[inputs[0]]
        scale = np.ones(shape[0]) if scale is None else scale
        shift = np.zeros(shape[0]) if shift is None else shift
        self.result.shapes[node.name] = shape
        # float64 until `fuse` has multiplied it into weights: one rounding, not two
        self.emit(node, Pointwise(self.layer(node), inputs, node.name, scale, shift, activation))

    def activation(self, node: Node, activation: Activation) -> None:
        self.pointwise(node, [self.value(node.args[0], node)], activation=activation)

    def hardtanh(self, node: Node) -> None:
        _, low, high = self.arguments(node, "input min_val max_val", -1.0, 1.0)
        self.activation(node, Activation("clamp", float(low), float(high)))

    def clamp(self, node: Node) -> None:
        _, low, high = self.arguments(node, "input min max", None, None)
        if isinstance(low, Node) or isinstance(high, Node):
            self.refuse(node, "clamps to computed bounds")
        self.activation(
            node,
            Activation("clamp", -math.inf if low is None else float(low), math.inf if high is None else float(high)),
        )

    def add(self, node: Node) -> None:
        if node.kwargs.get("alpha", 1) != 1:
            self.refuse(node, "adds a multiple (alpha)")
        left, right = (self.value(arg, node) for arg in node.args[:2])
        if self.result.shapes[left] != self.result.shapes[right]:
            self.refuse(node, f"adds shapes {self.result.shapes[left]} and {self.result.shapes[right]}")
        self.pointwise(node, [left, right])

    def concatenate(self, node: Node) -> None:
        parts, dim = self.arguments(node, "tensors dim", 0)
        values = [self.value(part, node) for part in parts]
        if dim not in (1, -3) or any(self.is_vector(value) for value in values):
            self.refuse(node, f"concatenates along dimension {dim}, not maps along their channels")
        if len(values) == 1:
            self.values[node.name] = values[0]
            return
        self.emit(node, Concat(self.layer(node), values, node.name))

    def max_pool(self, node: Node) -> None:
        x, kernel, stride, padding, dilation, ceil = self.arguments(
            node, "input kernel_size stride padding dilation ceil_mode", [], 0, 1, False
        )
        source = self.spatial(x, node)
        window = Window(_pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation))
        del ceil  # the output's size says it; windows that overhang read only cells that do not count
        self.emit(node, MaxPool(self.layer(node), [source], node.name, window))

    def avg_pool(self, node: Node) -> None:
        x, kernel, stride, padding, _, include, override = self.arguments(
            node,
            "input kernel_size stride padding ceil_mode count_include_pad divisor_override",
            [], 0, False, True, None,
        )  # fmt: skip
        source = self.spatial(x, node)
        window = Window(_pair(kernel), _pair(stride or kernel), _pair(padding))
        rows, columns = (
            _counts(size, out, window.kernel[i], window.stride[i], window.padding[i], include)
            for i, (size, out) in enumerate(zip(self.result.shapes[source][1:], self.shape_of(node)[1:], strict=True))
        )
        divisors = np.outer(rows, columns).astype(np.float32)
        if override is not None:
            divisors = np.full_like(divisors, override)
        self.emit(node, AvgPool(self.layer(node), [source], node.name, window, divisors))

    def adaptive_avg_pool(self, node: Node) -> None:
        source = self.spatial(node.args[0], node, vector_is_same=True)
        if self.is_vector(source):
            self.same(node)
            return
        size, target = self.result.shapes[source][1:], self.shape_of(node)[1:]
        if target == (1, 1):
            self.emit_vector(node, GlobalAvg(self.layer(node), [source], node.name))
            return
        if any(s % t for s, t in zip(size, target, strict=True)):
            self.refuse(node, f"pools {size} to {target}, which does not divide it")
        step = (size[0] // target[0], size[1] // target[1])
        divisors = np.full(target, step[0] * step[1], np.float32)
        self.emit(node, AvgPool(self.layer(node), [source], node.name, Window(step, step), divisors))

    def mean(self, node: Node) -> None:
        x, dims = self.arguments(node, "input dim")
        source = self.spatial(x, node)
        if sorted(d % 4 for d in dims) != [2, 3]:
            self.refuse(node, f"averages over dimensions {dims}, not over rows and columns")
        self.emit_vector(node, GlobalAvg(self.layer(node), [source], node.name))

    def spatial(self, arg: Any, node: Node, vector_is_same: bool = False) -> str:
        value = self.value(arg, node)
        if self.is_vector(value) and not vector_is_same:
            self.refuse(node, "pools a vector")
        return value

    def softmax(self, node: Node) -> None:
        source, dim = self.value(node.args[0], node), node.args[1]
        if not self.is_vector(source) or dim not in (1, -1):
            self.refuse(node, "is a Softmax over anything but the features of a vector")
        self.emit_vector(node, Softmax(self.layer(node), [source], node.name))

    def reshape(self, node: Node) -> None:
        source = self.value(node.args[0], node)
        shape, target = self.result.shapes[source], self.shape_of(node)
        if shape == target or (len(shape) == 1 and target[1:] in ((), (1, 1))):
            self.same(node)
        elif len(shape) == 3 and len(target) == 1:
            self.emit_vector(node, Flatten(self.layer(node), [source], node.name))
        else:
            self.refuse(node, f"reshapes {shape} to {target}")

    def same(self, node: Node) -> None:
        self.values[node.name] = self.value(node.args[0], node)


def _counts(size: int, out: int, kernel: int, stride: int, padding: int, include_padding: bool) -> list[int]:
    """Cells that the average at each output position divides by, along one dimension."""
    counts = []
    for position in range(out):
        start = position * stride - padding
        end = min(start + kernel, size + padding)
        counts.append(end - start if include_padding else min(end, size) - max(start, 0))
    return counts
