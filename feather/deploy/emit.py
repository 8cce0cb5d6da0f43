"""A `Program` as one C file and one header."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import numpy as np

from feather.deploy import costs, helpers
from feather.deploy.errors import DeployError
from feather.deploy.graph import Array
from feather.deploy.kernels import ConvKernel, MaxKernel, PointwiseKernel, activate_scalar, literal, types
from feather.deploy.layout import Grid
from feather.deploy.program import (
    ConvStep,
    FlattenStep,
    InputStep,
    LinearStep,
    Maps,
    MaxStep,
    MeanStep,
    OutputStep,
    PointwiseStep,
    Program,
    SoftmaxStep,
    Step,
    Vector,
    ViewStep,
)

MARKER = "feather-deploy-info:"
_PLAIN = {code: chr(code) for code in range(32, 127) if chr(code) not in '"\\?'}
Normalization = tuple[tuple[float, ...], tuple[float, ...]]
_ESCAPES = [_PLAIN.get(code, f"\\{code:03o}") for code in range(256)]


@dataclass(frozen=True)
class Source:
    """The generated text and what it says of itself."""

    c: str
    header: str
    info: dict[str, object]


class _Data:
    """All constant tables in one array of bytes: compilers read a long string twelve times faster than numbers."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0
        self.known: dict[bytes, int] = {}

    def add(self, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], align: int = 4) -> int:
        """Position in bytes of the array's contents; equal contents are kept once."""
        content = array.astype(array.dtype.newbyteorder("<")).tobytes()
        key = content + bytes([align])
        if key not in self.known:
            padding = -self.size % align
            self.parts += [bytes(padding), content]
            self.known[key] = self.size + padding
            self.size += padding + len(content)
        return self.known[key]

    def text(self) -> str:
        content = b"".join(self.parts) or b"\0"
        lines = [_quote(content[start : start + 1024]) for start in range(0, len(content), 1024)]
        return "static const unsigned char data[] __attribute__((aligned(64), unused)) =\n" + "\n".join(lines) + ";\n"


