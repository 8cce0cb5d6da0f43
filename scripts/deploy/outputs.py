"""Do the generated programs of all targets give PyTorch's outputs on photographs?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.data import create_data
from feather.deploy import generate
from feather.deploy.emit import Source
from feather.deploy.targets import get_target, runs_here
from scripts.deploy import bochs, program
from scripts.deploy.program import Floats
from scripts.deploy.subjects import Subject

TARGETS = ("c", "avx2", "avx512", "neon")


def photographs(shape: tuple[int, int, int], data: Path) -> torch.Tensor:
    """Normalised images of a test split: eight of CIFAR-100, or two of Imagenette for the large shape."""
    if shape[1] == 32:
        options: dict[str, Any] = {"name": "cifar100", "root": data, "batch_size": 8}
    else:
        options = {"name": "imagenette", "root": data / "imagenette2-160", "batch_size": 2, "image_size": shape[1]}
    batch = next(iter(create_data(**options, seed=0, device="cpu").eval.epoch(0)))
    return batch.images.contiguous()


def measure(name: str, sparsity: float, subject: Subject, data: Path, work: Path) -> list[dict[str, Any]]:
    """The largest difference on every target, over the largest output."""
    images = photographs(subject.shape, data)
    with torch.no_grad():
        expected = subject.model(images).numpy()
    work.mkdir(parents=True, exist_ok=True)
    rows = []
    for target in TARGETS:
        source = generate(subject.model, subject.shape, name="net", target=target)
        found, how = _execute(source, target, images.numpy(), work)
        difference = float(np.abs(found - expected).max() / np.abs(expected).max())
        rows.append({
            "model": name, "sparsity": sparsity, "origin": subject.origin, "target": target, "executed": how,
            "images": len(images), "difference": difference,
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def _execute(source: Source, target: str, images: Floats, work: Path) -> tuple[Floats, str]:
    """Results, and what the code ran on."""
    if target == "neon":
        built = program.build(source, work, get_target("neon"), ("-static",))
        return program.run(built, images, source, program.ARM)[0], "QEMU"
    here = runs_here(get_target(target))
    if target == "avx512" and not here and bochs.available():
        return bochs.run(source, images, work), "Bochs"
    built = program.build(source, work, program.buildable(target), ())
    how = "this processor" if here else "AVX2, its vectors cut in two by the compiler"
    return program.run(built, images, source)[0], how
