"""Generated C as a program that reads images from a file, natively or under emulation."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feather.deploy.build import run_compiler
from feather.deploy.emit import Source
from feather.deploy.targets import TARGETS, Target, runs_here

HERE = Path(__file__).parent
ARM = ("qemu-aarch64",)
Floats = NDArray[np.float32]


def buildable(name: str) -> Target:
    """The target, or, for AVX-512 on a processor without it, the same C with its vectors cut in two for AVX2."""
    target = TARGETS[name]
    if name == "avx512" and not runs_here(target):
        macros = tuple(f"-D{macro}=1" for macro in target.macros if "AVX512" in macro)
        return replace(target, flags=("-mavx2", "-mfma", "-Wno-psabi", *macros))
    return target


def sizes(source: Source) -> list[str]:
    """Macros of harness.c and bare.c."""
    info: dict[str, Any] = source.info
    values = {
        "NAME": info["name"],
        "INPUT": info["batch"] * int(np.prod(info["input_shape"])),
        "OUTPUT": info["batch"] * int(np.prod(info["output_shape"])),
        "WORKSPACE": info["workspace_bytes"],
    }
    return [f"-D{key}={value}" for key, value in values.items()]


def build(source: Source, directory: Path, target: Target, flags: tuple[str, ...] = ("-O1",)) -> Path:
    """Compile with the harness; every warning is an error."""
    name = str(source.info["name"])
    (directory / f"{name}.c").write_text(source.c)
    (directory / f"{name}.h").write_text(source.header)
    program = directory / name
    arguments = [str(HERE / "harness.c"), f"-I{directory}", *sizes(source)]
    warnings = ("-Wall", "-Wextra", "-Werror")
    run_compiler(directory / f"{name}.c", target, [*arguments, "-o", str(program)], extra=(*warnings, *flags))
    return program


def run(program: Path, images: Floats, source: Source, emulator: tuple[str, ...] = ()) -> tuple[Floats, str]:
    """Results for as many images as whole batches hold, and what was written to the standard error.

    Raises:
        RuntimeError: the program failed; its message is quoted.
    """
    info: dict[str, Any] = source.info
    given, result = program.with_suffix(".input"), program.with_suffix(".output")
    np.ascontiguousarray(images, np.float32).tofile(given)
    calls = len(images) // info["batch"]
    command = [*emulator, str(program), str(calls), str(given), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return np.fromfile(result, np.float32).reshape(calls * info["batch"], *info["output_shape"]), done.stderr


def instructions_per_image(program: Path, images: Floats, source: Source) -> int:
    """Instructions that an ARM64 program executes for one call more: emulated time would mean nothing.

    Args:
        images: of at least two calls; the first two are used.
    """
    plugin = program.with_suffix(".plugin.so")
    subprocess.run(["cc", "-shared", "-fPIC", str(HERE / "count_instructions.c"), "-o", str(plugin)], check=True)
    batch = int(source.info["batch"])  # type: ignore[call-overload]
    counts = []
    for calls in (1, 2):
        _, told = run(program, images[: calls * batch], source, (*ARM, "-plugin", str(plugin)))
        found = re.search(r"instructions (\d+)", told)
        assert found is not None, told
        counts.append(int(found[1]))
    return (counts[1] - counts[0]) // batch
