"""How the cost of a sparse step grows: with weights, layers, the size of images and processes.

Selection and operator at the target sparsity, per weight and relative to the smallest case: 1 is linear growth.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import feather
from engine.allocation import keep_freed_memory
from engine.benchmarks.base import PeakMemory, Row, medians, pairs, seconds
from feather.operator import p_threshold_all
from models import create_model

WEIGHTS = {"1 M": 10**6, "10 M": 10**7, "100 M": 10**8, "1 B": 10**9}
LAYERS = (1, 10, 100, 1000)
IMAGE_SIZES = (16, 32, 64)
PROCESSES = (1, 2)
BATCH_SIZE = 64  # over all processes
SPARSITY = 0.98


def measure(quick: bool, device: torch.device) -> list[Row]:
    """Rows of all four; ``quick`` leaves out what takes gigabytes."""
    rows: list[Row] = []
    for label, size in WEIGHTS.items():
        if quick and size > 10**7:
            continue
        rows += _cost(f"{label} weights", [torch.randn(size, device=device)], device, rows[:2])
    many: list[Row] = []
    for layers in LAYERS:
        weights = list(torch.randn(4 * 10**6, device=device).chunk(layers))
        many += _cost(f"4 M weights in {layers} layers", weights, device, many[:2])
    return rows + many + _image_sizes(device) + (_processes() if device.type == "cpu" else [])


def _cost(what: str, weights: Sequence[torch.Tensor], device: torch.device, first: Sequence[Row]) -> list[Row]:
    """Selection and operator on ``weights``, per weight, against the ``first`` rows."""
    size = sum(weight.numel() for weight in weights)
    threshold = feather.magnitude_quantile(weights, SPARSITY)

    tasks: dict[str, Callable[[], object]] = {  # of all layers at once, as in training under a global threshold
        "selection": lambda: feather.magnitude_quantile(weights, SPARSITY),
        "operator": lambda: p_threshold_all(weights, [threshold] * len(weights)),
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


def _processes() -> list[Row]:
    """A step over processes of one thread each that share the batch by DistributedDataParallel on this machine."""
    times: dict[int, tuple[float, float]] = {}
    for count in PROCESSES:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_train, (count, folder), nprocs=count)
            times[count] = torch.load(Path(folder) / "times.pt")
    return [
        {
            "name": f"scaling, sparse / dense step, ResNet-20, {count} processes, batch {BATCH_SIZE}",
            "better": "lower", "target": None, "ratio": sparse / dense, "slack": 0.1, "dense_seconds": dense,
            "sparse_seconds": sparse, "speedup": times[1][1] / sparse,
        }
        for count, (dense, sparse) in times.items()
    ]  # fmt: skip


def _train(rank: int, count: int, folder: str) -> None:
    """One process: rank 0 writes the median seconds of a dense and a sparse step."""
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", count), rank=rank, world_size=count)
    steps = []
    for sparsity in (0.0, SPARSITY):
        torch.manual_seed(0)
        model = create_model("resnet20", num_classes=100).to(memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, foreach=True)
        wrapped = DistributedDataParallel(model)
        feather.create("feather" if sparsity else "dense", wrapped, optimizer, sparsity=sparsity, total_steps=10**6,
                       schedule="one_shot")  # fmt: skip
        images = torch.randn(BATCH_SIZE // count, 3, 32, 32).to(memory_format=torch.channels_last)
        labels = torch.zeros(len(images), dtype=torch.long)

        def step(wrapped=wrapped, optimizer=optimizer, images=images, labels=labels) -> None:  # type: ignore[no-untyped-def]
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(wrapped(images), labels).backward()
            optimizer.step()

        steps.append(step)
    found = pairs(*steps, 5)
    if rank == 0:
        torch.save(medians(found), f"{folder}/times.pt")
    dist.destroy_process_group()
