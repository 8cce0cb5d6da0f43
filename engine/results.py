"""Finished runs read back from their directories and grouped into cells of equal settings."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from engine.config import Config
from engine.settings import Setting, flatten, modifier_name, option_texts, order, scale_name, text_of
from engine.yaml_file import read_yaml

FORMAT = 1
RESULT, CONFIG, METRICS = "result.json", "config.yaml", "metrics.jsonl"

_NUMBER = (int, float)
_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "experiment": str,
    "model": str,
    "dataset": str,
    "method": str,
    "framework": (str, type(None)),
    "p": (int, float, str, type(None)),
    "theta": (int, float, str, type(None)),
    "seed": int,
    "epochs": _NUMBER,
    "batch_size": int,
    "precision": str,
    "target_sparsity": _NUMBER,
    "achieved_sparsity": _NUMBER,
    "nonzeros": int,
    "prunable": int,
    "final_top1": _NUMBER,
    "best_top1": _NUMBER,
    "flops": _NUMBER,
    "dense_flops": _NUMBER,
    "layers": list,
    "wall_seconds": _NUMBER,
    "images_per_second": _NUMBER,
    "device": str,
    "config_hash": str,
    "label": str,
}


class ResultError(ValueError):
    """A run directory that cannot be believed; the message is one sentence that names the file."""


@dataclass(frozen=True)
class EpochRecord:
    """One evaluation: epoch, top-1 in percent, fractions of zeros found and asked for at that moment.

    ``mask_change`` is the fraction of the prunable weights that entered or left the mask in the epoch's last step.
    """

    epoch: float
    top1: float
    sparsity: float | None
    target: float | None
    mask_change: float | None


@dataclass(frozen=True)
class Run:
    """A finished run: its directory, ``result.json`` and the flattened ``config.yaml``."""

    directory: Path
    result: dict[str, Any]
    config: dict[str, Any]

    @cached_property
    def history(self) -> list[EpochRecord]:
        """The evaluations in ``metrics.jsonl``, by epoch; after a resume the later of two records of an epoch counts.

        Raises:
            ResultError: a line is damaged.
        """
        return [
            EpochRecord(
                r["epoch"],
                r["val/top1"],
                *(r.get(f"sparsity/{key}") for key in ("global", "target", "mask_change")),
            )
            for r in epoch_records(self.directory / METRICS)
        ]

    @property
    def settled_mask_change(self) -> float | None:
        """Mean ``mask_change`` over the epochs after the target is reached; None for a dense run and where unknown.

        Before, the mask has to change because the sparsity grows.
        """
        target = self.result["target_sparsity"]
        changes = [
            record.mask_change
            for record in self.history
            if record.mask_change is not None and record.target is not None and record.target >= target - 1e-9
        ]
        return statistics.fmean(changes) if target and changes else None


def epoch_records(path: Path) -> list[dict[str, Any]]:
    """Records of ``metrics.jsonl`` that hold an evaluation, one per epoch (the last one written), in order.

    Raises:
        ResultError: the file is missing or a line is damaged.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ResultError(f"{path} cannot be read ({error.strerror}); collect the run again.") from None
    records: dict[float, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if "val/top1" in record:
                float(record["val/top1"])
                records[float(record["epoch"])] = record
        except (ValueError, KeyError, TypeError):
            raise ResultError(f"{path} is damaged in line {number}; collect the run again.") from None
    return [records[epoch] for epoch in sorted(records)]


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A flattened configuration, with the schema's value for every key that is younger than it."""
    defaults = {key: value for key, value in flatten(asdict(Config())) if value != "???"}
    return defaults | dict(flatten(config))


def read_result(path: Path) -> dict[str, Any]:
    """Read and check one ``result.json``.

    Raises:
        ResultError: missing, not JSON, of another format, incomplete, or with numbers that contradict each other.
    """
    try:
        result = json.loads(path.read_text())
    except OSError as error:
        raise ResultError(f"{path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise ResultError(f"{path} is damaged ({error}); delete it or collect the run again.") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        found = result.get("format") if isinstance(result, dict) else type(result).__name__
        raise ResultError(f"{path} has format {found!r}; this report reads format {FORMAT}.")
    missing = [key for key in _REQUIRED if key not in result]
    if missing:
        raise ResultError(f"{path} is incomplete: it lacks {', '.join(missing)}.")
    for key, kind in _REQUIRED.items():
        if not isinstance(result[key], kind) or isinstance(result[key], bool):
            raise ResultError(f"{path} is damaged: {key} is {result[key]!r}.")
    for key in ("final_top1", "best_top1"):
        if not 0 <= result[key] <= 100:
            raise ResultError(f"{path} is damaged: {key} is {result[key]!r}, expected a percentage from 0 to 100.")
    _check_counts(path, result)
    return result


def _check_counts(path: Path, result: dict[str, Any]) -> None:
    prunable, nonzeros = result["prunable"], result["nonzeros"]
    try:
        size = sum(layer["size"] for layer in result["layers"])
        zeros = sum(layer["zeros"] for layer in result["layers"])
    except (TypeError, KeyError):
        raise ResultError(f"{path} is damaged: a layer lacks its size or zeros.") from None
    if (size, size - zeros) != (prunable, nonzeros):
        raise ResultError(
            f"{path} is damaged: its layers add up to {size - zeros} non-zeros of {size}, "
            f"not to the {nonzeros} of {prunable} that it states."
        )
    if not prunable or abs(result["achieved_sparsity"] - (1 - nonzeros / prunable)) > 1e-6:
        raise ResultError(
            f"{path} is damaged: achieved_sparsity {result['achieved_sparsity']} is not that of "
            f"{nonzeros} non-zeros of {prunable}."
        )


def read_run(directory: Path) -> Run:
    """Read the run in ``directory``.

    Raises:
        ResultError: not finished, or a file is missing or damaged.
    """
    if not (directory / RESULT).exists():
        raise ResultError(f"{directory} has no {RESULT}: the run has not finished, start it again to finish it.")
    result = read_result(directory / RESULT)
    try:
        config = read_yaml(directory / CONFIG)
    except OSError as error:
        raise ResultError(f"{directory / CONFIG} cannot be read ({error.strerror}); collect the run again.") from None
    except yaml.YAMLError:
        raise ResultError(f"{directory / CONFIG} is damaged: it is not YAML; collect the run again.") from None
    if not isinstance(config, dict):
        raise ResultError(f"{directory / CONFIG} is damaged: it holds no settings; collect the run again.")
    run = Run(directory, result, with_defaults(config))
    _check_same_run(run)
    run.history  # noqa: B018  (read now, so that a damaged file is named with the others)
    return run


def _check_same_run(run: Run) -> None:
    result, config = run.result, run.config
    stated = {
        "model": config.get("model.name"),
        "dataset": config.get("dataset.name"),
        "method": config.get("method.name"),
        "seed": config.get("seed"),
        "target_sparsity": config.get("sparsity"),
    }
    for key, value in stated.items():
        if value is not None and value != result[key]:
            raise ResultError(
                f"{run.directory} mixes two runs: {key} is {result[key]!r} in {RESULT} and {value!r} in {CONFIG}; "
                "collect the run again."
            )


def find_runs(root: Path) -> list[Path]:
    """Directories below ``root`` that hold a run, finished or not, sorted."""
    return sorted({file.parent for name in (RESULT, CONFIG) for file in root.rglob(name)})


def read_runs(directories: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Runs that can be read, and one sentence for each that cannot."""
    runs, problems = [], []
    for directory in directories:
        try:
            runs.append(read_run(directory))
        except ResultError as error:
            problems.append(str(error))
    return runs, problems


@dataclass(frozen=True)
class Statistic:
    """Mean, sample standard deviation (None for n = 1) and number of values."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Statistic:
        values = list(values)
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Cell:
    """Runs of one setting and one target sparsity that differ in their seed alone, by seed."""

    setting: Setting
    sparsity: float
    runs: tuple[Run, ...]

    def statistic(self, key: str) -> Statistic:
        """Over the seeds, of a number in ``result.json``."""
        return Statistic.of(run.result[key] for run in self.runs)

    @property
    def settled_mask_change(self) -> Statistic | None:
        """Over the seeds that know it; None where none does."""
        values = [run.settled_mask_change for run in self.runs]
        known = [value for value in values if value is not None]
        return Statistic.of(known) if known else None

    @property
    def off_target(self) -> bool:
        """Whether more or fewer weights are left than were asked for, by 5 %: some methods learn how many."""
        return abs(self.statistic("achieved_sparsity").mean - self.sparsity) > 0.05 * (1 - self.sparsity)

    def values(self, key: str) -> list[Any]:
        """The different values of ``key``, sorted."""
        return sorted({run.result[key] for run in self.runs})


def _setting(run: Run) -> Setting:
    result = run.result
    dense = result["target_sparsity"] == 0
    theta = run.config.get("method.theta")
    # JSON has no infinity: hard thresholding's order stands in the config alone.
    p = run.config.get("method.p") if result["p"] is None else result["p"]
    return Setting(
        model=result["model"],
        dataset=result["dataset"],
        method="dense" if dense else result["method"],
        framework="" if dense else text_of(result["framework"]),
        p="" if dense else text_of(p),
        # The theta rule makes one row of several values: a row goes by what was asked for.
        theta="" if dense else "auto" if theta == "auto" else text_of(result["theta"]),
        epochs=text_of(result["epochs"]),
        batch_size=text_of(result["batch_size"]),
        precision=result["precision"],
        label=result["label"],
        modifier=modifier_name(run.config),
        scale=scale_name(run.config, result["label"]),
    )


def group_cells(runs: Iterable[Run]) -> tuple[list[Cell], list[str]]:
    """Cells in the order of a table, and one sentence for each run that would count a seed twice."""
    runs = sorted(runs, key=lambda run: str(run.directory))
    members = [(_setting(run), float(run.result["target_sparsity"]), run.config) for run in runs]
    groups: dict[tuple[Setting, float], dict[int, Run]] = defaultdict(dict)
    problems = []
    for run, (setting, sparsity, _), text in zip(runs, members, option_texts(members), strict=True):
        first = groups[replace(setting, options=text), sparsity].setdefault(run.result["seed"], run)
        if first is not run:
            problems.append(
                f"{run.directory} repeats seed {run.result['seed']} of {first.directory} "
                "with the same settings and is left out."
            )
    cells = [
        Cell(setting, sparsity, tuple(seeds[seed] for seed in sorted(seeds)))
        for (setting, sparsity), seeds in groups.items()
    ]
    return sorted(cells, key=lambda cell: order(cell.setting, cell.sparsity)), sorted(problems)
