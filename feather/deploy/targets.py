"""What the generated C is compiled for: vector width, registers, compiler flags."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from feather.deploy.errors import DeployError


@dataclass(frozen=True)
class Target:
    """One instruction set.

    Attributes:
        floats: width of a vector register, in float32.
        tiles: block of output channels -> vectors of each that stay in registers at once.
        flags: of GCC and clang, without the optimisation level.
        macros: preprocessor symbols without which the file refuses to compile.
        feature: what ``__builtin_cpu_supports`` is asked, or empty.
        machine: as ``platform.machine()`` says, or empty where any will do.
    """

    name: str
    floats: int
    tiles: dict[int, int]
    flags: tuple[str, ...]
    macros: tuple[str, ...] = ()
    feature: str = ""
    machine: str = ""

    def widths(self) -> list[int]:
        """Vector widths a kernel may use, widest first; the narrow ones are for small maps."""
        return [width for width in (16, 8, 4) if width <= self.floats]


TARGETS = {
    target.name: target
    for target in (
        Target(
            "avx512", 16, {1: 24, 2: 12, 4: 6, 8: 3}, ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mfma"),
            ("__AVX512F__", "__AVX512VL__", "__FMA__"), "avx512f", "x86_64",
        ),
        Target("avx2", 8, {1: 12, 2: 6, 4: 3, 8: 1}, ("-mavx2", "-mfma"), ("__AVX2__", "__FMA__"), "avx2", "x86_64"),
        Target("neon", 4, {1: 24, 2: 12, 4: 6, 8: 3}, (), ("__aarch64__",), "", "aarch64"),
        Target(
            "wasm", 4, {1: 12, 2: 6, 4: 3, 8: 1}, ("--target=wasm32", "-msimd128", "-mbulk-memory"),
            ("__wasm_simd128__",), "", "wasm32",
        ),
        Target("c", 4, {1: 12, 2: 6, 4: 3, 8: 1}, ()),
    )
}  # fmt: skip


def get_target(name: str) -> Target:
    """The target of that name; ``native`` is the best one for this machine.

    Raises:
        DeployError: unknown name.
    """
    if name == "native":
        return TARGETS[_native()]
    if name not in TARGETS:
        raise DeployError(f"Unknown target {name!r}: use native, {', '.join(TARGETS)}")
    return TARGETS[name]


def runs_here(target: Target) -> bool:
    """Whether this machine can execute code for ``target`` without emulation."""
    if target.machine and target.machine != platform.machine().replace("arm64", "aarch64").replace("AMD64", "x86_64"):
        return False
    return not target.feature or target.feature in _cpu_flags()


def _native() -> str:
    return next(name for name, target in TARGETS.items() if runs_here(target))


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
