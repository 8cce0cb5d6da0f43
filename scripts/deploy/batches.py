"""Time per image of several images at once and of two threads, beside a dense runtime with as many."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from feather.deploy import compile_model, load
from scripts.deploy.contenders import contender
from scripts.deploy.subjects import Subject
from scripts.deploy.timing import interleave, summary

BATCHES = (1, 4, 16)
THREADS = (1, 2)
SECONDS = 4.0


def build(subject: Subject, directory: Path) -> None:
    """Compile what `measure` times."""
    for batch in BATCHES:
        for threads in THREADS:
            options: dict[str, Any] = {"name": f"net_{batch}_{threads}", "batch": batch, "threads": threads}
            if not (directory / f"{options['name']}.so").exists():
                compile_model(subject.model, subject.shape, directory, **options)


def measure(name: str, sparsity: float, subject: Subject, onnx: Path, directory: Path) -> list[dict[str, Any]]:
    """One row for each batch, number of threads and runtime. More threads get as many cores as there are."""
    rows = []
    for threads in THREADS:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, range(os.cpu_count() or 1) if threads > 1 else cores)
        for batch in BATCHES:
            images = np.random.default_rng(0).standard_normal((batch, *subject.shape)).astype(np.float32)
            runs = {
                "feather": load(directory / f"net_{batch}_{threads}.so"),
                "onnxruntime": contender("onnxruntime", onnx, threads),
            }
            for runtime, times in interleave(runs, images, SECONDS).items():
                own = {"model": name, "sparsity": sparsity if runtime == "feather" else 0.0, "runtime": runtime}
                rows.append({**own, "batch": batch, "threads": threads, **summary(times, batch)})
                print(rows[-1], flush=True)
        os.sched_setaffinity(0, cores)
    return rows
