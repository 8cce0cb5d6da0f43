"""`compile_model`: from a trained network to C, and to a library where a compiler is at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.export import ExportedProgram

from feather.deploy.build import build_library
from feather.deploy.capture import capture
from feather.deploy.emit import Normalization, Source, emit
from feather.deploy.errors import DeployError
from feather.deploy.fuse import fuse
from feather.deploy.graph import Shape
from feather.deploy.lower import lower
from feather.deploy.quantize import quantize
from feather.deploy.targets import get_target

WEIGHTS = ("fp32", "int8")


@dataclass(frozen=True)
class Compiled:
    """Files that were written, and what they say of themselves; ``library`` is None where none was asked for."""

    c: Path
    header: Path
    library: Path | None
    info: dict[str, object]


def generate(
    model: nn.Module | ExportedProgram,
    input_shape: Shape,
    *,
    name: str = "model",
    target: str = "native",
    batch: int = 1,
    block: int | None = None,
    aligned: bool | None = None,
    weights: str = "fp32",
    normalization: Normalization | None = None,
) -> Source:
    """The C text of a network, without writing it; arguments and errors are `compile_model`'s.

    ``block`` forces a number of output channels that share loads on every layer, ``aligned`` the kind of every map's
    grid (see `layout`; where rows are too long for it, they stay as they are); None lets the measured costs decide.
    """
    if batch < 1:
        raise DeployError(f"Batch {batch}: expected at least 1")
    chosen = get_target(target)
    if weights not in WEIGHTS:
        raise DeployError(f"Unknown kind of weights {weights!r}: use {' or '.join(WEIGHTS)}")
    graph = fuse(capture(model, input_shape))
    if weights == "int8":
        graph = quantize(graph)
    title = f"{type(model).__name__ if isinstance(model, nn.Module) else name} compiled by feather"
    return emit(lower(graph, chosen, batch, block, aligned), name, title, normalization)


def compile_model(
    model: nn.Module | ExportedProgram,
    input_shape: Shape,
    directory: str | Path = ".",
    *,
    name: str = "model",
    target: str = "native",
    batch: int = 1,
    threads: int = 1,
    library: bool = True,
    compiler: str | None = None,
    weights: str = "fp32",
    normalization: Normalization | None = None,
) -> Compiled:
    """Write ``name.c`` and ``name.h``, and compile them to ``name.so`` (``name.wasm`` for the target wasm).

    Args:
        model: trained network or exported program; its zeros cost nothing in the result.
        input_shape: of one image, ``(channels, height, width)``, or ``(features,)``.
        directory: where the files go; created.
        name: prefix of the C functions.
        target: ``avx512``, ``avx2``, ``neon``, ``wasm``, ``c``, or ``native``: the best for this machine.
        batch: images per call, fixed in the code.
        threads: OpenMP threads of the library; 1 needs no OpenMP.
        library: whether to run the C compiler.
        compiler: its command; by default that of the variable CC, else cc, gcc or clang.
        weights: ``fp32``, or ``int8``: rounded to 255 steps in each output channel.
        normalization: (mean, deviation) of each input channel, of pixels in [0, 1], for the header; the caller of the
            code applies it.

    Raises:
        DeployError: an unsupported layer, a bad argument, no compiler.
    """
    if threads < 1:
        raise DeployError(f"Threads {threads}: expected at least 1")
    source = generate(
        model, input_shape, name=name, target=target, batch=batch, weights=weights, normalization=normalization
    )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    c, header = directory / f"{name}.c", directory / f"{name}.h"
    c.write_text(source.c)
    header.write_text(source.header)
    built = build_library(c, get_target(target), threads=threads, compiler=compiler) if library else None
    return Compiled(c, header, built, source.info)
