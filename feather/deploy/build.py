"""Runs a C compiler."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from feather.deploy.errors import DeployError
from feather.deploy.targets import Target

OPTIMIZE = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-math-errno")


def find_compiler(target: Target, compiler: str | None = None) -> str:
    """The compiler to use: the argument, else the variable CC, else cc, gcc or clang.

    For wasm it is clang, for neon on another machine a cross compiler.

    Raises:
        DeployError: none is installed.
    """
    wanted = compiler or os.environ.get("CC")
    here = platform.machine().replace("arm64", "aarch64")
    if wanted:
        names = [wanted]
    elif target.machine == "wasm32":
        names = ["clang"]
    elif target.machine not in ("", here):
        names = [f"{target.machine}-linux-gnu-gcc"]
    else:
        names = ["cc", "gcc", "clang"]
    for name in names:
        if shutil.which(name):
            return name
    raise DeployError(
        f"No C compiler found for target {target.name} (tried {', '.join(names)}): install GCC or clang, "
        "or name one with the variable CC"
    )


def build_library(
    source: Path, target: Target, *, threads: int = 1, compiler: str | None = None, extra: tuple[str, ...] = ()
) -> Path:
    """Compile a generated C file to a shared library beside it, or to a WebAssembly module for the target wasm.

    Raises:
        DeployError: no compiler, or it failed; its first error line is quoted.
    """
    if target.name == "wasm":
        library = source.with_suffix(".wasm")
        names = (f"{source.stem}_run", f"{source.stem}_info", "__heap_base")
        linking = ["-nostdlib", "-Wl,--no-entry,--strip-all", *(f"-Wl,--export={name}" for name in names)]
    else:
        library, linking = source.with_suffix(".so"), ["-shared", "-fPIC"]
    library.unlink(missing_ok=True)  # a process may be running the old one, which must not change under it
    run_compiler(source, target, [*linking, "-o", str(library)], threads, compiler, extra)
    return library


def run_compiler(
    source: Path,
    target: Target,
    arguments: list[str],
    threads: int = 1,
    compiler: str | None = None,
    extra: tuple[str, ...] = (),
) -> None:
    """Compile ``source`` with the target's flags and ``arguments``."""
    command = [find_compiler(target, compiler), *OPTIMIZE, *target.flags, *extra]
    if threads > 1:
        command += ["-fopenmp", f"-D{source.stem.upper()}_THREADS={threads}"]
    done = subprocess.run([*command, str(source), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise DeployError(f"{command[0]} could not compile {source.name}: {(lines or ['no message'])[0].strip()}")
