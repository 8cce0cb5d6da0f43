"""The exact quantile against `torch.sort` of all magnitudes: time and peak memory."""

from __future__ import annotations

import torch

import feather
from engine.allocation import keep_freed_memory
from engine.benchmarks.base import PeakMemory, Row, median_ratio, medians, pairs

SIZES = {"1.1 M": (1_092_960, 35.0), "3.3 M": (3_287_488, 35.0), "25.5 M": (25_502_912, 20.0)}


def measure(quick: bool, device: torch.device) -> list[Row]:
    """One row for each number of weights and sparsity."""
    keep_freed_memory()  # as training does
    rows = []
    for label, (size, target) in SIZES.items():
        if quick and size > 10**7:
            continue
        weights = [torch.randn(size, generator=torch.Generator().manual_seed(0)).mul_(0.05).to(device)]
        large = size > 10**7  # sorting takes seconds
        count, sparsities = (3, (0.98,)) if large else (5 if quick else 7, (0.5, 0.9, 0.98))
        rows += [_row(label, weights, sparsity, target, count, device) for sparsity in sparsities]
    return rows


def _row(
    label: str,
    weights: list[torch.Tensor],
    sparsity: float,
    target: float,
    count: int,
    device: torch.device,
) -> Row:
    plain = feather.magnitude_quantile(weights, sparsity, algorithm="sort")

    def select() -> torch.Tensor:
        return feather.magnitude_quantile(weights, sparsity)

    ours = select()
    found = pairs(lambda: weights[0].abs().sort(), select, count, device)
    slow, fast = medians(found)
    copy = sum(w.numel() * w.element_size() for w in weights)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        select()
        extra = torch.cuda.max_memory_allocated(device) - before
    else:
        with PeakMemory() as memory:
            select()
        extra = memory.extra
    return {
        "name": f"selection, {label}, {sparsity:g}", "ratio": median_ratio(found), "better": "higher",
        "target": target if device.type == "cpu" else None,
        "plain_seconds": slow, "seconds": fast, "bit_equal": bool(torch.equal(plain, ours)),
        "extra_memory_in_copies": None if extra is None else extra / copy,
    }  # fmt: skip
