"""How long runs will take, from finished runs of their kind on this hardware."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from engine.plan import Job
from engine.yaml_file import read_yaml

ROOT = Path(__file__).resolve().parents[1]


def known_results() -> list[dict[str, Any]]:
    """Results of earlier runs, here and committed, each with its ``config``; unreadable ones are left out."""
    found = []
    for path in [*Path("runs").glob("*/*/result.json"), *(ROOT / "results" / "runs").glob("*/*/result.json")]:
        try:
            content = json.loads(path.read_text())
            found.append({**content, "config": read_yaml(path.parent / "config.yaml")})
        except (OSError, ValueError, TypeError, yaml.YAMLError):
            continue
    return found


class Estimate:
    """Seconds that a run still needs.

    Args:
        results: of finished runs.
        hardware: of this machine, ``engine.records.environment()["hardware"]``.
        threads: that a run will have, where it is known.
    """

    def __init__(self, results: Iterable[dict[str, Any]], hardware: dict[str, Any], threads: int | None = None) -> None:
        self._results = [r for r in results if _same_machine(r.get("hardware") or {}, hardware)]
        self._threads = threads

    def seconds(self, job: Job) -> float | None:
        """None where no finished run is of the same network, data and batch size.

        Among those, the ones that are alike in more (precision, experiment, threads, method) count alone.
        """
        config = job.config
        alike = [result for result in self._results if _size(result["config"]) == _size(asdict(config))]
        closer: tuple[Callable[[dict[str, Any]], bool], ...] = (
            lambda r: config.trainer.precision in ("auto", r.get("precision")),
            lambda r: r.get("experiment") == config.experiment_name,
            lambda r: self._threads is None or r["hardware"].get("threads") == self._threads,
            lambda r: r.get("method") == config.method.name,
        )
        for is_closer in closer:
            alike = [r for r in alike if is_closer(r)] or alike
        if not alike:
            return None
        if config.trainer.max_steps is not None:
            return median(r["wall_seconds"] for r in alike)
        return median(r["wall_seconds"] / r["epochs"] for r in alike) * job.epochs_left


def _size(config: dict[str, Any]) -> list[Any]:
    """What an epoch's time depends on most."""
    model, dataset, trainer = (config.get(key) or {} for key in ("model", "dataset", "trainer"))
    return [
        model.get("name"), model.get("options") or {}, dataset.get("name"), dataset.get("image_size"),
        trainer.get("batch_size"), trainer.get("max_steps"),
    ]  # fmt: skip


def _same_machine(hardware: dict[str, Any], here: dict[str, Any]) -> bool:
    # virtual machines name processors of many generations alike
    return all(hardware.get(key) == here.get(key) for key in ("gpu", "cpu", "cpu_instructions"))


def makespan(seconds: Sequence[float], at_once: int) -> float:
    """How long jobs take in the given order, ``at_once`` side by side, each begun as soon as a place is free."""
    ends = [0.0] * max(at_once, 1)
    for needed in seconds:
        heapq.heappush(ends, heapq.heappop(ends) + needed)
    return max(ends)
