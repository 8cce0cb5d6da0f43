"""How everything is measured: what is compared alternates in one process, and the median of the pairs' ratios counts.

A ratio does not depend on how fast a machine is, and pairs share its slow and fast moments.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from engine.precision import Precision

Row = dict[str, Any]  # "name", "ratio", "target", "better" ("lower" or "higher"), and what else there is to tell

# What tells seconds. CPU seconds of this process, of one thread, stay comparable while others use the machine.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = CLOCKS["wall"]

PLAIN_SLACK = 0.15  # by which a ratio may be worse than the committed one before it counts as a regression


def use_clock(name: str) -> None:
    """Choose the clock; that of CPU seconds goes with a single thread, since waiting threads use them up as well."""
    global _clock
    _clock = CLOCKS[name]
    if name == "cpu":
        torch.set_num_threads(1)


def now() -> float:
    """Seconds of the clock in use."""
    return _clock()


def seconds(task: Callable[[], object], device: torch.device | None = None) -> float:
    """Of one call, until the device has done the work."""
    wait(device)
    start = now()
    task()
    wait(device)
    return now() - start


def wait(device: torch.device | None) -> None:
    """Until a GPU has done what it was given."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def gradients(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    precision: Precision,
    network: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """A training step as train.py makes it, up to the optimizer's: forward, backward and clipping.

    Args:
        model: holds the weights.
        network: computes with them, where that is not ``model`` itself: its compiled form.
    """
    optimizer.zero_grad(set_to_none=True)
    with precision.autocast():
        loss = F.cross_entropy((model if network is None else network)(images).float(), labels)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 3.0)


def pairs(
    first: Callable[[], object], second: Callable[[], object], count: int, device: torch.device | None = None
) -> list[tuple[float, float]]:
    """Seconds of ``count`` calls of each after one that warms up, in changing order."""
    found = []
    for index in range(count + 1):
        if index % 2:
            pair = seconds(first, device), seconds(second, device)
        else:
            later = seconds(second, device)
            pair = seconds(first, device), later
        found.append(pair)
    return found[1:]


def median_ratio(found: list[tuple[float, float]]) -> float:
    """Of the pairs' first over their second."""
    return statistics.median(first / second for first, second in found)


def medians(found: list[tuple[float, float]]) -> tuple[float, float]:
    """Seconds of the first and of the second."""
    return statistics.median(first for first, _ in found), statistics.median(second for _, second in found)


def reaches(row: Row) -> bool | None:
    """Whether a row meets its target; None where it has none."""
    if row.get("target") is None:
        return None
    return bool(row["ratio"] <= row["target"] if row["better"] == "lower" else row["ratio"] >= row["target"])


def is_worse(row: Row, committed: Row) -> bool:
    """Whether a newly measured row has regressed against the committed one by more than noise."""
    if row["better"] == "lower":  # an overhead: what is above 1 may not grow by more than the slack
        return bool(row["ratio"] > committed["ratio"] + row.get("slack", PLAIN_SLACK))
    return bool(row["ratio"] < committed["ratio"] * (1 - row.get("slack", 2 * PLAIN_SLACK)))


class PeakMemory:
    """The most memory that the process takes inside beyond what it had before, in bytes; None where Linux is not."""

    def __enter__(self) -> PeakMemory:
        self.before = self._read("VmRSS") if self._reset() else None
        self.extra: int | None = None
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            self.extra = max(self._read("VmHWM") - self.before, 0)

    @staticmethod
    def _reset() -> bool:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    @staticmethod
    def _read(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024
