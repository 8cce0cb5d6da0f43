"""From an experiment's name to its runs, the most telling first.

An experiment is ``conf/experiment/NAME.yaml``, whose ``hydra.sweeper.params`` are a grid, together with its parts in
``conf/experiment/NAME/``: what is compared in one table is not always one grid.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from engine.cli import sentence
from engine.config import Config, ConfigError, prepare, register_schema, run_directory

CONF = Path(__file__).resolve().parents[1] / "conf"
EXPERIMENTS = CONF / "experiment"
_STEPS = 1000  # of the imagined run that a method is tried with


@dataclass(frozen=True)
class Job:
    """One run: what to type after ``train.py``, its configuration and its directory."""

    overrides: tuple[str, ...]
    config: Config
    directory: Path

    @property
    def state(self) -> str:
        """``finished``, ``unfinished`` (there is a checkpoint to go on from) or ``new``."""
        if (self.directory / "result.json").exists():
            return "finished"
        return "unfinished" if any(self.directory.glob("checkpoint_*.pt")) else "new"

    @property
    def due(self) -> bool:
        return self.config.overwrite or self.state != "finished"

    @property
    def epochs_left(self) -> float:
        """Of ``trainer.epochs``, by the run's records."""
        epochs = self.config.trainer.epochs
        if self.state == "unfinished":
            try:
                last = (self.directory / "metrics.jsonl").read_text().rstrip().rpartition("\n")[2]
                return max(epochs - float(json.loads(last)["epoch"]), 0.0)
            except (OSError, ValueError, KeyError, TypeError):
                pass  # nothing recorded yet, or cut off in the middle of a line
        return float(epochs)

    def __hash__(self) -> int:
        return hash(self.directory)


def experiments() -> list[str]:
    """Names that ``plan`` takes."""
    return sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))


def parts(name: str) -> list[str]:
    """Choices of ``experiment=`` that make up an experiment: its own file, then those in the folder of its name."""
    return [name, *(f"{name}/{path.stem}" for path in sorted((EXPERIMENTS / name).glob("*.yaml")))]


def plan(names: Sequence[str], arguments: Sequence[str] = ()) -> list[Job]:
    """Every combination of the experiments' values and the command line's, which replace the experiments'.

    Raises:
        ConfigError: an unknown experiment, no run at all, or values that train.py would refuse.
    """
    for name in names:
        if name not in experiments():
            raise ConfigError(f"The experiment {name} is unknown: choose one of {', '.join(experiments())}.")
    register_schema(arguments)
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3", job_name="train"):
            jobs = [job for name in names for job in _experiment(name, arguments)]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error) if isinstance(error, ConfigError) else sentence(error)) from None
    if len(jobs) > 1 and any(job.config.run_dir is not None for job in jobs):
        raise ConfigError("run_dir= names one directory and every run of an experiment needs its own: leave it out.")
    jobs = list({job.directory: job for job in reversed(jobs)}.values())[::-1]  # one dense run, whatever its method
    _check_methods(jobs)
    return jobs


