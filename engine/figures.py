"""What the figures show: pure functions from cells to plotted data. ``engine.drawing`` makes the pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

from engine.picture import Data
from engine.results import Cell, EpochRecord, Statistic
from engine.settings import Setting, comparable, network_title, row_names

Value = TypeVar("Value")


def plots(name: str, cells: list[Cell]) -> dict[str, Data]:
    """All figures of an experiment by the stem of their file: one with the curves, the others one per table."""
    curve = curve_data(cells)
    found = {f"{name}_curve": curve} if curve else {}
    groups = comparable(cells)
    for stem, group in zip(_stems(name, [group[0].setting for group in groups]), groups, strict=True):
        for kind, make in PER_TABLE.items():
            if data := make(group):
                found[f"{stem}_{kind}"] = data
    proxy = any(cell.setting.scale == "proxy" for cell in cells)
    return {stem: data | {"proxy": proxy} for stem, data in found.items()}


def _stems(name: str, firsts: list[Setting]) -> list[str]:
    """File names of groups by what they differ in, numbered where that is in words alone."""
    fields = [f for f in ("model", "dataset", "epochs", "precision") if len({getattr(s, f) for s in firsts}) > 1]
    stems = ["_".join([name, *(getattr(s, field) for field in fields)]) for s in firsts]
    return stems if len(set(stems)) == len(stems) else [f"{stem}_{i}" for i, stem in enumerate(stems, 1)]


def _title(cells: list[Cell]) -> str:
    setting = cells[0].setting
    return "\n".join(filter(None, [network_title(setting), setting.label]))


def curve_data(cells: list[Cell]) -> Data | None:
    """Accuracy against sparsity, a panel per table; None without a sparse run."""

    def point(cell: Cell) -> Data:
        top1 = cell.statistic("final_top1")
        return {"sparsity": cell.statistic("achieved_sparsity").mean, "mean": top1.mean, "std": top1.std, "n": top1.n}

    panels = []
    names = row_names((cell.setting for cell in cells), panels=True)
    for group in comparable(cells):
        sparse = [cell for cell in group if cell.sparsity]
        lines: dict[str, list[Data]] = {}
        for cell in sparse:
            lines.setdefault(names[cell.setting], []).append(point(cell))
        dense = {names[cell.setting]: point(cell) for cell in group if not cell.sparsity}
        if lines:
            ticks = sorted({cell.sparsity for cell in sparse})
            panels.append({"title": _title(group), "lines": lines, "dense": dense, "ticks": ticks})
    return {"figure": "curve", "panels": panels} if panels else None


def training_data(cells: list[Cell]) -> Data | None:
    """Accuracy and sparsity by epoch of one network, mean over the seeds; None where no run has a history."""

    def line(cell: Cell) -> Data | None:
        epochs = _epochs(cell)
        return (
            {
                "epoch": [records[0].epoch for records in epochs],
                "top1": [_mean(r.top1 for r in records) for records in epochs],
                "zeros": [_mean(r.sparsity or 0.0 for r in records) for records in epochs],
            }
            if epochs
            else None
        )

    return _panels("training", cells, line, dense=True)


def mask_data(cells: list[Cell]) -> Data | None:
    """Fraction of the weights that enter or leave the mask per step, by epoch; None where no run knows it."""

    def line(cell: Cell) -> Data | None:
        epochs = _epochs(cell)
        if not epochs or any(r.mask_change is None for records in epochs for r in records):
            return None
        changes = [Statistic.of(r.mask_change or 0.0 for r in records) for records in epochs]
        return {
            "epoch": [records[0].epoch for records in epochs],
            "mean": [change.mean for change in changes],
            "std": [change.std for change in changes],
        }

    return _panels("mask", cells, line, dense=False)


def layers_data(cells: list[Cell]) -> Data | None:
    """Fraction of weights left in each layer of one network, mean over the seeds; None without a sparse run."""
    layers = layer_names(cells[0]) if cells else []
    data = _panels("layers", cells, lambda cell: {"left": layers_left(cell)}, dense=False)
    return data and data | {"layers": layers}


def allocation_data(cells: list[Cell]) -> Data | None:
    """Weights left by layer, one method under different frameworks (Global against ASL+); None where only one ran."""
    best = [cell for cell in cells if cell.sparsity and cell.setting.method == "feather" and cell.setting.p == "3"]
    best = [cell for cell in best if cell.setting.theta == "auto" and not cell.setting.modifier]
    wanted = [cell for cell in best if cell.setting.framework in _ALLOCATIONS]
    shared = {
        cell.sparsity
        for cell in wanted
        if {"global", "asl_plus"} <= {c.setting.framework for c in wanted if c.sparsity == cell.sparsity}
    }
    wanted = [cell for cell in wanted if cell.sparsity in shared]
    data = _panels("allocation", wanted, lambda cell: {"left": layers_left(cell)}, dense=False, split=True)
    return data and data | {"layers": layer_names(wanted[0])}


_ALLOCATIONS = ("global", "asl", "asl_plus")

PER_TABLE: dict[str, Callable[[list[Cell]], Data | None]] = {
    "training": training_data,
    "layers": layers_data,
    "allocation": allocation_data,
    "mask": mask_data,
}


def layer_names(cell: Cell) -> list[str]:
    return [layer["name"].removesuffix(".weight") for layer in cell.runs[0].result["layers"]]


def layers_left(cell: Cell) -> list[float]:
    """Fraction of weights left in each layer, mean over the seeds."""
    layers = [run.result["layers"] for run in cell.runs]
    return [_mean(1 - layer["zeros"] / layer["size"] for layer in same) for same in zip(*layers, strict=True)]


def operator_data() -> Data:
    """The operator family P_T for several p, and the gradient that the dense weight receives, on one threshold."""
    import torch

    from feather.operator import p_threshold, scale_pruned_gradient

    threshold = torch.tensor(1.0, dtype=torch.float64)
    weight = torch.linspace(-2.5, 2.5, 501, dtype=torch.float64)
    operators, sparse = {}, weight
    for name, p in (("1", 1.0), ("2", 2.0), ("3", 3.0), ("5", 5.0), ("inf", math.inf)):
        sparse = p_threshold(weight, threshold, p)
        operators[name] = [round(value, 6) for value in sparse.tolist()]
    ones = torch.ones_like(weight)
    gradients = {
        f"{theta:g}": [round(value, 6) for value in scale_pruned_gradient(ones, sparse, theta).tolist()]
        for theta in (1.0, 0.5, 0.0)
    }
    return {
        "figure": "operator",
        "weight": [round(value, 6) for value in weight.tolist()],
        "operators": operators,
        "gradients": gradients,
    }


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def _epochs(cell: Cell) -> list[tuple[EpochRecord, ...]]:
    """The evaluations of all seeds, epoch by epoch, as far as the shortest history goes."""
    histories = [run.history for run in cell.runs]
    length = min(map(len, histories))
    return list(zip(*(history[:length] for history in histories), strict=True))


def _panels(
    figure: str, cells: list[Cell], make: Callable[[Cell], Data | None], *, dense: bool, split: bool = False
) -> Data | None:
    """Lines of one network's cells: all in one panel where one setting was run, else a panel per sparsity.

    Args:
        figure: its kind.
        cells: of one network.
        make: the plotted numbers of a cell, or None where it has none.
        dense: repeat the dense line in every panel; without, it is left out.
        split: a panel per sparsity in any case.
    """
    names: dict[Setting, str] = row_names(cell.setting for cell in cells)
    sparse: list[Data] = []
    always: list[Data] = []
    for cell in cells:
        if (cell.sparsity or dense) and (numbers := make(cell)):
            line = {"name": names[cell.setting], "sparsity": cell.sparsity, **numbers}
            (sparse if cell.sparsity else always).append(line)
    if not sparse and not always:
        return None
    rows = list(dict.fromkeys(line["name"] for line in sparse))
    sparsities = sorted({line["sparsity"] for line in sparse})
    if len(rows) > 1 or split:
        groups = [[line for line in sparse if line["sparsity"] == s] for s in sparsities]
    else:
        groups = [sparse]
    panels = [
        {"sparsity": group[0]["sparsity"] if len(groups) > 1 or split else None, "lines": [*always, *group]}
        for group in groups
        if group or always
    ]
    return {"figure": figure, "title": _title(cells), "rows": rows, "panels": panels}
