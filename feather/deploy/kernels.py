"""C text of the inner loops. Each function here writes one C function for one combination of sizes, fully unrolled.

Accumulators are separate variables, not an array: then they stay in registers with every compiler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from feather.deploy.graph import Activation


def literal(value: float) -> str:
    """A float32 constant in C."""
    if math.isinf(value):
        return "-__builtin_inff()" if value < 0 else "__builtin_inff()"
    return f"{float(np.float32(value))!r}f"


def activation_key(activation: Activation | None) -> str:
    """Part of a function's name."""
    if activation is None:
        return ""
    if activation == Activation():
        return "_relu"
    if activation.kind == "hardswish":
        return "_hardswish"
    bounds = f"{activation.low:g}_{activation.high:g}"
    return "_clamp_" + bounds.replace("-", "m").replace(".", "p").replace("+", "")


def activate(activation: Activation | None, width: int, x: str) -> list[str]:
    """Statements that apply an activation to the vector variable ``x``; ``zero`` is a vector of zeros in scope."""
    if activation is None:
        return []
    if activation.kind == "hardswish":
        return [
            f"{{ vf{width} g = {x} + 3.0f; g = select{width}(g < zero, zero, g);",
            f"  g = select{width}(g > zero + 6.0f, zero + 6.0f, g); {x} = {x} * g * {literal(1 / 6)}; }}",
        ]
    lines = []
    # Comparisons that are false for a NaN keep it, as PyTorch does.
    if activation.low > -math.inf:
        low = "zero" if activation.low == 0 else f"(zero + {literal(activation.low)})"
        lines.append(f"{x} = select{width}({x} < {low}, {low}, {x});")
    if activation.high < math.inf:
        high = f"(zero + {literal(activation.high)})"
        lines.append(f"{x} = select{width}({x} > {high}, {high}, {x});")
    return lines


def activate_scalar(activation: Activation | None, x: str) -> list[str]:
    """The same for a float variable."""
    if activation is None:
        return []
    if activation.kind == "hardswish":
        return [
            f"{{ f32 g = {x} + 3.0f; g = g < 0.0f ? 0.0f : g;",
            f"  g = g > 6.0f ? 6.0f : g; {x} = {x} * g * {literal(1 / 6)}; }}",
        ]
    lines = []
    if activation.low > -math.inf:
        lines.append(f"{x} = {x} < {literal(activation.low)} ? {literal(activation.low)} : {x};")
    if activation.high < math.inf:
        lines.append(f"{x} = {x} > {literal(activation.high)} ? {literal(activation.high)} : {x};")
    return lines


def types(width: int) -> str:
    """Vector types of a width, the choice between two by a comparison, and lanes picked from two."""
    return f"""
#if defined(__clang__) || __GNUC__ >= 12
#define shuffle{width}(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define shuffle{width}(a, b, ...) __builtin_shuffle(a, b, (vi{width}){{__VA_ARGS__}})
#endif
typedef float vf{width} __attribute__((vector_size({4 * width}), may_alias));
typedef float vu{width} __attribute__((vector_size({4 * width}), aligned(4), may_alias));
typedef int32_t vi{width} __attribute__((vector_size({4 * width}), may_alias));
static inline __attribute__((always_inline, unused)) vf{width} select{width}(vi{width} m, vf{width} a, vf{width} b)
{{ return (vf{width})(((vi{width})a & m) | ((vi{width})b & ~m)); }}
"""


def shifted(names: list[str], row: int, width: int, by: int, fill: str) -> list[str]:
    """Expressions of the vectors ``names``, ``row`` of them in each row of pixels, with what lies ``by`` lanes further.

    ``fill`` stands for what would come from beyond the row; a vector that is nothing else is "".
    """
    if by == 0:
        return names
    found = []
    for k in range(len(names)):
        start, (ahead, lane) = k - k % row, divmod(k % row * width + by, width)
        two = [names[start + i] if 0 <= i < row else fill for i in (ahead, ahead + 1)]
        if two == [fill, fill] or (lane == 0 and two[0] == fill):
            found.append("")
        elif lane == 0:
            found.append(two[0])
        else:
            lanes = ", ".join(str(lane + i) for i in range(width))
            found.append(f"shuffle{width}({two[0]}, {two[1]}, {lanes})")
    return found


def shifts_key(shifts: tuple[int, ...], row: int) -> str:
    """Part of a function's name."""
    if shifts == (0,):
        return ""
    return f"_row{row}_" + "_".join(str(shift).replace("-", "m") for shift in shifts)


