"""A `Program` as one C file and one header."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import numpy as np

from feather.deploy import helpers
from feather.deploy.errors import DeployError
from feather.deploy.kernels import literal, types
from feather.deploy.program import Program
from feather.deploy.steps import body
from feather.deploy.tables import quote
from feather.deploy.writer import Writer

MARKER = "feather-deploy-info:"
Normalization = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Source:
    """The generated text and what it says of itself."""

    c: str
    header: str
    info: dict[str, object]


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
        self.writer = Writer(program)

    def source(self) -> Source:
        program = self.program
        bodies = [body(self.writer, step) for step in program.steps]
        functions = [
            f"/* {_comment(step.name)} */\nstatic void step_{i}({_PARAMETERS})\n{{\n{statements}}}\n"
            for i, (step, statements) in enumerate(zip(program.steps, bodies, strict=True))
        ]
        calls = "".join(f"  step_{i}(input, output, W);\n" for i in range(len(bodies)))
        info = self.info()
        head = self.head()
        upper = self.name.upper()
        feature = f'__builtin_cpu_supports("{program.target.feature}") != 0' if program.target.feature else "1"
        text_info = quote((MARKER + json.dumps(info)).encode())
        text = [
            head,
            f'#include "{self.name}.h"\n#include <stdint.h>\n',
            self.checks(),
            "typedef float f32 __attribute__((may_alias));\ntypedef int32_t i32 __attribute__((may_alias));",
            "typedef signed char i8;",
            "typedef uint16_t u16 __attribute__((may_alias));\ntypedef uint32_t u32 __attribute__((may_alias));\n",
            helpers.THREADS.replace("@", upper),
            "#define DATA(type, at) ((const type *)(const void *)(data + (at)))",
            *(types(width) for width in sorted(self.writer.widths)),
            self.writer.data.text(),
            *self.writer.helpers.values(),
            *self.writer.kernels.values(),
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
            "constant_bytes": self.writer.data.size,
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


_PARAMETERS = "const f32 *input, f32 *output, f32 *W"


def _comment(text: str) -> str:
    """Text that cannot end a C comment."""
    return text.replace("*/", "* /").replace("\n", " ")
