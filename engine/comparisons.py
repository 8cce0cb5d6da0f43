"""Methods compared with Feather seed by seed: mean difference, Student's t interval, and whether it tells anything."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from engine.results import Cell, Setting, Statistic

LEVEL = 0.95
FEWEST_SEEDS = 3
_SHORT = ("model", "dataset", "scale", "epochs", "batch_size", "precision")
_PAPERS_SCHEDULE = {
    "sparsity_schedule.name": "cubic",
    "sparsity_schedule.start_fraction": 0.0,
    "sparsity_schedule.end_fraction": 0.5,
}
# What makes the compared method itself, or names a run.
_OWN = ("method", "framework", "modifier", "seed", "experiment_name", "label", "logger", "run_dir", "git")


@dataclass(frozen=True)
class Comparison:
    """One cell against Feather at the same sparsity, over the seeds that both have.

    Attributes:
        cell, reference: the compared cell and Feather's.
        seeds: those that both have.
        difference: of the top-1 accuracies, cell minus reference, in percentage points; None without a common seed.
        interval: 95 % interval of the mean difference; None below three seeds.
    """

    cell: Cell
    reference: Cell
    seeds: tuple[int, ...]
    difference: Statistic | None
    interval: tuple[float, float] | None

    @property
    def n(self) -> int:
        return len(self.seeds)

    @property
    def verdict(self) -> str:
        """What the interval says, in words."""
        if self.cell.off_target:
            return "reached another sparsity: cannot be compared"
        if self.interval is None:
            return f"n = {self.n}: too few seeds to tell" if self.n else "no common seed: cannot be paired"
        low, high = self.interval
        if low <= 0 <= high:
            return "interval includes 0: not told apart"
        return "better than Feather" if low > 0 else "worse than Feather"

    def mean(self, cell: Cell) -> float:
        """Mean top-1 of one of the two cells over the common seeds."""
        return Statistic.of(_by_seed(cell)[seed] for seed in self.seeds).mean


def interval(differences: Statistic) -> tuple[float, float] | None:
    """Student's t interval of a mean; None below three values."""
    if differences.n < FEWEST_SEEDS or differences.std is None:
        return None
    from scipy.special import stdtrit

    half = float(stdtrit(differences.n - 1, 0.5 + LEVEL / 2)) * differences.std / math.sqrt(differences.n)
    return differences.mean - half, differences.mean + half


def pair(cell: Cell, reference: Cell) -> Comparison:
    """Compare two cells over the seeds that both have."""
    ours, theirs = _by_seed(cell), _by_seed(reference)
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    if not seeds:
        return Comparison(cell, reference, seeds, None, None)
    differences = Statistic.of(ours[seed] - theirs[seed] for seed in seeds)
    return Comparison(cell, reference, seeds, differences, interval(differences))


def with_feather(cells: Iterable[Cell], others: Iterable[Cell] = ()) -> list[Comparison]:
    """Each sparse cell against Feather with its defaults, trained and pruned under the same conditions.

    Args:
        cells: to compare.
        others: where Feather is looked for when ``cells`` lack it, such as other experiments of the same scale.
    """
    cells, others = list(cells), list(others)
    comparisons = []
    for cell in cells:
        if not cell.sparsity:
            continue
        alike = [[c for c in source if _conditions(c) == _conditions(cell)] for source in (cells, others)]
        candidates = next((found for source in alike if (found := _references(source))), [])
        if candidates and cell not in candidates:
            nearest = min(candidates, key=lambda c: (_distance(c, cell), c.setting.theta != "auto"))
            comparisons.append(pair(cell, nearest))
    return comparisons


def _by_seed(cell: Cell) -> dict[int, float]:
    return {run.result["seed"]: run.result["final_top1"] for run in cell.runs}


def _conditions(cell: Cell) -> tuple[object, ...]:
    return (*(getattr(cell.setting, key) for key in _SHORT), cell.sparsity)


def _references(cells: list[Cell]) -> list[Cell]:
    """Feather as the paper has it: p = 3, the theta rule, one global threshold, the cubic schedule."""
    found = [cell for cell in cells if is_reference(cell.setting, cell.sparsity)]
    if any(cell.setting.theta == "auto" for cell in found):
        found = [cell for cell in found if cell.setting.theta == "auto"]
    fewest = min((_off_schedule(cell) for cell in found), default=0)
    return [cell for cell in found if _off_schedule(cell) == fewest]


def is_reference(setting: Setting, sparsity: float) -> bool:
    """Whether this is Feather with its defaults; theta may be given as the number that the rule gives."""
    from feather.operator import auto_theta

    thetas = ("auto", f"{auto_theta(sparsity):g}")
    own = (setting.method, setting.framework, setting.p, setting.modifier)
    return own == ("feather", "global", "3", "") and setting.theta in thetas


def _off_schedule(cell: Cell) -> int:
    config = cell.runs[0].config
    return sum(config.get(key, value) != value for key, value in _PAPERS_SCHEDULE.items())


def _distance(a: Cell, b: Cell) -> int:
    """In how many settings two cells differ, but for the method."""
    first, second = a.runs[0].config, b.runs[0].config
    keys = {key for key in first.keys() | second.keys() if key.split(".")[0] not in _OWN}
    return sum(first.get(key) != second.get(key) for key in keys)