@dataclass(frozen=True)
class ConvKernel:
    """Sparse convolution of one tile of ``vectors`` vectors for ``block`` output channels at a time.

    ``finish`` is what happens to a result before it is stored: "", "mask" (gaps cleared) or "scale" (also multiplied
    by a factor for each pixel). ``quantized`` means int8 weights and, behind the biases, a factor for each channel.
    ``shifts`` and ``row``, the vectors of a row of pixels, are those of `Rows` and of an aligned grid.
    """

    width: int
    vectors: int
    block: int
    index: str
    residual: bool
    activation: Activation | None
    finish: str
    quantized: bool = False
    shifts: tuple[int, ...] = (0,)
    row: int = 1

    @property
    def name(self) -> str:
        tail = ("_int8" if self.quantized else "") + ("_add" if self.residual else "") + activation_key(self.activation)
        tail += (f"_{self.finish}" if self.finish else "") + shifts_key(self.shifts, self.row)
        return f"conv_{self.width}x{self.vectors}_b{self.block}_{self.index}{tail}"

    def chains(self) -> int:
        """Independent sums per result, so that short tiles do not wait for the latency of the addition."""
        return max(1, min(4, 4 // (self.vectors * self.block)))

    def text(self) -> str:
        w, t, b, lists = self.width, range(self.vectors), range(self.block), len(self.shifts)
        kind = "i8" if self.quantized else "f32"
        lines = [
            f"static __attribute__((noinline)) void {self.name}(const f32 *in, f32 *out, const f32 *res,",
            f"    const {self.index} *offsets, const {kind} *weights, const u32 *pointers, const f32 *bias,",
            "    const f32 *factors, const i32 *mask, const f32 *scale, long stride, int first, int last)",
            "{",
            f"  const vf{w} zero = {{0}};",
            "  (void)zero; (void)res; (void)factors; (void)mask; (void)scale;",
            "  for (int c = first; c < last; ++c) {",
            f"    const u32 *list = pointers + {lists} * (long)c;",
            f"    const {self.index} *o = offsets + list[0], *end;",
            f"    const {kind} *v = weights + (long)list[0] * {self.block};",
        ]
        for j in b:
            start = "" if self.quantized else f" + bias[c * {self.block} + {j}]"
            lines += [f"    vf{w} a{j}_{k} = zero{start};" for k in t]
        for i, shift in enumerate(self.shifts):
            lines.append(f"    end = offsets + list[{i + 1}];")
            if shift == 0:
                lines += self.list_sum("a")
                continue
            lines += ["    {", *(f"    vf{w} e{j}_{k} = zero;" for j in b for k in t), *self.list_sum("e")]
            for j in b:
                sums = shifted([f"e{j}_{k}" for k in t], self.row, w, shift, "zero")
                lines += [f"    a{j}_{k} += {sums[k]};" for k in t if sums[k]]
            lines.append("    }")
        for j in b:
            lines.append(f"    {{ f32 *p = out + (long)(c * {self.block} + {j}) * stride;")
            if self.quantized:
                lines.append(f"      const f32 q = factors[c * {self.block} + {j}], d = bias[c * {self.block} + {j}];")
            if self.residual:
                lines.append(f"      const f32 *r = res + (long)(c * {self.block} + {j}) * stride;")
            for k in t:
                lines += self.store(f"a{j}_{k}", k * w)
            lines.append("    }")
        lines += ["  }", "}", ""]
        return "\n".join(lines)

    def list_sum(self, sums: str) -> list[str]:
        """Add up the list of entries from ``o`` to ``end`` in the variables whose names begin with ``sums``."""
        t, b, chains = range(self.vectors), range(self.block), self.chains()
        lines = []
        for u in range(1, chains):
            names = ", ".join(f"{sums}{j}_{k}_{u} = zero" for j in b for k in t)
            lines.append(f"    vf{self.width} {names};")
        if chains > 1:
            lines.append(f"    for (; end - o >= {chains}; o += {chains}, v += {chains * self.block}) {{")
            for u in range(chains):
                lines += self.products(sums, f"o[{u}]", f"v + {u * self.block}", f"_{u}" if u else "")
            lines.append("    }")
        lines.append(f"    for (; o != end; ++o, v += {self.block}) {{")
        lines += self.products(sums, "*o", "v", "")
        lines.append("    }")
        for u in range(1, chains):
            lines.append("    " + " ".join(f"{sums}{j}_{k} += {sums}{j}_{k}_{u};" for j in b for k in t))
        return lines

    def products(self, sums: str, offset: str, weights: str, suffix: str) -> list[str]:
        w = self.width
        kind = "i8" if self.quantized else "f32"
        lines = [f"      {{ const f32 *p = in + {offset}; const {kind} *s = {weights};"]
        if self.block == 1:
            lines.append("        const f32 s0 = (f32)s[0];")
            lines += [
                f"        {sums}0_{k}{suffix} += s0 * *(const vu{w} *)(p + {k * w});" for k in range(self.vectors)
            ]
        elif self.block < self.vectors:  # whichever are fewer stay in registers: the weights ...
            lines += [f"        const f32 q{j} = (f32)s[{j}];" for j in range(self.block)]
            for k in range(self.vectors):
                added = " ".join(f"{sums}{j}_{k}{suffix} += q{j} * x;" for j in range(self.block))
                lines.append(f"        {{ const vf{w} x = *(const vu{w} *)(p + {k * w}); {added} }}")
        else:  # ... or the pixels
            lines += [f"        const vf{w} x{k} = *(const vu{w} *)(p + {k * w});" for k in range(self.vectors)]
            for j in range(self.block):
                added = " ".join(f"{sums}{j}_{k}{suffix} += q * x{k};" for k in range(self.vectors))
                lines.append(f"        {{ const f32 q = (f32)s[{j}]; {added} }}")
        return [*lines, "      }"]

    def store(self, x: str, at: int) -> list[str]:
        w = self.width
        lines = [f"{x} = {x} * q + d;"] if self.quantized else []
        if self.finish == "scale":
            lines.append(f"{x} *= *(const vf{w} *)(scale + {at});")
        if self.residual:
            lines.append(f"{x} += *(const vf{w} *)(r + {at});")
        lines += activate(self.activation, w, x)
        if self.finish:
            lines.append(f"{x} = (vf{w})((vi{w}){x} & *(const vi{w} *)(mask + {at}));")
        lines.append(f"*(vf{w} *)(p + {at}) = {x};")
        return ["      " + line for line in lines]


@dataclass(frozen=True)
class MaxKernel:
    """Largest of several cells for one tile of every channel; ``shifts`` and ``row`` as for `ConvKernel`."""

    width: int
    vectors: int
    masked: bool
    shifts: tuple[int, ...] = (0,)
    row: int = 1

    @property
    def name(self) -> str:
        tail = ("_mask" if self.masked else "") + shifts_key(self.shifts, self.row)
        return f"max_{self.width}x{self.vectors}{tail}"

    def text(self) -> str:
        w, t = self.width, range(self.vectors)
        lines = [
            f"static __attribute__((noinline)) void {self.name}(const f32 *in, f32 *out, const i32 *offsets,",
            "    const i32 *pointers, const i32 *mask, long in_stride, long stride, int first, int last)",
            "{",
            f"  const vf{w} low = (vf{w}){{0}} - __builtin_inff();",
            "  (void)mask; (void)low;",
            "  for (int c = first; c < last; ++c) {",
            "    const f32 *p = in + c * in_stride;",
            "    f32 *q = out + c * stride;",
        ]
        lines += [f"    vf{w} a{k} = low;" for k in t]
        for i, shift in enumerate(self.shifts):
            lines += [f"    {{ const i32 *o = offsets + pointers[{i}], *end = offsets + pointers[{i + 1}];"]
            lines += [f"    vf{w} e{k} = *(const vu{w} *)(p + *o + {k * w});" for k in t]
            lines += ["    for (++o; o != end; ++o) {", "      const f32 *s = p + *o;"]
            lines += [
                f"      {{ const vf{w} x = *(const vu{w} *)(s + {k * w}); {self.larger(f'e{k}', 'x')} }}" for k in t
            ]
            lines.append("    }")
            found = shifted([f"e{k}" for k in t], self.row, w, shift, "low")
            lines += [f"    {{ const vf{w} x = {found[k]}; {self.larger(f'a{k}', 'x')} }}" for k in t if found[k]]
            lines.append("    }")
        for k in t:
            value = f"(vf{w})((vi{w})a{k} & *(const vi{w} *)(mask + {k * w}))" if self.masked else f"a{k}"
            lines.append(f"    *(vf{w} *)(q + {k * w}) = {value};")
        lines += ["  }", "}", ""]
        return "\n".join(lines)

    def larger(self, a: str, x: str) -> str:
        """The larger of two into ``a``; a NaN is larger than anything, as in PyTorch."""
        return f"{a} = select{self.width}(({a} > {x}) | ({a} != {a}), {a}, {x});"


@dataclass(frozen=True)
class PointwiseKernel:
    """Scale, shift, addition and activation of whole planes."""

    width: int
    affine: bool
    addition: bool
    activation: Activation | None
    masked: bool

    @property
    def name(self) -> str:
        parts = [f"pointwise_{self.width}", "_affine" * self.affine, "_add" * self.addition]
        return "".join(parts) + activation_key(self.activation) + "_mask" * self.masked

    def text(self) -> str:
        w = self.width
        lines = [
            f"static __attribute__((noinline)) void {self.name}(const f32 *a, const f32 *b, f32 *out,",
            "    const f32 *scale, const f32 *shift, const i32 *mask, long stride, int vectors, int first, int last)",
            "{",
            f"  const vf{w} zero = {{0}};",
            "  (void)zero; (void)b; (void)scale; (void)shift; (void)mask;",
            "  for (int c = first; c < last; ++c) {",
            "    const long at = c * stride;",
        ]
        if self.affine:
            lines.append("    const f32 m = scale[c], d = shift[c];")
        lines += [
            f"    for (int i = 0; i < vectors * {w}; i += {w}) {{",
            f"      vf{w} x = *(const vf{w} *)(a + at + i){' * m + d' if self.affine else ''};",
        ]
        if self.addition:
            lines.append(f"      x += *(const vf{w} *)(b + at + i);")
        lines += ["      " + line for line in activate(self.activation, w, "x")]
        if self.masked:
            lines.append(f"      x = (vf{w})((vi{w})x & *(const vi{w} *)(mask + i));")
        lines += [f"      *(vf{w} *)(out + at + i) = x;", "    }", "  }", "}", ""]
        return "\n".join(lines)
