"""How each operation of torch becomes operations of a `Graph`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch.fx import Node

from feather.deploy.graph import (
    Activation,
    Array,
    AvgPool,
    Concat,
    Conv,
    Flatten,
    GlobalAvg,
    Linear,
    MaxPool,
    Softmax,
    Window,
)
from feather.deploy.trace import Trace, layer_of, operation_of, refuse, shape_of


def _pair(value: Any) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[-1])


def _bias(trace: Trace, node: Node, bias: Any, weight: Array) -> Array:
    return np.zeros(len(weight), np.float32) if bias is None else trace.constant(bias, node)


def _convolution(trace: Trace, node: Node) -> None:
    x, w, b, stride, padding, dilation, groups = trace.arguments(
        node, "input weight bias stride padding dilation groups", None, 1, 0, 1, 1
    )
    source, weight = trace.value(x, node), trace.constant(w, node)
    bias = _bias(trace, node, b, weight)
    kernel, stride, dilation = _pair(weight.shape[2:]), _pair(stride), _pair(dilation)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(t % 2 for t in total):
            refuse(node, "pads one side more than the other (padding='same' with an even kernel)")
        padding = [t // 2 for t in total]
    window = Window(kernel, stride, _pair(padding), dilation)
    if trace.is_vector(source):  # behind a global pooling: only the middle tap meets data
        tap = [p // d if p % d == 0 else None for p, d in zip(window.padding, dilation, strict=True)]
        if shape_of(node)[1:] != (1, 1) or groups != 1 or None in tap:
            refuse(node, "is a convolution of a single pixel that is not a plain linear layer")
        trace.emit_vector(
            node,
            Linear(layer_of(node), [source], node.name, np.ascontiguousarray(weight[:, :, tap[0], tap[1]]), bias),
        )
        return
    trace.emit(node, Conv(layer_of(node), [source], node.name, weight, bias, window, groups))


def _linear(trace: Trace, node: Node) -> None:
    x, w, b = trace.arguments(node, "input weight bias", None)
    source, weight, bias = trace.value(x, node), trace.constant(w, node), trace.constant(b, node)
    if not trace.is_vector(source):
        refuse(node, "is a Linear on a map: flatten it first")
    if bias is None:
        bias = np.zeros(weight.shape[0], np.float32)
    trace.emit_vector(node, Linear(layer_of(node), [source], node.name, weight, bias))


def _batch_norm(trace: Trace, node: Node) -> None:
    if operation_of(node).startswith("batch_norm"):
        x, w, b, mean, var, training, _, eps, _ = trace.arguments(
            node, "input weight bias mean var training momentum eps cudnn", False
        )
        if training:
            refuse(node, "is a BatchNorm in training mode: export the model in eval mode")
    else:
        x, w, b, mean, var, _, eps = trace.arguments(node, "input weight bias mean var momentum eps")
    source = trace.value(x, node)
    if mean is None or var is None:
        refuse(node, "is a BatchNorm without running statistics")
    center, spread = trace.constant(mean, node), trace.constant(var, node)
    scale = 1 / np.sqrt(spread.astype(np.float64) + eps)
    if w is not None:
        scale = scale * trace.constant(w, node)
    shift = -center * scale + (0 if b is None else trace.constant(b, node))
    trace.pointwise(node, [source], scale, shift)


def _activate(trace: Trace, node: Node, activation: Activation) -> None:
    trace.pointwise(node, [trace.value(node.args[0], node)], activation=activation)


def _hardtanh(trace: Trace, node: Node) -> None:
    _, low, high = trace.arguments(node, "input min_val max_val", -1.0, 1.0)
    _activate(trace, node, Activation("clamp", float(low), float(high)))


def _clamp(trace: Trace, node: Node) -> None:
    _, low, high = trace.arguments(node, "input min max", None, None)
    if isinstance(low, Node) or isinstance(high, Node):
        refuse(node, "clamps to computed bounds")
    _activate(
        trace,
        node,
        Activation("clamp", -math.inf if low is None else float(low), math.inf if high is None else float(high)),
    )


def _add(trace: Trace, node: Node) -> None:
    if node.kwargs.get("alpha", 1) != 1:
        refuse(node, "adds a multiple (alpha)")
    left, right = (trace.value(arg, node) for arg in node.args[:2])
    if trace.result.shapes[left] != trace.result.shapes[right]:
        refuse(node, f"adds shapes {trace.result.shapes[left]} and {trace.result.shapes[right]}")
    trace.pointwise(node, [left, right])


def _concatenate(trace: Trace, node: Node) -> None:
    parts, dim = trace.arguments(node, "tensors dim", 0)
    values = [trace.value(part, node) for part in parts]
    if dim not in (1, -3) or any(trace.is_vector(value) for value in values):
        refuse(node, f"concatenates along dimension {dim}, not maps along their channels")
    if len(values) == 1:
        trace.values[node.name] = values[0]
        return
    trace.emit(node, Concat(layer_of(node), values, node.name))


def _max_pool(trace: Trace, node: Node) -> None:
    x, kernel, stride, padding, dilation, ceil = trace.arguments(
        node, "input kernel_size stride padding dilation ceil_mode", [], 0, 1, False
    )
    source = trace.spatial(x, node)
    window = Window(_pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation))
    del ceil  # the output's size says it; windows that overhang read only cells that do not count
    trace.emit(node, MaxPool(layer_of(node), [source], node.name, window))


def _avg_pool(trace: Trace, node: Node) -> None:
    x, kernel, stride, padding, _, include, override = trace.arguments(
        node,
        "input kernel_size stride padding ceil_mode count_include_pad divisor_override",
        [], 0, False, True, None,
    )  # fmt: skip
    source = trace.spatial(x, node)
    window = Window(_pair(kernel), _pair(stride or kernel), _pair(padding))
    rows, columns = (
        _counts(size, out, window.kernel[i], window.stride[i], window.padding[i], include)
        for i, (size, out) in enumerate(zip(trace.result.shapes[source][1:], shape_of(node)[1:], strict=True))
    )
    divisors = np.outer(rows, columns).astype(np.float32)
    if override is not None:
        divisors = np.full_like(divisors, override)
    trace.emit(node, AvgPool(layer_of(node), [source], node.name, window, divisors))


def _adaptive_avg_pool(trace: Trace, node: Node) -> None:
    if trace.is_vector(trace.value(node.args[0], node)):
        trace.same(node)
        return
    source = trace.spatial(node.args[0], node)
    size, target = trace.result.shapes[source][1:], shape_of(node)[1:]
    if target == (1, 1):
        trace.emit_vector(node, GlobalAvg(layer_of(node), [source], node.name))
        return
    if any(s % t for s, t in zip(size, target, strict=True)):
        refuse(node, f"pools {size} to {target}, which does not divide it")
    step = (size[0] // target[0], size[1] // target[1])
    divisors = np.full(target, step[0] * step[1], np.float32)
    trace.emit(node, AvgPool(layer_of(node), [source], node.name, Window(step, step), divisors))


def _mean(trace: Trace, node: Node) -> None:
    x, dims = trace.arguments(node, "input dim")
    source = trace.spatial(x, node)
    if sorted(d % 4 for d in dims) != [2, 3]:
        refuse(node, f"averages over dimensions {dims}, not over rows and columns")
    trace.emit_vector(node, GlobalAvg(layer_of(node), [source], node.name))


def _softmax(trace: Trace, node: Node) -> None:
    source, dim = trace.value(node.args[0], node), node.args[1]
    if not trace.is_vector(source) or dim not in (1, -1):
        refuse(node, "is a Softmax over anything but the features of a vector")
    trace.emit_vector(node, Softmax(layer_of(node), [source], node.name))


def _reshape(trace: Trace, node: Node) -> None:
    source = trace.value(node.args[0], node)
    shape, target = trace.result.shapes[source], shape_of(node)
    if shape == target or (len(shape) == 1 and target[1:] in ((), (1, 1))):
        trace.same(node)
    elif len(shape) == 3 and len(target) == 1:
        trace.emit_vector(node, Flatten(layer_of(node), [source], node.name))
    else:
        refuse(node, f"reshapes {shape} to {target}")


def _counts(size: int, out: int, kernel: int, stride: int, padding: int, include_padding: bool) -> list[int]:
    """Cells that the average at each output position divides by, along one dimension."""
    counts = []
    for position in range(out):
        start = position * stride - padding
        end = min(start + kernel, size + padding)
        counts.append(end - start if include_padding else min(end, size) - max(start, 0))
    return counts


HANDLERS: dict[str, Callable[[Trace, Node], None]] = {
    "conv2d": _convolution,
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "relu": lambda trace, node: _activate(trace, node, Activation()),
    "relu6": lambda trace, node: _activate(trace, node, Activation(high=6.0)),
    "hardtanh": _hardtanh,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "hardswish": lambda trace, node: _activate(trace, node, Activation("hardswish")),
    "add": _add,
    "cat": _concatenate,
    "max_pool2d": _max_pool,
    "avg_pool2d": _avg_pool,
    "adaptive_avg_pool2d": _adaptive_avg_pool,
    "mean": _mean,
    "linear": _linear,
    "softmax": _softmax,
    "_softmax": _softmax,
    **dict.fromkeys(("view", "reshape", "flatten", "_unsafe_view", "squeeze"), _reshape),
    **dict.fromkeys(("dropout", "clone", "contiguous", "alias", "detach", "feature_dropout"), Trace.same),
}
"""By the name of the operation, without overload and without the underscore of those in place."""
