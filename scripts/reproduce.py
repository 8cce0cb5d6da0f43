"""Run an experiment: every combination that its file names, skipping what is finished and resuming what is not.

    python scripts/reproduce.py NAME [--dry-run] [KEY=VALUE[,VALUE...] ...]

NAME is a file in conf/experiment/. Each run is a process of its own. Exit status: 0 all finished; 1 some failed, each
named with its reason at the end; 2 wrong arguments; 75 stopped in between, the same command goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.cli import sentence  # noqa: E402
from engine.config import Config, ConfigError, prepare, register_schema, run_directory  # noqa: E402
from engine.interruption import EXIT_UNFINISHED  # noqa: E402
from engine.records import environment  # noqa: E402

EXPERIMENTS = ROOT / "conf" / "experiment"


@dataclass(frozen=True)
class Job:
    """One run: what to type after ``train.py``, its configuration and its directory."""

    overrides: tuple[str, ...]
    config: Config
    directory: Path

    @property
    def state(self) -> str:
        if (self.directory / "result.json").exists():
            return "finished"
        return "unfinished" if any(self.directory.glob("checkpoint_*.pt")) else "new"


def plan(name: str, arguments: Sequence[str]) -> list[Job]:
    """Every combination of the experiment's values and the command line's, which replace the experiment's.

    Raises:
        ConfigError: an unknown experiment, or values that train.py would refuse.
    """
    known = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"The experiment {name} is unknown: choose one of {', '.join(known)}.")
    register_schema(arguments)
    try:
        chosen = {o.key_or_group: _values(o) for o in OverridesParser.create().parse_overrides(list(arguments))}
        file = OmegaConf.load(EXPERIMENTS / f"{name}.yaml")
        params = OmegaConf.to_container(OmegaConf.select(file, "hydra.sweeper.params", default=OmegaConf.create()))
        grid = {}
        for key, values in params.items():
            (override,) = OverridesParser.create().parse_overrides([f"{key}={values}"])
            grid[key] = _values(override)
        grid |= chosen
        jobs = [_job((f"experiment={name}", *values)) for values in itertools.product(*grid.values())]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error) if isinstance(error, ConfigError) else sentence(error)) from None
    if not jobs:
        raise ConfigError(f"The experiment {name} has no runs: give every key at least one value.")
    return list({job.directory: job for job in jobs}.values())  # one dense run, through whatever method


def _values(override: object) -> list[str]:
    if override.is_sweep_override():  # type: ignore[attr-defined]
        key = override.get_key_element()  # type: ignore[attr-defined]
        return [f"{key}={value}" for value in override.sweep_string_iterator()]  # type: ignore[attr-defined]
    return [override.input_line]  # type: ignore[attr-defined]


def _job(overrides: tuple[str, ...]) -> Job:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = hydra.compose("config", list(overrides), return_hydra_config=True)
    with open_dict(composed):
        del composed["hydra"]
    config = prepare(composed)
    return Job(overrides, config, run_directory(config))


def seconds_per_epoch(job: Job, results: Iterable[dict[str, Any]]) -> float | None:
    """Median over finished runs of the same network, data and batch size on this hardware; None where there is none."""
    here = environment()["hardware"]
    kind = (job.config.model.name, job.config.dataset.name, job.config.trainer.batch_size, here["gpu"], here["cpu"])
    same = []
    for result in results:
        hardware = result.get("hardware") or {}
        settings = (result.get(key) for key in ("model", "dataset", "batch_size"))
        if (*settings, hardware.get("gpu"), hardware.get("cpu")) == kind:
            same.append(result["wall_seconds"] / result["epochs"])
    return median(same) if same else None


def known_results() -> list[dict[str, Any]]:
    """Results of earlier runs, here and committed; unreadable ones are left out."""
    found = []
    for path in [*Path("runs").glob("*/*/result.json"), *(ROOT / "results" / "runs").glob("*/*/result.json")]:
        try:
            found.append(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue
    return found


def show(name: str, jobs: Sequence[Job]) -> None:
    results = known_results()
    total, unknown = 0.0, 0
    for job in jobs:
        rate = seconds_per_epoch(job, results)
        estimate = ""
        if job.state != "finished":
            estimate = "time unknown" if rate is None else f"about {rate * job.config.trainer.epochs / 60:.1f} min"
            total += (rate or 0.0) * job.config.trainer.epochs
            unknown += rate is None
        print(f"  {job.state:10} {estimate:16} {job.directory}")
    count = {state: sum(job.state == state for job in jobs) for state in ("finished", "unfinished", "new")}
    print(f"{name}: {len(jobs)} runs, " + ", ".join(f"{number} {state}" for state, number in count.items()))
    if total:
        print(f"About {total / 60:.0f} min for those with a finished run of their kind on this machine to go by.")
    if unknown:
        print(f"{unknown} runs have none to go by: their time is unknown.")


def run(job: Job) -> tuple[int, str]:
    """Run a job in a process of its own; its exit status and the last line of its standard error."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *job.overrides], stderr=subprocess.PIPE, text=True, bufsize=1
    )
    last = ""
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", file=sys.stderr, flush=True)
        last = line.strip() or last
    return process.wait(), last


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="experiment in conf/experiment/")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for train.py; several values make a grid")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    options = parser.parse_intermixed_args(arguments)
    try:
        jobs = plan(options.name, options.overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    show(options.name, jobs)
    if options.dry_run:
        return 0
    failed = []
    for job in jobs:
        if job.state == "finished":
            continue
        status, reason = run(job)
        if status == EXIT_UNFINISHED:
            return EXIT_UNFINISHED
        if status:
            failed.append(f"{' '.join(job.overrides)}: {reason or f'ended with status {status}'}")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    print(f"{sum(job.state == 'finished' for job in jobs)} of {len(jobs)} runs are finished.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
