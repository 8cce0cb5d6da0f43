"""How the cost of a sparse step grows: with weights, layers and the size of images.

Selection and operator at the target sparsity, per weight and relative to the smallest case: 1 is linear growth.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

import feather
from engine.benchmarks.base import PeakMemory, Row, seconds
from models import create_model

WEIGHTS = {"1 M": 10**6, "10 M": 10**7, "100 M": 10**8, "1 B": 10**9}
LAYERS = (1, 10, 100, 1000)
IMAGE_SIZES = (16, 32, 64)
SPARSITY = 0.98


def measure(quick: bool, device: torch.device) -> list[Row]:
    """Rows of all three; ``quick`` leaves out what takes gigabytes."""
    rows: list[Row] = []
    for label, size in WEIGHTS.items():
        if quick and size > 10**7:
            continue
        rows += _cost(f"{label} weights", [torch.randn(size, device=device)], device, rows[:2])
    many: list[Row] = []
    for layers in LAYERS:
        weights = list(torch.randn(4 * 10**6, device=device).chunk(layers))
        many += _cost(f"4 M weights in {layers} layers", weights, device, many[:2])
    return rows + many + _image_sizes(device)


def _cost(what: str, weights: Sequence[torch.Tensor], device: torch.device, first: Sequence[Row]) -> list[Row]:
    """Selection and operator on ``weights``, per weight, against the ``first`` rows."""
    size = sum(weight.numel() for weight in weights)
    threshold = feather.magnitude_quantile(weights, SPARSITY)

    def operator() -> None:  # one layer at a time, as training does it
        for weight in weights:
            feather.p_threshold(weight, threshold)

    tasks: dict[str, Callable[[], object]] = {
        "selection": lambda: feather.magnitude_quantile(weights, SPARSITY),
        "operator": operator,
    }
    rows: list[Row] = []
    for index, (name, task) in enumerate(tasks.items()):
        with PeakMemory() as memory:
            task()
        times = [seconds(task, device) for _ in range(2 if size > 10**8 else 5)]
        per_weight = statistics.median(times) / size
        rows.append({
            "name": f"scaling, {name}, {what}", "better": "lower", "target": None, "slack": 1.0,
            "ratio": per_weight / first[index]["seconds_per_weight"] if first else 1.0,
            "seconds_per_weight": per_weight, "seconds": per_weight * size,
            "extra_memory_in_copies": None if memory.extra is None else memory.extra / (4 * size),
        })  # fmt: skip
    return rows


def _image_sizes(device: torch.device) -> list[Row]:
    """What a sparse step adds does not depend on the images; the dense step does."""
    torch.manual_seed(0)
    model = create_model("resnet20", num_classes=100).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, foreach=True)
    rows = []
    steps = {}
    for size in IMAGE_SIZES:
        images = torch.randn(32, 3, size, size, device=device).to(memory_format=torch.channels_last)

        def step(images: torch.Tensor = images) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(images), torch.zeros(32, dtype=torch.long, device=device)).backward()
            optimizer.step()

        step()
        steps[size] = statistics.median(seconds(step, device) for _ in range(3))
    dense = statistics.median(seconds(optimizer.step, device) for _ in range(9))
    feather.create("feather", model, optimizer, sparsity=SPARSITY, total_steps=10**6, schedule="one_shot")
    optimizer.step()
    extra = statistics.median(seconds(optimizer.step, device) for _ in range(9)) - dense
    for size, whole in steps.items():
        rows.append({
            "name": f"scaling, sparse / dense step, ResNet-20, {size} pixels, batch 32", "better": "lower",
            "target": None, "ratio": 1 + extra / whole, "dense_seconds": whole, "extra_seconds": extra, "slack": 0.1,
        })  # fmt: skip
    return rows