def emit(program: Program, name: str, title: str, normalization: Normalization | None = None) -> Source:
    """Write the C.

    Args:
        name: prefix of the public names and of the files, a C identifier.
        title: what the file says it is, for its first line.
        normalization: (mean, deviation) of each input channel, told in the header.

    Raises:
        DeployError: ``name`` is no C identifier.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise DeployError(f"Name {name!r} is no C identifier: use letters, digits and underscores")
    return _Emitter(program, name, title, normalization).source()


class _Emitter:
    def __init__(self, program: Program, name: str, title: str, normalization: Normalization | None) -> None:
        self.program, self.name, self.title, self.normalization = program, name, title, normalization
        self.data = _Data()
        self.kernels: dict[str, str] = {}
        self.widths: set[int] = set()
        self.helpers: dict[str, str] = {}
        self.masks: dict[Grid, int] = {}

    def source(self) -> Source:
        program = self.program
        bodies = [self.step(step) for step in program.steps]
        functions = [
            f"/* {_comment(step.name)} */\nstatic void step_{i}({_PARAMETERS})\n{{\n{body}}}\n"
            for i, (step, body) in enumerate(zip(program.steps, bodies, strict=True))
        ]
        calls = "".join(f"  step_{i}(input, output, W);\n" for i in range(len(bodies)))
        info = self.info()
        head = self.head()
        upper = self.name.upper()
        feature = f'__builtin_cpu_supports("{program.target.feature}") != 0' if program.target.feature else "1"
        text_info = _quote((MARKER + json.dumps(info)).encode())
        text = [
            head,
            f'#include "{self.name}.h"\n#include <stdint.h>\n',
            self.checks(),
            "typedef float f32 __attribute__((may_alias));\ntypedef int32_t i32 __attribute__((may_alias));",
            "typedef signed char i8;",
            "typedef uint16_t u16 __attribute__((may_alias));\ntypedef uint32_t u32 __attribute__((may_alias));\n",
            helpers.THREADS.replace("@", upper),
            "#define DATA(type, at) ((const type *)(const void *)(data + (at)))",
            *(types(width) for width in sorted(self.widths)),
            self.data.text(),
            *self.helpers.values(),
            *self.kernels.values(),
            *functions,
            f"void {self.name}_run(const float *input, float *output, void *workspace)\n{{\n"
            f"  f32 *W = workspace;\n{calls}}}\n",
            f"int {self.name}_supported(void)\n{{\n  return {feature};\n}}\n",
            f"const char *{self.name}_info(void)\n{{\n  return {text_info} + {len(MARKER)};\n}}\n",
        ]
        return Source("\n".join(text), self.header(), info)

    # -- around the steps ---------------------------------------------------------------------------------------------

    def info(self) -> dict[str, object]:
        program = self.program
        return {
            "name": self.name,
            "title": self.title,
            "target": program.target.name,
            "batch": program.batch,
            "input_shape": list(program.input_shape),
            "output_shape": list(program.output_shape),
            "workspace_bytes": 4 * program.workspace,
            "constant_bytes": self.data.size,
            "nonzeros": sum(layer.nonzeros for layer in program.layers),
            "weights": sum(int(np.prod(layer.shape)) for layer in program.layers),
            "macs": sum(layer.macs for layer in program.layers),
            **({"mean": self.normalization[0], "std": self.normalization[1]} if self.normalization else {}),
        }

    def head(self) -> str:
        program, info = self.program, self.info()
        rows = [
            f"{_comment(layer.name):<32} {' x '.join(map(str, layer.shape)):>20} {layer.nonzeros:>10} {layer.macs:>12} "
            f" {layer.kernel}"
            for layer in program.layers
        ]
        columns = f"{'layer':<32} {'weights':>20} {'non-zeros':>10} {'products':>12}  kernel"
        table = "\n".join(f" * {row}" for row in [columns, *rows])
        flags = " ".join(program.target.flags)
        return (
            f"/* {_comment(self.title)}\n *\n"
            f" * Written by feather compile for target {program.target.name}; needs no library.\n"
            f" *   cc -O3 -ffp-contract=fast {flags + ' ' if flags else ''}-c {self.name}.c\n"
            f" * Add -fopenmp -D{self.name.upper()}_THREADS=n for n threads.\n *\n"
            f" * {info['nonzeros']} of {info['weights']} weights are not zero: {info['macs']} products per image.\n"
            f" * Constants {info['constant_bytes']} bytes, workspace {info['workspace_bytes']} bytes, no allocation.\n"
            f" *\n"
            f"{table}\n */\n"
        )

    def checks(self) -> str:
        target = self.program.target
        lines = [
            '#if !defined(__GNUC__)\n#error "compile this file with GCC or clang"\n#endif',
            '#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__\n#error "this file is for little-endian machines"\n#endif',
        ]
        if target.macros:
            condition = " || ".join(f"!defined({macro})" for macro in target.macros)
            advice = " ".join(target.flags) or "a compiler for " + target.machine
            lines.append(f'#if {condition}\n#error "compile this file with {advice}"\n#endif')
        return "\n".join(lines) + "\n"

    def header(self) -> str:
        program, upper, name = self.program, self.name.upper(), self.name
        info = self.info()
        size = np.prod(program.input_shape), np.prod(program.output_shape)
        shapes = " x ".join(map(str, program.input_shape)), " x ".join(map(str, program.output_shape))
        return f"""/* {_comment(self.title)}; see {name}.c. */
#ifndef {upper}_H
#define {upper}_H