def launcher(arguments: Sequence[str]) -> DictConfig | None:
    """The settings under ``hydra.launcher`` where the command line chooses one."""
    typed = [argument for argument in arguments if argument.startswith(("hydra/launcher=", "hydra.launcher."))]
    if not typed:
        return None
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3", job_name="train"):
            settings = hydra.compose("config", typed, return_hydra_config=True).hydra
            return OmegaConf.create(OmegaConf.to_container(settings.launcher, resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(sentence(error)) from None


# ---- one experiment -------------------------------------------------------------------------------------------------


def _experiment(name: str, arguments: Sequence[str]) -> list[Job]:
    typed = OverridesParser.create().parse_overrides([a for a in arguments if not a.startswith("hydra")])
    constant = [override.input_line for override in typed if not override.is_sweep_override()]
    chosen = {override.key_or_group: _values(override) for override in typed}
    own, compose = _params(name, constant), _Composer()
    grids = {name: own | chosen}
    if empty := [key for key, values in grids[name].items() if not values]:
        raise ConfigError(f"The experiment {name} has no runs: give {', '.join(empty)} at least one value.")
    for part in parts(name)[1:]:
        grids[part] = _narrowed(_params(part, constant), own, chosen)
    jobs = []
    for part, grid in grids.items():
        for values in itertools.product(*grid.values()):
            overrides = (f"experiment={part}", *values)
            config = prepare(compose(overrides))
            # the time limit is one for all runs together
            overrides = tuple(o for o in overrides if not o.startswith("time_limit_minutes="))
            jobs.append((dict(zip(grid, values, strict=True)), Job(overrides, config, run_directory(config))))
    # Row by row: runs of the parts stand beside the experiment's own of the same network, sparsity and seed.
    filled = [grid for grid in grids.values() if all(grid.values())]
    shared = {key: own for key, own in grids[name].items() if all(len(grid.get(key, ())) > 1 for grid in filled)}

    def row(entry: tuple[dict[str, str], Job]) -> list[int]:
        return [order.index(v) if (v := entry[0][key]) in order else len(order) for key, order in shared.items()]

    return [job for _, job in (sorted(jobs, key=row) if len(grids) > 1 else jobs)]


def _params(choice: str, constant: list[str]) -> dict[str, list[str]]:
    """The grid of one file, composed because a scale changes it too."""
    sweeper = hydra.compose("config", [f"experiment={choice}", *constant], return_hydra_config=True).hydra.sweeper
    params = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in (sweeper.params or {}).items()])
    return {override.key_or_group: _values(override) for override in params}


def _narrowed(
    part: dict[str, list[str]], own: dict[str, list[str]], chosen: dict[str, list[str]]
) -> dict[str, list[str]]:
    """The grid of a part under what was typed; it may come out empty.

    A part is there for its own choices of method, framework and the like, so typed ones only narrow it; keys that the
    experiment varies and the part does not are not the part's. Anything else goes for both.
    """
    grid = dict(part)
    for key, values in chosen.items():
        if key in part and (CONF / key).is_dir():
            grid[key] = [value for value in part[key] if value in values]
        elif key in part or key not in own:
            grid[key] = values
    return grid


def _values(override: Override) -> list[str]:
    if override.is_sweep_override():
        key = override.get_key_element()
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    return [override.input_line] if override.input_line else []


class _Composer:
    """Hydra's composition, remembered by the choices of groups: a grid has few of them and many plain values."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], DictConfig] = {}

    def __call__(self, overrides: Sequence[str]) -> DictConfig:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        plain = [o for o in parsed if o.type == OverrideType.CHANGE and not (CONF / o.key_or_group).is_dir()]
        choices = tuple(o.input_line for o in parsed if o not in plain)
        try:
            if choices not in self._known:
                self._known[choices] = _without_hydra(choices)
            composed = copy.deepcopy(self._known[choices])
            for override in plain:
                OmegaConf.update(composed, override.key_or_group, override.value(), merge=True)
        except (HydraException, OmegaConfBaseException):
            return _without_hydra(overrides)  # which says what is wrong as train.py does
        return composed


def _without_hydra(overrides: Iterable[str]) -> DictConfig:
    composed = hydra.compose("config", list(overrides), return_hydra_config=True)
    with open_dict(composed):
        del composed["hydra"]
    return composed


def _check_methods(jobs: Iterable[Job]) -> None:
    """Refuse now what every run would refuse by itself, such as a framework that its method cannot use."""
    import torch

    import feather  # here, so that --help does not wait for them

    seen = set()
    for job in jobs:
        config = job.config
        method, schedule = config.method, config.sparsity_schedule
        settings: dict[str, Any] = {
            "method": method.name, "p": method.p, "theta": method.theta, "framework": config.framework.name,
            "framework_options": config.framework.options, "modifier": config.modifier,
            "modifier_options": config.modifier_options, "sparsity": config.sparsity, "schedule": schedule.name,
            "start_step": int(schedule.start_fraction * _STEPS), "end_step": int(schedule.end_fraction * _STEPS),
        }  # fmt: skip
        if str(settings) in seen:
            continue
        seen.add(str(settings))
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        try:
            feather.create(model=model, optimizer=optimizer, total_steps=_STEPS, **settings)
        except ValueError as error:
            raise ConfigError(str(error)) from None
