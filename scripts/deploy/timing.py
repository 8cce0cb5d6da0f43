"""Interleaved timing: contenders take turns of a few images, so that a slow moment of the machine meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from scripts.deploy.contenders import Run

TURN = 3
"""Runs that count when it is a contender's turn, after one that warms the caches."""
LEAST_ROUNDS = 12


def interleave(runs: Mapping[str, Run], images: NDArray[np.float32], seconds: float) -> dict[str, list[float]]:
    """Microseconds of every counted run of every contender on ``images``."""
    times: dict[str, list[float]] = {key: [] for key in runs}
    for run in runs.values():
        run(images)
    end = time.perf_counter() + seconds
    rounds = 0
    while time.perf_counter() < end or rounds < LEAST_ROUNDS:
        for key in list(runs) if rounds % 2 else list(runs)[::-1]:
            runs[key](images)  # the caches are another contender's
            for _ in range(TURN):
                start = time.perf_counter_ns()
                runs[key](images)
                times[key].append((time.perf_counter_ns() - start) / 1e3)
        rounds += 1
    return times


def summary(times: list[float], images: int = 1) -> dict[str, object]:
    """Median and quartiles, per image."""
    each = [time / images for time in times]
    return {"microseconds": statistics.median(each), "quartiles": statistics.quantiles(each, n=4)[::2]}
