"""Run experiments: every combination that their files name, skipping what is finished and resuming what is not.

    python scripts/reproduce.py NAME [NAME ...] [--dry-run] [--jobs N] [KEY=VALUE[,VALUE...] ...]

NAME is a file in conf/experiment/, with the parts in the folder of its name; KEY=VALUE replaces its values, as for
train.py. Each run is a process of its own, and as many run at once as the machine carries. Two keys are for the whole
command: time_limit_minutes=N stops everything cleanly after so long, and hydra/launcher=slurm (or submitit_local)
submits the runs to a cluster.

Exit status: 0 all finished; 1 some failed, each named with its reason at the end; 2 wrong arguments; 75 stopped in
between by a signal or the time limit, the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from engine import script  # noqa: E402
from engine.config import ConfigError  # noqa: E402
from engine.distributed import Ranks  # noqa: E402
from engine.estimate import Estimate, known_results, makespan  # noqa: E402
from engine.interruption import EXIT_UNFINISHED, Interruption  # noqa: E402
from engine.jobs import LocalRun, Run, run_all  # noqa: E402
from engine.machine import this_machine  # noqa: E402
from engine.plan import Job, launcher, plan  # noqa: E402
from engine.records import environment  # noqa: E402
from engine.submission import Queue, SubmittedRun, create_executor  # noqa: E402

_ALONE = Ranks(0, 1, 0, torch.device("cpu"))
_IN_QUEUE = 64  # jobs of a cluster at once, where --jobs does not say


def show(names: Sequence[str], jobs: Sequence[Job], at_once: int, estimate: Estimate) -> None:
    """Print the plan: every run with its state and time, and the whole."""
    known, unknown = [], 0
    for job in jobs:
        told = ""
        if job.due:
            seconds = estimate.seconds(job)
            told = "time unknown" if seconds is None else f"about {_duration(seconds)}"
            unknown += seconds is None
            known += [] if seconds is None else [seconds]
        print(f"  {job.state:10} {told:16} {job.directory}")
    count = {state: sum(job.state == state for job in jobs) for state in ("finished", "unfinished", "new")}
    print(f"{' '.join(names)}: {len(jobs)} runs, " + ", ".join(f"{number} {state}" for state, number in count.items()))
    if known:
        print(
            f"About {_duration(makespan(known, at_once))} with {at_once} at once, for the {len(known)} runs with "
            "finished ones of their kind on this hardware to go by."
        )
    if unknown:
        print(f"{unknown} runs have none to go by: their time is unknown.")


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


class Reporter:
    """One line when a run starts and one when it ends, unless it is shown itself."""

    def __init__(self, total: int) -> None:
        self._total, self._begun = total, {}

    def __call__(self, event: str, run: Run, status: int | None) -> None:
        name = run.job.directory.name
        if event == "started":
            self._begun[name] = (len(self._begun) + 1, time.monotonic())
            where = f" on GPU {run.place}" if run.place else ""
            told = f"{where}; its output: {run.log}"
        else:
            told = f" after {_duration(time.monotonic() - self._begun[name][1])}"
            told += f": {run.last_line.removeprefix(f'{run.job.directory}: ')}" if run.last_line else ""
        print(f"[{self._begun[name][0]}/{self._total}] {event:8} {name}{told}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help="experiments in conf/experiment/")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for train.py; several values make a grid")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at once (default: what cores and memory carry)")
    options = parser.parse_intermixed_args(arguments)
    typed = [*options.names, *options.overrides]
    names = [word for word in typed if "=" not in word and not word.startswith("~")]
    overrides = [word for word in typed if word not in names]
    try:
        if not names:
            raise ConfigError("No experiment is named: write scripts/reproduce.py NAME, a file in conf/experiment/.")
        if options.jobs is not None and options.jobs < 1:
            raise ConfigError(f"--jobs={options.jobs} is out of range: it must be at least 1.")
        jobs = plan(names, overrides)
        cluster = launcher(overrides)
        executor = None if cluster is None or options.dry_run else create_executor(cluster)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    due = [job for job in jobs if job.due]
    machine = Queue(options.jobs or _IN_QUEUE) if cluster is not None else this_machine(jobs, options.jobs)
    at_once = max(min(machine.at_once, len(due)), 1)
    show(names, jobs, at_once, Estimate(known_results(), environment()["hardware"], machine.threads))
    if options.dry_run:
        return 0

    def start(job: Job, place: str, variables: dict[str, str]) -> Run:
        if executor is not None:
            return SubmittedRun(job, place, executor)
        return LocalRun(job, place, variables, show=at_once == 1)

    try:
        with Interruption(jobs[0].config.time_limit_minutes, _ALONE) as stopping:
            ended = run_all(due, machine, start, stopping, Reporter(len(due)))
    except KeyboardInterrupt:
        print("Stopped without waiting; each run goes on from its last checkpoint.", file=sys.stderr)
        return EXIT_UNFINISHED
    failed = [(job, reason) for job, (status, reason) in ended.items() if status not in (0, EXIT_UNFINISHED)]
    for job, reason in failed:
        print(f"failed: {' '.join(job.overrides)}: {reason}", file=sys.stderr)
    print(f"{len([job for job in jobs if job.state == 'finished'])} of {len(jobs)} runs are finished.")
    if stopping.reason:
        print(f"Stopped, as {stopping.reason}; the same command goes on from here.")
        return EXIT_UNFINISHED
    return 1 if failed else 0


if __name__ == "__main__":
    script.run(main)
