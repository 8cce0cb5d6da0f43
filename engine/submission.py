"""Runs of train.py as jobs of a cluster, through submitit with the settings of ``hydra/launcher``.

A job that is preempted, or whose time is nearly up, lets its run save and goes back into the queue.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.cli import importable
from engine.config import ConfigError
from engine.jobs import TRAIN
from engine.plan import Job

# What submitit calls the same for every kind of cluster; the rest carries the cluster's name in front.
_COMMON = {
    "name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node", "stderr_to_stdout",
}  # fmt: skip


class Training:
    """What a job of the cluster executes: ``train.py`` in a process of its own; its exit status and last line."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, overrides: Sequence[str]) -> tuple[int, str]:
        command = [sys.executable, str(TRAIN), *overrides]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        )
        signal.signal(signal.SIGTERM, lambda *_: self._process.terminate())  # cancelled: the run saves and ends
        last = ""
        try:
            assert self._process.stdout is not None
            for line in self._process.stdout:
                print(line, end="", flush=True)
                last = line.strip() or last
            return self._process.wait(), last
        finally:
            self._end()

    def checkpoint(self, overrides: Sequence[str]) -> Any:
        """submitit's question before a job is requeued: what is to be called the next time."""
        from submitit.helpers import DelayedSubmission

        self._end()
        return DelayedSubmission(Training(), overrides)

    def _end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()


class SubmittedRun:
    """A job in the cluster's queue, with what ``engine.jobs.run_all`` asks of a run."""

    def __init__(self, job: Job, place: str, executor: Any) -> None:
        self.job, self.place = job, place
        self._submitted = executor.submit(Training(), job.overrides)
        self.log = Path(os.path.relpath(self._submitted.paths.stdout))
        self.last_line = ""

    def poll(self) -> int | None:
        if not self._submitted.done():
            return None
        error = self._submitted.exception()
        if error is None:
            status, self.last_line = self._submitted.result()
            return status
        self.last_line = (
            f"The job ended without a result ({self._submitted.state}): see {self._submitted.paths.stderr}."
        )
        return 1

    def stop(self) -> None:
        self._submitted.cancel()

    kill = stop

    def evaluated(self) -> bool:
        return False


class Queue:
    """Places in a cluster's queue, which decides itself what runs where."""

    threads = None

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once

    def place(self, job: Job, running: Sequence[Any]) -> str | None:
        return "" if len(running) < self.at_once else None

    def environment(self, place: str) -> dict[str, str]:
        return {}


def create_executor(launcher: Mapping[str, Any]) -> Any:
    """The submitit executor for the composed ``hydra.launcher``.

    Raises:
        ConfigError: the launcher is not one of submitit's, or refuses a setting.
    """
    import submitit

    settings = dict(launcher)
    target = settings.pop("_target_").rpartition(".")[2]
    clusters = {"SlurmLauncher": "slurm", "LocalLauncher": "local"}
    if target not in clusters:
        raise ConfigError("hydra/launcher= of scripts/reproduce.py must be slurm or submitit_local.")
    cluster = clusters[target]
    options = {key: value for key, value in settings.items() if value is not None}
    folder = options.pop("submitit_folder")
    requeues = options.pop("max_num_timeout", 0)
    options.pop("array_parallelism", None)  # every run is a job of its own here; --jobs says how many at once
    importable()
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster, **{f"{cluster}_max_num_timeout": requeues})
        named = {key if key in _COMMON else f"{cluster}_{key}": value for key, value in options.items()}
        executor.update_parameters(**named)
    except (RuntimeError, ValueError, TypeError, NameError) as error:
        raise ConfigError(f"hydra/launcher={cluster} is not possible: {str(error).splitlines()[0]}.") from None
    return executor
