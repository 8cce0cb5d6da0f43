"""Do the generated programs of all targets give PyTorch's outputs on photographs?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.data import create_data
from feather.deploy import generate
from scripts.deploy.program import ARM, build, buildable, run
from scripts.deploy.subjects import Subject

TARGETS = {"c": (), "avx2": (), "avx512": (), "neon": ARM}
"""And what executes their programs; without AVX-512 the compiler cuts that target's vectors in two."""


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
    for target, emulator in TARGETS.items():
        source = generate(subject.model, subject.shape, name="net", target=target)
        chosen = buildable(target)
        program = build(source, work, chosen, ("-static",) if emulator else ())
        found, _ = run(program, images.numpy(), source, emulator)
        rows.append({
            "model": name, "sparsity": sparsity, "origin": subject.origin, "target": target, "flags": chosen.flags,
            "emulator": " ".join(emulator), "images": len(images),
            "difference": float(np.abs(found - expected).max() / np.abs(expected).max()),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows
