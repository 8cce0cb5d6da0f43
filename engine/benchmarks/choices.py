"""What training chooses against each alternative: layout, optimizer, compilation, memory that is kept.

A ratio is the time of a dense training step with one choice changed over that with the choices of training.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Sequence

import torch

from engine.allocation import keep_freed_memory, return_freed_memory
from engine.benchmarks.base import Row, gradients, median_ratio, medians, pairs, seconds
from engine.precision import resolve_precision
from models import create_model

NETWORKS = ("resnet20", "mobilenet_v1", "densenet40_24")
ALTERNATIVES = ("NCHW", "fused optimizer", "compiled", "memory returned")
BATCH_SIZE = 128


def training_step(name: str, device: torch.device, alternative: str = "") -> Callable[[], None]:
    """A dense training step of a network as train.py makes it, with one choice changed."""
    torch.manual_seed(0)
    layout = torch.contiguous_format if alternative == "NCHW" else torch.channels_last
    model = create_model(name, num_classes=100).to(device, memory_format=layout).train()
    precision = resolve_precision("auto", device, model)
    fused = alternative == "fused optimizer"
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, foreach=not fused, fused=fused
    )
    network = torch.compile(model) if alternative == "compiled" else model
    images = torch.randn(BATCH_SIZE, 3, 32, 32).to(device, memory_format=layout)
    labels = torch.randint(0, 100, (BATCH_SIZE,)).to(device)

    def step() -> None:
        gradients(model, optimizer, images, labels, precision, network)
        optimizer.step()

    return step


def measure(quick: bool, device: torch.device, models: Sequence[str] = ()) -> list[Row]:
    """One row for each network and alternative; ``quick`` compiles nothing, which takes minutes."""
    keep_freed_memory()
    rows = []
    for name in models or (NETWORKS[:1] if quick else NETWORKS):
        chosen = training_step(name, device)
        for alternative in ALTERNATIVES:
            if quick and alternative == "compiled":
                continue
            if alternative == "memory returned":
                found = [_memory(name, device) for _ in range(1 if quick else 3)]
            else:
                found = pairs(training_step(name, device, alternative), chosen, 2 if quick else 8, device)
            slow, fast = medians(found)
            rows.append({
                "name": f"choices, {name}, {alternative} / as chosen", "ratio": median_ratio(found), "better": "higher",
                "target": 0.97, "model": name, "alternative": alternative, "seconds": slow, "chosen_seconds": fast,
            })  # fmt: skip
    return rows


def _memory(name: str, device: torch.device) -> tuple[float, float]:
    """Seconds of a step where freed memory is returned, and where it is kept.

    In a process each: memory that was kept once lies about in pieces when it is returned.
    """
    times = []
    for kept in (False, True):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            times.append(pool.apply(_seconds_alone, (name, device.type, kept)))
    return times[0], times[1]


def _seconds_alone(name: str, device_type: str, kept: bool) -> float:
    (keep_freed_memory if kept else return_freed_memory)()
    device = torch.device(device_type)
    step = training_step(name, device)
    step()
    step()
    return statistics.median(seconds(step, device) for _ in range(3))
