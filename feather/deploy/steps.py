"""The body of the C function of each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from feather.deploy import costs, helpers
from feather.deploy.kernels import ConvKernel, MaxKernel, PointwiseKernel, activate_scalar, literal
from feather.deploy.program import (
    ConvStep,
    FlattenStep,
    InputStep,
    LinearStep,
    MaxStep,
    MeanStep,
    OutputStep,
    PointwiseStep,
    SoftmaxStep,
    Step,
    Vector,
    ViewStep,
)
from feather.deploy.writer import Writer


def _convolution(writer: Writer, step: ConvStep) -> str:
    grid, program = step.target.grid, writer.program
    text = writer.lead(step.target)
    finish = "" if grid.dense else "mask"
    scale = "0"
    if step.scale is not None:
        finish = "scale"
        scale = f"DATA(f32, {writer.data.add(step.scale, 64)})"
    mask = f"DATA(i32, {writer.mask(grid)})" if finish else "0"
    for rows in step.rows:
        index = "u16" if rows.offsets.max(initial=0) < 2**16 else "u32"
        offsets = writer.data.add(rows.offsets.astype(np.uint16 if index == "u16" else np.uint32))
        own = slice(rows.first, rows.first + rows.blocks * rows.block)
        factors = "0" if step.factors is None else f"DATA(f32, {writer.data.add(step.factors[own])})"
        tables = (
            f"DATA({index}, {offsets}), {writer.weights(rows.weights, step.factors)}, "
            f"DATA(u32, {writer.data.add(rows.pointers)}), DATA(f32, {writer.data.add(step.bias[own])}), {factors}"
        )
        out = f"{writer.at(step.target)} + {rows.first * grid.stride}"
        res = "0" if step.residual is None else f"{writer.at(step.residual)} + {rows.first * grid.stride}"
        body, done, tiles = [], 0, 0
        in_row = grid.pitch // grid.vector
        for vectors, count in costs.tiles(program.target, grid, rows.block, rows.shifts != (0,)):
            kernel = ConvKernel(
                grid.vector, vectors, rows.block, index, step.residual is not None, step.activation, finish,
                step.factors is not None, rows.shifts, in_row,
            )  # fmt: skip
            name = writer.kernel(kernel)
            size = vectors * grid.vector
            at = f"{done} + (tile - {tiles}) * {size}"
            arguments = (
                f"W + {step.source.buffer.offset} + {at}, {out} + {at}, {_shift(res, at)}, "
                f"{tables}, {_shift(mask, at)}, {_shift(scale, at)}, {grid.stride}, first, last"
            )
            body.append((count, f"{name}({arguments});"))
            done += count * size
            tiles += count
        first = f"{rows.first} + first * {rows.block}"
        last = f"{rows.first} + last * {rows.block}"
        text += writer.jobs(body, rows.blocks, writer.borders(step.target, first, last, "      "))
    return text


def _max_pool(writer: Writer, step: MaxStep) -> str:
    grid = step.target.grid
    shifts, lists = tuple(step.offsets), list(step.offsets.values())
    offsets = f"DATA(i32, {writer.data.add(np.concatenate(lists).astype(np.int32))})"
    pointers = f"DATA(i32, {writer.data.add(np.cumsum([0, *map(len, lists)]).astype(np.int32))})"
    mask = "0" if grid.dense else f"DATA(i32, {writer.mask(grid)})"
    body, done, tiles = [], 0, 0
    for vectors, count in costs.tiles(writer.program.target, grid, 1, shifts != (0,)):
        name = writer.kernel(MaxKernel(grid.vector, vectors, not grid.dense, shifts, grid.pitch // grid.vector))
        size = vectors * grid.vector
        at = f"{done} + (tile - {tiles}) * {size}"
        body.append(
            (
                count,
                f"{name}({writer.at(step.source)} + {at}, {writer.at(step.target)} + {at}, {offsets}, "
                f"{pointers}, {_shift(mask, at)}, {step.channel_stride}, "
                f"{grid.stride}, first, last);",
            )
        )
        done += count * size
        tiles += count
    borders = writer.borders(step.target, "first", "last", "      ")
    return writer.lead(step.target) + writer.jobs(body, step.target.channels, borders)


def _pointwise(writer: Writer, step: PointwiseStep) -> str:
    affine = step.scale is not None
    scale, shift = (
        f"DATA(f32, {writer.data.add(table)})" if table is not None else "0" for table in (step.scale, step.shift)
    )
    source, target = step.source, step.target
    if isinstance(target, Vector):
        lines = [f"      f32 x = ({writer.at(source)})[n * {target.features} + i];"]
        if affine:
            lines.append(f"      x = x * {scale}[i] + {shift}[i];")
        if step.other is not None:
            lines.append(f"      x += ({writer.at(step.other)})[n * {target.features} + i];")
        lines += ["      " + line for line in activate_scalar(step.activation, "x")]
        lines.append(f"      ({writer.at(target)})[n * {target.features} + i] = x;")
        return (
            f"  for (int n = 0; n < {writer.program.batch}; ++n)\n"
            f"    for (int i = 0; i < {target.features}; ++i) {{\n" + "\n".join(lines) + "\n    }\n"
        )
    grid = target.grid
    name = writer.kernel(PointwiseKernel(grid.vector, affine, step.other is not None, step.activation, not grid.dense))
    other = "0" if step.other is None else writer.at(step.other)
    mask = "0" if grid.dense else f"DATA(i32, {writer.mask(grid)})"
    call = (
        f"{name}({writer.at(source)}, {other}, {writer.at(target)}, {scale}, {shift}, {mask}, {grid.stride}, "
        f"{grid.vectors}, first, last);"
    )
    borders = writer.borders(target, "first", "last", "      ")
    return writer.lead(target) + writer.jobs([(1, call)], target.channels, borders)


def _view(writer: Writer, step: ViewStep) -> str:
    channels, height, width = step.size
    grid = step.target.grid
    if step.source is None:
        source, image, plane, pitch = "input", channels * height * width, height * width, width
    else:
        own = step.source.grid
        source, image, plane, pitch = writer.at(step.source), own.rows * own.pitch, own.stride, own.pitch
    count = len(step.phases)
    fill = (
        f"fill(p, {grid.stride}, {literal(step.fill)});" if step.fill else f"__builtin_memset(p, 0, {4 * grid.stride});"
    )
    if step.fill:
        writer.helpers["fill"] = helpers.FILL
    writer.helpers["copy"] = helpers.COPY
    lines = ["  PARALLEL", f"  for (int c = 0; c < {channels}; ++c) {{"]
    for i, (a, b, rows, columns) in enumerate(step.phases):
        lines += [
            f"    {{ f32 *p = {writer.at(step.target)} + (long)(c * {count} + {i}) * {grid.stride};",
            f"      {fill}",
            f"      for (int n = 0; n < {writer.program.batch}; ++n)",
            f"        for (int y = 0; y < {rows}; ++y)",
            f"          copy_{min(step.stride[1], 3)}(p + (n * {grid.rows} + y) * {grid.pitch},",
            f"            {source} + (long)n * {image} + (long)c * {plane} +",
            f"            (y * {step.stride[0]} + {a}) * {pitch} + {b},",
            f"            {columns}, {step.stride[1]}); }}",
        ]
    return writer.lead(step.target, step.fill) + "\n".join(lines) + "\n  }\n"


def _mean(writer: Writer, step: MeanStep) -> str:
    grid = step.source.grid
    writer.vector_helper("sum", helpers.SUM)
    size = grid.height * grid.pitch - (grid.pitch - grid.width)
    return (
        f"  for (int n = 0; n < {grid.batch}; ++n)\n    for (int c = 0; c < {step.source.channels}; ++c)\n"
        f"      ({writer.at(step.target)})[n * {step.target.features} + c] =\n"
        f"        sum({writer.at(step.source)} + (long)c * {grid.stride} + n * {grid.rows * grid.pitch}, {size}) / "
        f"{literal(grid.height * grid.width)};\n"
    )


def _flatten(writer: Writer, step: FlattenStep) -> str:
    grid, channels = step.source.grid, step.source.channels
    target = "output" if step.target is None else writer.at(step.target)
    return (
        f"  for (int n = 0; n < {grid.batch}; ++n)\n    for (int c = 0; c < {channels}; ++c)\n"
        f"      for (int y = 0; y < {grid.height}; ++y)\n"
        f"        __builtin_memcpy({target} + ((n * {channels} + c) * {grid.height} + y) * {grid.width},\n"
        f"          {writer.at(step.source)} + (long)c * {grid.stride} + (n * {grid.rows} + y) * {grid.pitch}, "
        f"{4 * grid.width});\n"
    )


def _linear(writer: Writer, step: LinearStep) -> str:
    inputs, outputs = step.source.features, step.target.features
    weights = writer.weights(step.weights, step.factors, 64)
    kind = "f32" if step.factors is None else "i8"
    if step.pointers is not None and step.columns is not None:
        index = "u16" if inputs <= 2**16 else "u32"
        columns = writer.data.add(step.columns.astype(np.uint16 if index == "u16" else np.uint32))
        writer.helpers[f"gather_{index}"] = helpers.GATHER.replace("@", index).replace("$", kind)
        pointers = f"DATA(u32, {writer.data.add(step.pointers)})"
        value = (
            f"gather_{index}(x, DATA({index}, {columns}) + {pointers}[o], {weights} + {pointers}[o], "
            f"(int)({pointers}[o + 1] - {pointers}[o]))"
        )
    else:
        writer.vector_helper("dot", (helpers.DOT if kind == "f32" else helpers.DOT_INT8).replace("$", kind))
        value = f"dot(x, {weights} + (long)o * {inputs}, {inputs})"
    if step.factors is not None:
        value = f"{value} * DATA(f32, {writer.data.add(step.factors)})[o]"
    lines = [f"      f32 x0 = DATA(f32, {writer.data.add(step.bias)})[o] + {value};"]
    if step.residual is not None:
        lines.append(f"      x0 += ({writer.at(step.residual)})[n * {outputs} + o];")
    lines += ["      " + line for line in activate_scalar(step.activation, "x0")]
    lines.append(f"      ({writer.at(step.target)})[n * {outputs} + o] = x0;")
    return (
        f"  for (int n = 0; n < {writer.program.batch}; ++n) {{\n"
        f"    const f32 *x = {writer.at(step.source)} + n * {inputs};\n"
        f"    PARALLEL\n    for (int o = 0; o < {outputs}; ++o) {{\n" + "\n".join(lines) + "\n    }\n  }\n"
    )


def _softmax(writer: Writer, step: SoftmaxStep) -> str:
    writer.helpers["softmax"] = helpers.SOFTMAX
    size = step.source.features
    source, target = writer.at(step.source), writer.at(step.target)
    return (
        f"  for (int n = 0; n < {writer.program.batch}; ++n)\n"
        f"    softmax({source} + n * {size}, {target} + n * {size}, {size});\n"
    )


def _input(writer: Writer, step: InputStep) -> str:
    size = 4 * step.target.features * writer.program.batch
    return f"  __builtin_memcpy({writer.at(step.target)}, input, {size});\n"


def _output(writer: Writer, step: OutputStep) -> str:
    size = 4 * step.source.features * writer.program.batch
    return f"  __builtin_memcpy(output, {writer.at(step.source)}, {size});\n"


def _shift(pointer: str, by: str) -> str:
    """A pointer some floats on; "0" stays the null pointer."""
    return pointer if pointer == "0" else f"{pointer} + {by}"


_BODIES: dict[type[Step], Callable[[Writer, Any], str]] = {
    ViewStep: _view,
    ConvStep: _convolution,
    MaxStep: _max_pool,
    PointwiseStep: _pointwise,
    MeanStep: _mean,
    FlattenStep: _flatten,
    LinearStep: _linear,
    SoftmaxStep: _softmax,
    InputStep: _input,
    OutputStep: _output,
}


def body(writer: Writer, step: Step) -> str:
    """Statements on the parameters ``input``, ``output`` and ``W``, the workspace."""
    return "  (void)input; (void)output; (void)W;\n" + _BODIES[type(step)](writer, step)
