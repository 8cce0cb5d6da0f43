"""Everything about speed that needs a GPU, in one command: python scripts/bench_gpu.py [--out FILE]

For each network: train.py's dense and sparse step, one by one and replayed from a CUDA graph; the sparse over the
dense one; peak memory; a full run's time at that rate; and the floors that memory traffic and arithmetic set.
`--profile` also counts how often the host waits while graphs are replayed over a whole schedule.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import feather  # noqa: E402
from engine.captured import WARM_UP, CapturedStep, CudaRecorder, Recorder  # noqa: E402
from engine.config import OptimizerConfig  # noqa: E402
from engine.distributed import Ranks  # noqa: E402
from engine.numerics import NumberGuard  # noqa: E402
from engine.optimization import create_optimizer  # noqa: E402
from engine.precision import resolve_precision  # noqa: E402
from engine.records import environment, write_json  # noqa: E402
from engine.step import TrainingStep  # noqa: E402
from models import create_model  # noqa: E402

# network: image size, classes, batch, epochs, images an epoch, seconds allowed for the full run (None: a rate is asked)
CASES = {
    "resnet20": (32, 100, 128, 160, 50_000, 90),
    "mobilenet_v1": (32, 100, 128, 160, 50_000, 120),
    "densenet40_24": (32, 100, 128, 160, 50_000, 300),
    "resnet50": (224, 1000, 256, 100, 1_281_167, None),
}
SPARSITY = 0.98


class Run:
    """Training steps of one network on one random batch, as train.py takes them.

    Args:
        name: of the network.
        sparse: Feather at 98 %, of which all but the first step have zeros; else dense.
        recorder: records the steps; None takes them one by one.
        total_steps: of the schedule.
        shape: batch size and image size; those of ``CASES`` by default.
    """

    def __init__(
        self,
        name: str,
        sparse: bool,
        device: torch.device,
        recorder: Recorder | None = None,
        total_steps: int = 10**6,
        shape: tuple[int, int] | None = None,
    ) -> None:
        size, classes, batch, *_ = CASES[name]
        batch, size = shape or (batch, size)
        torch.manual_seed(0)
        layout = torch.channels_last
        self.model = create_model(name, num_classes=classes).to(device, memory_format=layout).train()
        self.images = torch.randn(batch, 3, size, size, device=device).to(memory_format=layout)
        self.labels = torch.randint(0, classes, (batch,), device=device)
        precision = resolve_precision("bf16" if device.type == "cuda" else "fp32", device)
        captured = recorder is not None
        optimizer = create_optimizer(self.model, OptimizerConfig(name="sgd", lr=0.01), captured=captured)
        self.sparsifier = feather.create(
            "feather" if sparse else "dense", self.model, optimizer, sparsity=SPARSITY if sparse else 0.0,
            total_steps=total_steps,
        )  # fmt: skip
        scaler = precision.scaler()
        guard = NumberGuard(self.model, "raise", scaler, Ranks(0, 1, 0, device), precision.autocast)
        self.take: TrainingStep | CapturedStep
        self.take = step = TrainingStep(self.model, self.model, optimizer, scaler, guard, precision, clip=3.0)
        if recorder is not None:
            self.sparsifier.make_recordable()
            self.take = CapturedStep(step, self.sparsifier, recorder)
        self.taken = 0

    def __call__(self) -> None:
        self.take(self.taken, self.images, self.labels, len(self.labels))
        self.taken += 1

    def warm_up(self) -> None:
        """Until the steps that follow are all alike: recorded, where they are recorded at all."""
        for _ in range(WARM_UP + 2):
            self()


def rate(step: Callable[[], None], count: int) -> float:
    """Seconds of one of ``count`` steps."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def floors(run: Run) -> dict[str, float]:
    """Seconds that this card's own copy and multiplication rates allow at best for what a step moves and multiplies."""
    n = 1 << 28
    source, target = (torch.empty(n, dtype=torch.uint8, device="cuda") for _ in range(2))
    bytes_per_second = 2 * n / rate(lambda: target.copy_(source) and None, 20)
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    flops_per_second = 2 * 8192**3 / rate(lambda: torch.mm(square, square) and None, 10)
    macs = feather.count_flops(run.model, run.images[:1]).dense
    moved = activations(run) * 2 * 3  # bf16; written forward, read backward, gradients written
    return {
        "arithmetic_floor_seconds": 3 * 2 * macs * len(run.images) / flops_per_second,
        "memory_floor_seconds": moved / bytes_per_second,
    }


def activations(run: Run) -> int:
    """Elements that the convolutions, norms and linear layers of one forward pass put out."""
    counted: list[int] = []
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: counted.append(output.numel()))
        for module in run.model.modules()
        if isinstance(module, kinds)
    ]
    with torch.no_grad():
        run.model(run.images)
    for hook in hooks:
        hook.remove()
    return sum(counted)


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One network: eager and captured, dense and sparse, in turn."""
    *_, batch, epochs, per_epoch, allowed = CASES[name]
    device = torch.device("cuda")
    runs: dict[str, Run] = {}
    memory: dict[str, int] = {}
    for kind, sparse in (("dense", False), ("sparse", True)):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        runs[f"{kind}_eager"] = Run(name, sparse, device)
        runs[f"{kind}_eager"].warm_up()
        memory[kind] = torch.cuda.max_memory_allocated() - before
        runs[f"{kind}_captured"] = Run(name, sparse, device, CudaRecorder(device))
        runs[f"{kind}_captured"].warm_up()
    found: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            found[key].append(rate(run, 20))
    seconds = {key: statistics.median(values) for key, values in found.items()}
    total = epochs * -(-per_epoch // batch)
    weights = 4 * runs["sparse_eager"].sparsifier.report().prunable
    return {
        "model": name, "batch_size": batch, "seconds": seconds,
        "ratio_eager": seconds["sparse_eager"] / seconds["dense_eager"],
        "ratio_captured": seconds["sparse_captured"] / seconds["dense_captured"],
        "images_per_second": batch / seconds["sparse_captured"],
        "full_run_seconds_of_steps": total * seconds["sparse_captured"], "full_run_seconds_allowed": allowed,
        "memory_ratio": memory["sparse"] / (memory["dense"] + weights), **floors(runs["dense_eager"]),
    }  # fmt: skip


def host_waits(name: str) -> dict[str, int]:
    """How often the host waits in 100 steps over a whole schedule, as the profiler sees it, by what it calls.

    ``cudaEventSynchronize`` is the guard's look at the step before, while the device works on this one.
    """
    device = torch.device("cuda")
    run = Run(name, True, device, CudaRecorder(device), total_steps=100 + WARM_UP + 2)
    run.warm_up()
    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        for _ in range(100):
            run()
    events = profile.key_averages()
    return {e.key: e.count for e in events if "Synchronize" in e.key or "_local_scalar" in e.key}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "gpu.json")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA GPU, and torch finds none")
    rows = []
    for name in args.models:
        row = measure(name, args.rounds)
        if args.profile:
            row["host_waits_in_100_steps"] = host_waits(name)
        rows.append(row)
        print(
            f"{name:14} captured {row['images_per_second']:9.0f} images/s, sparse / dense {row['ratio_captured']:.3f}"
        )
    write_json(args.out, {"format": 1, "device": "cuda", **environment(), "rows": rows})
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
