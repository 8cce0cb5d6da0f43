"""Finished runs read back from their directories and grouped into cells of equal settings."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from engine.config import NOT_HASHED

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

# What a table shows in columns of its own, or what names a run rather than how it trains.
_SHOWN = {
    *("seed", "sparsity", "experiment_name", "label"),
    *("model.name", "dataset.name", "method.name", "framework.name", "method.p", "method.theta"),
    *("trainer.epochs", "trainer.batch_size", "trainer.precision"),
}
# Where and how a run works, without influence on what it computes.
_WHERE = {*NOT_HASHED, "hydra", "config_hash"}


class ResultError(ValueError):
    """A run directory that cannot be believed; the message is one sentence that names the file."""


@dataclass(frozen=True)
class EpochRecord:
    """One evaluation: epoch, top-1 in percent, fraction of zeros."""

    epoch: float
    top1: float
    sparsity: float | None


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
            EpochRecord(r["epoch"], r["val/top1"], r.get("sparsity/global"))
            for r in epoch_records(self.directory / METRICS)
        ]


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


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings as ("a.b.c", value)."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, config


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
        config = yaml.safe_load((directory / CONFIG).read_text())
    except OSError as error:
        raise ResultError(f"{directory / CONFIG} cannot be read ({error.strerror}); collect the run again.") from None
    except yaml.YAMLError:
        raise ResultError(f"{directory / CONFIG} is damaged: it is not YAML; collect the run again.") from None
    if not isinstance(config, dict):
        raise ResultError(f"{directory / CONFIG} is damaged: it holds no settings; collect the run again.")
    run = Run(directory, result, dict(flatten(config)))
    run.history  # noqa: B018  (read now, so that a damaged file is named with the others)
    return run


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
class Setting:
    """Everything but sparsity and seed that tells two runs apart; one row of a table, one line of a figure."""

    model: str
    dataset: str
    method: str
    framework: str
    p: str
    theta: str
    epochs: str
    batch_size: str
    precision: str
    label: str
    options: str = ""


@dataclass(frozen=True)
class Cell:
    """Runs of one setting and one target sparsity that differ in their seed alone, by seed."""

    setting: Setting
    sparsity: float
    runs: tuple[Run, ...]

    def statistic(self, key: str) -> Statistic:
        """Over the seeds, of a number in ``result.json``."""
        return Statistic.of(run.result[key] for run in self.runs)

    def values(self, key: str) -> list[Any]:
        """The different values of ``key``, sorted."""
        return sorted({run.result[key] for run in self.runs})


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return "inf" if math.isinf(value) else f"{value:g}"
    return str(value)


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
        framework="" if dense else _text(result["framework"]),
        p="" if dense else _text(p),
        # The theta rule makes one row of several values: a row goes by what was asked for.
        theta="" if dense else "auto" if theta == "auto" else _text(result["theta"]),
        epochs=_text(result["epochs"]),
        batch_size=_text(result["batch_size"]),
        precision=result["precision"],
        label=result["label"],
    )


def _other_options(run: Run, dense: bool) -> dict[str, str]:
    """Settings without a column of their own."""
    unused = ("method", "framework", "sparsity_schedule") if dense else ()

    def counts(key: str) -> bool:
        top = key.split(".")[0]
        return key not in _SHOWN and key not in _WHERE and top not in _WHERE and top not in unused

    return {key: _text(value) for key, value in run.config.items() if counts(key)}


def _split_by_options(setting: Setting, runs: list[Run]) -> Iterator[tuple[Setting, list[Run]]]:
    """One group per combination of the options in which ``runs`` differ."""
    options = [_other_options(run, setting.method == "dense") for run in runs]
    keys = sorted({key for option in options for key in option})
    differing = [key for key in keys if len({option.get(key, "") for option in options}) > 1]
    groups: dict[str, list[Run]] = defaultdict(list)
    for run, option in zip(runs, options, strict=True):
        groups[", ".join(f"{key}={option.get(key, '')}" for key in differing)].append(run)
    for text, group in groups.items():
        yield replace(setting, options=text), group


def group_cells(runs: Iterable[Run]) -> tuple[list[Cell], list[str]]:
    """Cells in the order of a table, and one sentence for each run that would count a seed twice."""
    groups: dict[tuple[Setting, float], list[Run]] = defaultdict(list)
    for run in runs:
        groups[_setting(run), float(run.result["target_sparsity"])].append(run)
    cells, problems = [], []
    for (setting, sparsity), members in groups.items():
        for full_setting, group in _split_by_options(setting, members):
            seeds: dict[int, Run] = {}
            for run in sorted(group, key=lambda r: str(r.directory)):
                first = seeds.setdefault(run.result["seed"], run)
                if first is not run:
                    problems.append(
                        f"{run.directory} repeats seed {run.result['seed']} of {first.directory} "
                        "with the same settings and is left out."
                    )
            cells.append(Cell(full_setting, sparsity, tuple(seeds[seed] for seed in sorted(seeds))))
    return sorted(cells, key=_order), sorted(problems)


def _order(cell: Cell) -> tuple[Any, ...]:
    s = cell.setting
    return (s.dataset, s.model, s.method != "dense", *_row_order(s), cell.sparsity)


def _row_order(s: Setting) -> tuple[Any, ...]:
    def number(text: str) -> tuple[float, str]:
        try:
            return float(text), ""
        except ValueError:
            return math.inf, text

    # Full-length runs come before shortened ones.
    return (
        s.method,
        s.framework,
        number(s.p),
        number(s.theta),
        -number(s.epochs)[0],
        number(s.batch_size),
        *astuple(s),
    )


def row_names(settings: Iterable[Setting]) -> dict[Setting, str]:
    """Short names: the method, and of the rest only what the method's own rows differ in."""
    settings = list(dict.fromkeys(settings))
    names = {}
    for setting in settings:
        peers = [
            s for s in settings if (s.method, s.model, s.dataset) == (setting.method, setting.model, setting.dataset)
        ]
        parts = [setting.method]
        formats = [
            ("framework", "{}"),
            ("p", "p = {}"),
            ("theta", "theta = {}"),
            ("epochs", "{} epochs"),
            ("batch_size", "batch {}"),
            ("precision", "{}"),
            ("options", "{}"),
        ]
        for field, form in formats:
            if len({getattr(s, field) for s in peers}) > 1 and getattr(setting, field):
                parts.append(form.format(getattr(setting, field)))
        if len({s.label for s in peers}) > 1 and setting.label:
            parts.append(setting.label)
        names[setting] = ", ".join(parts)
    return names
