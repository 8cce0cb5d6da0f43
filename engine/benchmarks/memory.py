"""Peak memory of sparse training against that of dense training and one copy of the weights.

What torch's allocator hands out is counted, to the byte; what the process takes from the system varies by a tenth
with the gaps between.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from engine.benchmarks.base import Row
from engine.benchmarks.overhead import BATCH_SIZE, SPARSITY, TARGETS, Contender
from engine.precision import resolve_precision

STAGES = (0.0, 0.1, 0.5)  # of the schedule: as pruning begins, in the ramp, at the target


def measure(quick: bool, device: torch.device, models: Sequence[str] = ()) -> list[Row]:
    """One row for each network. Each measurement is of a process of its own, where nothing else is in memory."""
    return [_row(name, device) for name in models or (list(TARGETS)[:1] if quick else list(TARGETS))]


def _row(name: str, device: torch.device) -> Row:
    (dense, weights), (sparse, _) = (_alone(name, sparsity, device) for sparsity in (0.0, SPARSITY))
    return {
        "name": f"peak memory, {name}, sparse / (dense + one copy)", "ratio": sparse / (dense + weights),
        "better": "lower", "target": 1.05, "slack": 0.05, "model": name, "batch_size": BATCH_SIZE,
        "dense_bytes": dense, "sparse_bytes": sparse, "copy_bytes": weights,
    }  # fmt: skip


def _alone(name: str, sparsity: float, device: torch.device) -> tuple[int, int]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak, (name, sparsity, device.type))


def peak(name: str, sparsity: float, device_type: str) -> tuple[int, int]:
    """Bytes of all tensors of some training steps at most, the network's included, and of its prunable weights."""
    device = torch.device(device_type)
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) if not on_gpu else nullcontext() as profiled:
        contender = Contender(name, sparsity, device, resolve_precision("auto", device))
        images = torch.randn(BATCH_SIZE, 3, 32, 32).to(device, memory_format=torch.channels_last)
        labels = torch.randint(0, 100, (BATCH_SIZE,)).to(device)
        for stage in STAGES:
            contender.sparsifier.step = int(stage * contender.sparsifier.total_steps)
            contender.step(images, labels)
    weights = 4 * contender.sparsifier.report().prunable
    if profiled is None:
        return torch.cuda.max_memory_allocated(device), weights
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    totals = [event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]"]
    return max(totals) - totals[0], weights
