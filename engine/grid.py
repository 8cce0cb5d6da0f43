"""The declared grid of an experiment, and which of its cells have no evidence yet."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from engine.config import Config
from engine.results import Cell
from engine.settings import Setting, asked, flatten, modifier_name, option_texts, order, scale_name, text_of


@dataclass(frozen=True)
class NotRun:
    """A declared cell without evidence, and the command that makes it."""

    setting: Setting
    sparsity: float
    command: str


@dataclass(frozen=True)
class Experiment:
    """What has been run of an experiment, and what has been declared and not run.

    Attributes:
        name: of its directory below ``results/runs``.
        cells: with evidence.
        not_run: declared cells without.
        command: runs what is missing; None where conf/experiment does not declare the experiment.
    """

    name: str
    cells: list[Cell]
    not_run: list[NotRun] = field(default_factory=list)
    command: str | None = None

    @property
    def declared(self) -> int:
        """Number of cells with evidence and without."""
        return len(self.cells) + len(self.not_run)

    @property
    def scale(self) -> str:
        """ "proxy" where any of it is, else "full"."""
        return "proxy" if any(s.scale == "proxy" for s in self.settings()) else "full"

    def settings(self) -> list[Setting]:
        """Rows of its tables, in order."""
        members = [(c.setting, c.sparsity) for c in [*self.cells, *self.not_run]]
        return list(dict.fromkeys(setting for setting, _ in sorted(members, key=lambda m: order(*m))))

    def labels(self) -> list[str]:
        return sorted({s.label for s in self.settings() if s.label})


Key = frozenset[tuple[str, str]]
Planned = tuple[Sequence[str], Config]
"""What to type after ``train.py``, and the configuration that it means."""


def experiment(
    name: str,
    cells: Iterable[Cell],
    planned: Iterable[Planned] = (),
    *,
    command: str | None = None,
    framework_of: Callable[[str], str] = str,
) -> Experiment:
    """Put what was run beside what was declared; seeds do not count.

    Args:
        name: of the experiment.
        cells: with evidence.
        planned: the declared runs.
        command: runs what is missing.
        framework_of: the framework that "auto" stands for, by method.
    """
    cells = list(cells)
    covered = {asked(run.config, run.result["framework"]): cell.setting for cell in cells for run in cell.runs}
    # A row that has evidence at some sparsity keeps its name at the others.
    rows = {_without_sparsity(key): replace(setting, options="") for key, setting in covered.items()}
    precisions = _precisions(cells)
    missing: dict[Key, tuple[NotRun, dict[str, Any]]] = {}
    for overrides, cfg in planned:
        config = dict(flatten(asdict(cfg)))
        framework = framework_of(cfg.method.name) if cfg.framework.name == "auto" else cfg.framework.name
        key = asked(config, framework)
        if key in covered or key in missing:
            continue
        setting = rows.get(_without_sparsity(key)) or _setting(cfg, config, framework, precisions)
        missing[key] = NotRun(setting, float(cfg.sparsity), shlex.join(["python", "train.py", *overrides])), config
    members = [(replace(cell.setting, options=""), cell.sparsity, cell.runs[0].config) for cell in cells]
    members += [(cell.setting, cell.sparsity, config) for cell, config in missing.values()]
    options = iter(option_texts(members))  # over both, so that no declared cell hides behind another's evidence
    named = [replace(cell, setting=replace(cell.setting, options=next(options))) for cell in cells]
    not_run = [replace(cell, setting=replace(cell.setting, options=next(options))) for cell, _ in missing.values()]
    return Experiment(name, _sorted(named), _sorted(not_run), command)


def _sorted(cells: list[Any]) -> list[Any]:
    return sorted(cells, key=lambda cell: order(cell.setting, cell.sparsity))


def _without_sparsity(key: Key) -> Key:
    return frozenset(pair for pair in key if pair[0] != "sparsity")


def _precisions(cells: Iterable[Cell]) -> dict[str, str]:
    """What "auto" became in the evidence, where it became one thing."""
    found: dict[str, set[str]] = {}
    for cell in cells:
        for run in cell.runs:
            found.setdefault(str(run.config.get("trainer.precision")), set()).add(run.result["precision"])
    return {wanted: got.pop() for wanted, got in found.items() if len(got) == 1}


def _setting(cfg: Config, config: dict[str, Any], framework: str, precisions: dict[str, str]) -> Setting:
    dense = cfg.sparsity == 0
    return Setting(
        model=cfg.model.name,
        dataset=cfg.dataset.name,
        method="dense" if dense else cfg.method.name,
        framework="" if dense else framework,
        p="" if dense else text_of(cfg.method.p),
        theta="" if dense else text_of(cfg.method.theta),
        epochs=text_of(cfg.trainer.epochs),
        batch_size=text_of(cfg.trainer.batch_size),
        precision=precisions.get(cfg.trainer.precision, cfg.trainer.precision),
        label=cfg.label,
        modifier=modifier_name(config),
        scale=scale_name(config, cfg.label),
    )