#define {upper}_BATCH {program.batch}
#define {upper}_INPUT {size[0]} /* floats of one image: {shapes[0]} */
#define {upper}_OUTPUT {size[1]} /* floats of one result: {shapes[1]} */
#define {upper}_WORKSPACE {info["workspace_bytes"]} /* bytes */
{self.image_macros()}
#ifdef __cplusplus
extern "C" {{
#endif

/* Compute {upper}_BATCH results, one after another, from as many images (channels, rows, columns).
 * workspace: {upper}_WORKSPACE bytes at an address divisible by 64, of any content; one for each concurrent call. */
void {name}_run(const float *input, float *output, void *workspace);

/* 1 if this processor can execute the code, else 0. */
int {name}_supported(void);

/* Shapes and sizes as JSON. */
const char *{name}_info(void);

#ifdef __cplusplus
}}
#endif
#endif
"""

    def image_macros(self) -> str:
        """Sizes of an input image and how its pixels, in [0, 1], are normalised: (pixel - mean) / deviation."""
        shape, upper = self.program.input_shape, self.name.upper()
        if len(shape) != 3:
            return ""
        mean, deviation = self.normalization or ((0.0,) * shape[0], (1.0,) * shape[0])
        names = ("CHANNELS", "HEIGHT", "WIDTH")
        lines = [f"#define {upper}_{name} {size}\n" for name, size in zip(names, shape, strict=True)]
        for name, values in (("MEAN", mean), ("STD", deviation)):
            lines.append(f"#define {upper}_{name} {{{', '.join(literal(value) for value in values)}}}\n")
        return "".join(lines)

    def kernel(self, kernel: ConvKernel | MaxKernel | PointwiseKernel) -> str:
        self.widths.add(kernel.width)
        if kernel.name not in self.kernels:
            self.kernels[kernel.name] = kernel.text()
        return kernel.name

    def mask(self, grid: Grid) -> int:
        """Position of the grid's mask: all bits set at pixels, none in gaps."""
        if grid not in self.masks:
            mask = np.zeros(grid.vectors * grid.vector, np.int32)
            mask[grid.pixels()] = -1
            self.masks[grid] = self.data.add(mask, 64)
        return self.masks[grid]

    def at(self, place: Maps | Vector) -> str:
        """Pointer to the first pixel or feature."""
        return f"W + {place.buffer.offset + (place.start if isinstance(place, Maps) else 0)}"

    def borders(self, maps: Maps, first: str, last: str, indent: str) -> str:
        """Clear what kernels leave of planes ``first`` to ``last``."""
        grid = maps.grid
        stored = grid.vectors * grid.vector
        if grid.stride == stored:
            return ""
        plane = f"{self.at(maps)} + (long)c * {grid.stride}"
        return (
            f"{indent}for (int c = {first}; c < {last}; ++c)\n"
            f"{indent}  __builtin_memset({plane} + {stored}, 0, {4 * (grid.stride - stored)});\n"
        )

    def lead(self, maps: Maps, fill: float = 0.0) -> str:
        """Clear what lies before the first plane of a buffer."""
        if maps.channel or not maps.lead:
            return ""
        if fill == 0:
            return f"  __builtin_memset(W + {maps.buffer.offset}, 0, {4 * maps.lead});\n"
        return f"  for (int i = 0; i < {maps.lead}; ++i) W[{maps.buffer.offset} + i] = {literal(fill)};\n"

    # -- steps --------------------------------------------------------------------------------------------------------

    def step(self, step: Step) -> str:
        unused = "  (void)input; (void)output; (void)W;\n"
        match step:
            case ViewStep():
                return unused + self.view(step)
            case ConvStep():
                return unused + self.convolution(step)
            case MaxStep():
                return unused + self.max_pool(step)
            case PointwiseStep():
                return unused + self.pointwise(step)
            case MeanStep():
                return unused + self.mean(step)
            case FlattenStep():
                return unused + self.flatten(step)
            case LinearStep():
                return unused + self.linear(step)
            case SoftmaxStep():
                self.helpers["softmax"] = helpers.SOFTMAX
                size = step.source.features
                return (
                    f"{unused}  for (int n = 0; n < {self.program.batch}; ++n)\n"
                    f"    softmax({self.at(step.source)} + n * {size}, {self.at(step.target)} + n * {size}, {size});\n"
                )
            case InputStep():
                size = step.target.features * self.program.batch
                return f"{unused}  __builtin_memcpy({self.at(step.target)}, input, {4 * size});\n"
            case OutputStep():
                size = step.source.features * self.program.batch
                return f"{unused}  __builtin_memcpy(output, {self.at(step.source)}, {4 * size});\n"
            case _:
                raise TypeError(type(step).__name__)

    def jobs(self, body: list[tuple[int, str]], count: int, borders: str) -> str:
        """Loop over tiles and, with threads, over chunks of ``count`` rows; ``body`` lists (tiles, call)."""
        tiles = sum(n for n, _ in body)
        lines = [
            "  PARALLEL",
            f"  for (int job = 0; job < {tiles} * CHUNKS; ++job) {{",
            f"    const int tile = job / CHUNKS, first = {count} * (job % CHUNKS) / CHUNKS;",
            f"    const int last = {count} * (job % CHUNKS + 1) / CHUNKS;",
            "    (void)tile;",
        ]
        start = 0
        for i, (n, call) in enumerate(body):
            condition = "" if i + 1 == len(body) else f"if (tile < {start + n}) "
            lines.append(f"    {'else ' if i else ''}{condition}{call}")
            start += n
        lines.append(f"    if (tile == {tiles - 1}) {{\n{borders}    }}" if borders else "")
        return "\n".join([*(line for line in lines if line), "  }\n"])

    def convolution(self, step: ConvStep) -> str:
        grid, program = step.target.grid, self.program
        text = self.lead(step.target)
        finish = "" if grid.dense else "mask"
        scale = "0"
        if step.scale is not None:
            finish = "scale"
            scale = f"DATA(f32, {self.data.add(step.scale, 64)})"
        mask = f"DATA(i32, {self.mask(grid)})" if finish else "0"
        for rows in step.rows:
            index = "u16" if rows.offsets.max(initial=0) < 2**16 else "u32"
            offsets = self.data.add(rows.offsets.astype(np.uint16 if index == "u16" else np.uint32))
            own = slice(rows.first, rows.first + rows.blocks * rows.block)
            factors = "0" if step.factors is None else f"DATA(f32, {self.data.add(step.factors[own])})"
            tables = (
                f"DATA({index}, {offsets}), {self.weights(rows.weights, step.factors)}, "
                f"DATA(u32, {self.data.add(rows.pointers)}), DATA(f32, {self.data.add(step.bias[own])}), {factors}"
            )
            out = f"{self.at(step.target)} + {rows.first * grid.stride}"
            res = "0" if step.residual is None else f"{self.at(step.residual)} + {rows.first * grid.stride}"
            body, done, tiles = [], 0, 0
            for vectors, count in costs.tiles(program.target, grid, rows.block):
                name = self.kernel(
                    ConvKernel(
                        grid.vector,
                        vectors,
                        rows.block,
                        index,
                        step.residual is not None,
                        step.activation,
                        finish,
                        step.factors is not None,
                    )
                )
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
            text += self.jobs(body, rows.blocks, self.borders(step.target, first, last, "      "))
        return text

    def weights(self, weights: Array, factors: Array | None, align: int = 4) -> str:
        """Pointer to a table of weights, int8 where they have factors."""
        if factors is None:
            return f"DATA(f32, {self.data.add(weights, align)})"
        return f"DATA(i8, {self.data.add(weights.astype(np.int8), align)})"

    def max_pool(self, step: MaxStep) -> str:
        grid = step.target.grid
        offsets = f"DATA(i32, {self.data.add(np.asarray(step.offsets, np.int32))})"
        mask = "0" if grid.dense else f"DATA(i32, {self.mask(grid)})"
        body, done, tiles = [], 0, 0
        for vectors, count in costs.tiles(self.program.target, grid, 1):
            name = self.kernel(MaxKernel(grid.vector, vectors, not grid.dense))
            size = vectors * grid.vector
            at = f"{done} + (tile - {tiles}) * {size}"
            body.append(
                (
                    count,
                    f"{name}({self.at(step.source)} + {at}, {self.at(step.target)} + {at}, {offsets}, "
                    f"{len(step.offsets)}, {_shift(mask, at)}, {step.channel_stride}, "
                    f"{grid.stride}, first, last);",
                )
            )
            done += count * size
            tiles += count
        borders = self.borders(step.target, "first", "last", "      ")
        return self.lead(step.target) + self.jobs(body, step.target.channels, borders)

    def pointwise(self, step: PointwiseStep) -> str:
        affine = step.scale is not None
        scale, shift = (
            f"DATA(f32, {self.data.add(table)})" if table is not None else "0" for table in (step.scale, step.shift)
        )
        source, target = step.source, step.target
        if isinstance(target, Vector):
            lines = [f"      f32 x = ({self.at(source)})[n * {target.features} + i];"]
            if affine:
                lines.append(f"      x = x * {scale}[i] + {shift}[i];")
            if step.other is not None:
                lines.append(f"      x += ({self.at(step.other)})[n * {target.features} + i];")
            lines += ["      " + line for line in activate_scalar(step.activation, "x")]
            lines.append(f"      ({self.at(target)})[n * {target.features} + i] = x;")
            return (
                f"  for (int n = 0; n < {self.program.batch}; ++n)\n"
                f"    for (int i = 0; i < {target.features}; ++i) {{\n" + "\n".join(lines) + "\n    }\n"
            )
        grid = target.grid
        name = self.kernel(
            PointwiseKernel(grid.vector, affine, step.other is not None, step.activation, not grid.dense)
        )
        other = "0" if step.other is None else self.at(step.other)
        mask = "0" if grid.dense else f"DATA(i32, {self.mask(grid)})"
        call = (
            f"{name}({self.at(source)}, {other}, {self.at(target)}, {scale}, {shift}, {mask}, {grid.stride}, "
            f"{grid.vectors}, first, last);"
        )
        borders = self.borders(target, "first", "last", "      ")
        return self.lead(target) + self.jobs([(1, call)], target.channels, borders)

    def view(self, step: ViewStep) -> str:
        channels, height, width = step.size
        grid = step.target.grid
        if step.source is None:
            source, image, plane, pitch = "input", channels * height * width, height * width, width
        else:
            own = step.source.grid
            source, image, plane, pitch = self.at(step.source), own.rows * own.pitch, own.stride, own.pitch
        count = len(step.phases)
        fill = (
            f"fill(p, {grid.stride}, {literal(step.fill)});"
            if step.fill
            else f"__builtin_memset(p, 0, {4 * grid.stride});"
        )
        if step.fill:
            self.helpers["fill"] = helpers.FILL
        self.helpers["copy"] = helpers.COPY
        lines = ["  PARALLEL", f"  for (int c = 0; c < {channels}; ++c) {{"]
        for i, (a, b, rows, columns) in enumerate(step.phases):
            lines += [
                f"    {{ f32 *p = {self.at(step.target)} + (long)(c * {count} + {i}) * {grid.stride};",
                f"      {fill}",
                f"      for (int n = 0; n < {self.program.batch}; ++n)",
                f"        for (int y = 0; y < {rows}; ++y)",
                f"          copy_{min(step.stride[1], 3)}(p + (n * {grid.rows} + y) * {grid.pitch},",
                f"            {source} + (long)n * {image} + (long)c * {plane} +",
                f"            (y * {step.stride[0]} + {a}) * {pitch} + {b},",
                f"            {columns}, {step.stride[1]}); }}",
            ]
        return self.lead(step.target, step.fill) + "\n".join(lines) + "\n  }\n"

    def mean(self, step: MeanStep) -> str:
        grid = step.source.grid
        self.vector_helper("sum", helpers.SUM)
        size = grid.height * grid.pitch - (grid.pitch - grid.width)
        return (
            f"  for (int n = 0; n < {grid.batch}; ++n)\n    for (int c = 0; c < {step.source.channels}; ++c)\n"
            f"      ({self.at(step.target)})[n * {step.target.features} + c] =\n"
            f"        sum({self.at(step.source)} + (long)c * {grid.stride} + n * {grid.rows * grid.pitch}, {size}) / "
            f"{literal(grid.height * grid.width)};\n"
        )

    def vector_helper(self, name: str, text: str) -> None:
        """Include a helper at the target's full width."""
        width = self.program.target.floats
        self.widths.add(width)
        self.helpers[name] = text.replace("@", str(width))

    def flatten(self, step: FlattenStep) -> str:
        grid, channels = step.source.grid, step.source.channels
        target = "output" if step.target is None else self.at(step.target)
        return (
            f"  for (int n = 0; n < {grid.batch}; ++n)\n    for (int c = 0; c < {channels}; ++c)\n"
            f"      for (int y = 0; y < {grid.height}; ++y)\n"
            f"        __builtin_memcpy({target} + ((n * {channels} + c) * {grid.height} + y) * {grid.width},\n"
            f"          {self.at(step.source)} + (long)c * {grid.stride} + (n * {grid.rows} + y) * {grid.pitch}, "
            f"{4 * grid.width});\n"
        )

    def linear(self, step: LinearStep) -> str:
        inputs, outputs = step.source.features, step.target.features
        weights = self.weights(step.weights, step.factors, 64)
        kind = "f32" if step.factors is None else "i8"
        if step.pointers is not None and step.columns is not None:
            index = "u16" if inputs <= 2**16 else "u32"
            columns = self.data.add(step.columns.astype(np.uint16 if index == "u16" else np.uint32))
            self.helpers[f"gather_{index}"] = helpers.GATHER.replace("@", index).replace("$", kind)
            pointers = f"DATA(u32, {self.data.add(step.pointers)})"
            value = (
                f"gather_{index}(x, DATA({index}, {columns}) + {pointers}[o], {weights} + {pointers}[o], "
                f"(int)({pointers}[o + 1] - {pointers}[o]))"
            )
        else:
            self.vector_helper("dot", (helpers.DOT if kind == "f32" else helpers.DOT_INT8).replace("$", kind))
            value = f"dot(x, {weights} + (long)o * {inputs}, {inputs})"
        if step.factors is not None:
            value = f"{value} * DATA(f32, {self.data.add(step.factors)})[o]"
        lines = [f"      f32 x0 = DATA(f32, {self.data.add(step.bias)})[o] + {value};"]
        if step.residual is not None:
            lines.append(f"      x0 += ({self.at(step.residual)})[n * {outputs} + o];")
        lines += ["      " + line for line in activate_scalar(step.activation, "x0")]
        lines.append(f"      ({self.at(step.target)})[n * {outputs} + o] = x0;")
        return (
            f"  for (int n = 0; n < {self.program.batch}; ++n) {{\n"
            f"    const f32 *x = {self.at(step.source)} + n * {inputs};\n"
            f"    PARALLEL\n    for (int o = 0; o < {outputs}; ++o) {{\n" + "\n".join(lines) + "\n    }\n  }\n"
        )


def _shift(pointer: str, by: str) -> str:
    """A pointer some floats on; "0" stays the null pointer."""
    return pointer if pointer == "0" else f"{pointer} + {by}"


_PARAMETERS = "const f32 *input, f32 *output, f32 *W"


def _comment(text: str) -> str:
    """Text that cannot end a C comment."""
    return text.replace("*/", "* /").replace("\n", " ")


def _quote(content: bytes) -> str:
    """A C string of these bytes."""
    return '"' + "".join([_ESCAPES[byte] for byte in content]) + '"'
