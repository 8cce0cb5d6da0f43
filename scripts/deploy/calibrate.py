"""Measure the cost model of ``feather compile`` on this machine.

    python scripts/deploy/calibrate.py [--targets avx2 c]

Times the kernels of every target that runs here, fits a line through them, and writes feather/deploy/costs.json; what
the file says of other targets stays.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from engine.records import environment  # noqa: E402
from feather.deploy import costs, helpers  # noqa: E402
from feather.deploy.build import build_library  # noqa: E402
from feather.deploy.kernels import ConvKernel, types  # noqa: E402
from feather.deploy.targets import TARGETS, Target, runs_here  # noqa: E402

PLANES, BLOCKS = 64, 64
ENTRIES = (9, 66)  # per group of channels: two points of a line
SHIFTS = (0, -1, 1)  # of a window of three columns
TYPES = """
#include <stdint.h>
typedef float f32 __attribute__((may_alias));
typedef int32_t i32 __attribute__((may_alias));
typedef uint16_t u16 __attribute__((may_alias));
typedef uint32_t u32 __attribute__((may_alias));
"""


def nanoseconds(call: Callable[[], object], repeats: int = 400) -> float:
    """Least time of one call: whatever disturbs a loop of a few microseconds only adds to it."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return min(times)


def source(target: Target) -> tuple[str, list[tuple[str, int, int, str]]]:
    """C with one exported function per kernel, and (reading, block, vectors, name) of each."""
    text, kernels, known = [TYPES, types(target.floats)], [], set()
    parameters = "const f32 *i, f32 *o, const u16 *a, const f32 *w, const u32 *p, const f32 *b, long s, int n"
    for reading in costs.READINGS:
        shifts = SHIFTS if reading == "shifted" else (0,)
        for block in target.tiles:
            most = costs.most_vectors(target, block, reading == "shifted")
            for vectors in sorted({1, 2, most // 2, most} & set(range(1, most + 1))):
                kernel = ConvKernel(target.floats, vectors, block, "u16", False, None, "", shifts=shifts)
                name = f"time_{kernel.name}"
                if name not in known:
                    call = f"{kernel.name}(i, o, 0, a, w, p, b, 0, 0, 0, s, 0, n)"
                    text += [kernel.text(), f"void {name}({parameters}) {{ {call}; }}"]
                known.add(name)
                kernels.append((reading, block, vectors, name))
    text += [helpers.DOT.replace("@", str(target.floats)), helpers.GATHER.replace("@", "u16").replace("$", "f32")]
    text += [
        "f32 time_dot(const f32 *x, const f32 *w, int n) { return dot(x, w, n); }",
        "f32 time_gather(const f32 *x, const u16 *c, const f32 *w, int n) { return gather_u16(x, c, w, n); }",
    ]
    return "\n".join(text), kernels


def measure(target: Target) -> dict[str, Any]:
    """The numbers of one target."""
    found = {str(width): measure_width(replace(target, floats=width)) for width in target.widths()}
    kernels = {reading: {width: table[reading] for width, table in found.items()} for reading in costs.READINGS}
    return {**kernels, "linear": found[str(target.floats)]["linear"]}


def measure_width(target: Target) -> dict[str, Any]:
    """The same with vectors of the target's width."""
    text, kernels = source(target)
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernels.c"
        path.write_text(text)
        library = ctypes.CDLL(str(build_library(path, target)))
    points: dict[str, dict[int, list[tuple[int, float, float]]]] = {reading: {} for reading in costs.READINGS}
    for reading, block, vectors, name in kernels:
        plane = vectors * target.floats
        planes = aligned((PLANES + 2) * plane)
        planes[:] = generator.standard_normal(len(planes))
        output = aligned(BLOCKS * block * plane)
        bias = np.zeros(BLOCKS * block, np.float32)
        lists = len(SHIFTS) if reading == "shifted" else 1
        times = []
        for entries in ENTRIES:
            places = generator.integers(0, PLANES, (BLOCKS * lists, entries // lists)) * plane
            if reading == "between":
                places += generator.integers(0, 3, places.shape)
            offsets = np.sort(places, axis=1).astype(np.uint16)
            weights = generator.standard_normal(BLOCKS * entries * block).astype(np.float32)
            pointers = (np.arange(BLOCKS * lists + 1) * (entries // lists)).astype(np.uint32)
            arrays = [planes, output, offsets, weights, pointers, bias]
            arguments = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
            function = getattr(library, name)
            times.append(nanoseconds(lambda f=function, a=arguments, s=plane: f(*a, ctypes.c_long(s), BLOCKS)) / BLOCKS)
        entry = (times[1] - times[0]) / (ENTRIES[1] - ENTRIES[0])
        points[reading].setdefault(block, []).append((vectors, entry, max(0.0, times[0] - ENTRIES[0] * entry)))
    tables = {reading: {str(block): fit(found) for block, found in of.items()} for reading, of in points.items()}
    return {**tables, "linear": linear(library, generator)}


def fit(points: list[tuple[int, float, float]]) -> dict[str, float]:
    """Lines through (vectors, ns per entry, ns per group); neither may fall."""
    vectors, entry, group = (np.array(column) for column in zip(*points, strict=True))
    found = {}
    for name, values in (("entry", entry), ("group", group)):
        slope, start = np.polyfit(vectors, values, 1) if len(vectors) > 1 else (0.0, values[0])
        found[name], found[f"{name}_vector"] = round(max(0.0, float(start)), 3), round(max(0.0, float(slope)), 3)
    return found


def linear(library: ctypes.CDLL, generator: np.random.Generator) -> dict[str, float]:
    """ns per weight of the plain matrix, and per non-zero of the list."""
    size, count = 4096, 512
    x, w = (generator.standard_normal(size).astype(np.float32) for _ in range(2))
    columns = np.sort(generator.choice(size, count, replace=False)).astype(np.uint16)
    x_at, w_at, columns_at = (ctypes.c_void_p(array.ctypes.data) for array in (x, w, columns))
    dense = nanoseconds(lambda: library.time_dot(x_at, w_at, size), 2000)
    sparse = nanoseconds(lambda: library.time_gather(x_at, columns_at, w_at, count), 2000)
    nothing = nanoseconds(lambda: library.time_dot(x_at, w_at, 0), 2000)
    return {"dense": round((dense - nothing) / size, 4), "sparse": round((sparse - nothing) / count, 4)}


def aligned(size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    memory = np.zeros(size + 16, np.float32)
    start = (-memory.ctypes.data % 64) // 4
    return memory[start : start + size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = [name for name, target in TARGETS.items() if runs_here(target)]
    parser.add_argument("--targets", nargs="+", choices=here, default=here)
    args = parser.parse_args()
    content = json.loads(costs.FILE.read_text()) if costs.FILE.exists() else {"targets": {}}
    surroundings = environment()
    for name in args.targets:
        content["targets"][name] = {**measure(TARGETS[name]), "hardware": surroundings["hardware"]}
        print(name, json.dumps(content["targets"][name]["shifted"]))
    content["others_like"] = "avx2" if "avx2" in content["targets"] else args.targets[0]
    costs.FILE.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {costs.FILE}")


if __name__ == "__main__":
    main()
