"""Time of every step of the generated C, beside the floor that its loads and multiply-adds set."""

from __future__ import annotations

import ctypes
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from feather.deploy import costs
from feather.deploy.build import build_library
from feather.deploy.capture import capture
from feather.deploy.emit import emit
from feather.deploy.fuse import fuse
from feather.deploy.lower import lower
from feather.deploy.program import ConvStep
from feather.deploy.targets import Target, get_target
from scripts.deploy.subjects import Subject

LOADS_PER_CYCLE = FMAS_PER_CYCLE = 2
"""Vectors, of the cores of the last ten years that have AVX2 or AVX-512."""
CYCLES_PER_MULTIPLY = 3
"""Latency of an integer multiplication, of the same cores. Additions of constants some of them do in no time at all."""
CLOCK = """
/* n multiplications that wait for one another */
long chain(long n) { long x = n; for (long i = 0; i < n; ++i) __asm__ volatile("imul %0, %0" : "+r"(x)); return x; }
"""
ROUNDS = 60


def measure(name: str, sparsity: float, subject: Subject, work: Path) -> dict[str, Any]:
    """Microseconds and floor of each step; the floor of a convolution is that of its kernel's vector instructions."""
    target = get_target("native")
    program = lower(fuse(capture(subject.model, subject.shape)), target, 1)
    directory = work / "layers"
    directory.mkdir(parents=True, exist_ok=True)
    library = ctypes.CDLL(str(_library(directory, f"{name}_{round(100 * sparsity)}", program, target)))
    cycle = _cycle_nanoseconds(directory, target)
    memory = np.zeros(program.workspace + 16, np.float32)
    workspace = memory[(-memory.ctypes.data % 64) // 4 :]
    image = np.random.default_rng(0).standard_normal(subject.shape).astype(np.float32)
    scores = np.empty(program.output_shape, np.float32)
    arguments = [ctypes.c_void_p(array.ctypes.data) for array in (image, scores, workspace)]
    times: list[list[float]] = [[] for _ in program.steps]
    nothing = []
    for _ in range(ROUNDS):
        for i in range(len(program.steps)):
            step = getattr(library, f"step_{i}")
            start = time.perf_counter_ns()
            step(*arguments)
            times[i].append((time.perf_counter_ns() - start) / 1e3)
        start = time.perf_counter_ns()
        library.nothing(*arguments)
        nothing.append((time.perf_counter_ns() - start) / 1e3)
    call = statistics.median(nothing)
    rows = []
    for step, found in zip(program.steps, times, strict=True):
        row: dict[str, Any] = {"layer": step.name, "kind": type(step).__name__.removesuffix("Step")}
        row["microseconds"] = max(0.0, statistics.median(found) - call)
        if isinstance(step, ConvStep):
            row |= _floor(step, target, cycle)
        rows.append(row)
    return {
        "model": name, "sparsity": sparsity, "origin": subject.origin, "target": target.name,
        "cycle_nanoseconds": cycle, "steps": rows,
    }  # fmt: skip


def _library(directory: Path, name: str, program: Any, target: Target) -> Path:
    source = emit(program, name, name)
    path = directory / f"{name}.c"
    path.write_text(source.c.replace("static void step_", "void step_") + "\nvoid nothing(void) {}\n")
    path.with_suffix(".h").write_text(source.header)
    return build_library(path, target)


def _floor(step: ConvStep, target: Target, cycle: float) -> dict[str, float]:
    """Microseconds below which the kernel cannot come, and which share of its lanes are pixels of non-zero weights."""
    grid, loads, products, useful = step.target.grid, 0, 0, 0
    for rows in step.rows:
        entries = len(rows.offsets)
        vectors = sum(size * count for size, count in costs.tiles(target, grid, rows.block, rows.shifts != (0,)))
        loads += entries * vectors
        products += entries * vectors * rows.block
        useful += int(np.count_nonzero(rows.weights)) * grid.height * grid.width
    cycles = max(loads / LOADS_PER_CYCLE, products / FMAS_PER_CYCLE)
    lanes = products * grid.vector
    return {"floor": cycles * cycle / 1e3, "useful": useful / lanes if lanes else 1.0, "products": useful}


def _cycle_nanoseconds(directory: Path, target: Target) -> float:
    path = directory / "clock.c"
    path.write_text(CLOCK)
    library = ctypes.CDLL(str(build_library(path, target)))
    count, times = 1_000_000, []
    for _ in range(20):
        start = time.perf_counter_ns()
        library.chain(ctypes.c_long(count))
        times.append((time.perf_counter_ns() - start) / count)
    return min(times) / CYCLES_PER_MULTIPLY
