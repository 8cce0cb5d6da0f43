"""From a torch module to a `Graph`, by torch.export. What has no translation is refused with the layer's name."""

from __future__ import annotations

import operator

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from feather.deploy.errors import DeployError
from feather.deploy.graph import Array, Graph, Shape
from feather.deploy.layers import HANDLERS
from feather.deploy.trace import Trace, operation_of, refuse, shape_of


def capture(model: nn.Module | ExportedProgram, input_shape: Shape) -> Graph:
    """Trace ``model`` in eval mode.

    Args:
        model: a module on any device (it is left as it was), or what ``torch.export.export`` returned for one sample.
        input_shape: of one sample: ``(channels, height, width)`` or ``(features,)``.

    Raises:
        DeployError: a layer outside `SUPPORTED`, more than one input or output, dynamic shapes, or a wrong input shape.
    """
    program = _export(model, input_shape)
    trace = _begin(program)
    for node in program.graph.nodes:
        if node.op == "call_function":
            _translate(trace, node)
        elif node.op == "output":
            results = [arg for arg in node.args[0] if isinstance(arg, Node)]
            if len(results) != 1 or len(node.args[0]) != 1:
                raise DeployError(f"The model has {len(node.args[0])} outputs: expected one tensor")
            trace.result.output = trace.value(results[0], node)
    if trace.result.output == "input":
        raise DeployError("The model returns its input: there is nothing to compile")
    return trace.result


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


def _begin(program: ExportedProgram) -> Trace:
    constants = _constants(program)
    inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.name not in constants]
    if len(inputs) != 1 or not isinstance(inputs[0].meta.get("val"), Tensor):
        raise DeployError(f"The model has {len(inputs)} inputs: expected one tensor")
    dtype = inputs[0].meta["val"].dtype
    if not dtype.is_floating_point:
        raise DeployError(f"The model's input is {dtype}: expected floating point")
    return Trace(constants, inputs[0].name, shape_of(inputs[0]))


def _constants(program: ExportedProgram) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT or spec.target is None:
            continue
        tensor = program.state_dict.get(spec.target, program.constants.get(spec.target))
        name = getattr(spec.arg, "name", None)
        if isinstance(tensor, Tensor) and name is not None:
            found[name] = np.ascontiguousarray(tensor.detach().to("cpu", torch.float32).numpy())
    return found


def _translate(trace: Trace, node: Node) -> None:
    if node.target is operator.getitem:
        source, index = node.args
        if index != 0:
            refuse(node)
        trace.values[node.name] = trace.value(source, node)
        return
    name = operation_of(node).split(".")[0]
    handler = HANDLERS.get(name) or HANDLERS.get(name.removesuffix("_"))
    if handler is None:
        refuse(node)
    handler(trace, node)
