"""Runs of train.py as processes: several at once, what they print kept, all of them stopped together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from engine.interruption import EXIT_UNFINISHED, Interruption
from engine.plan import Job

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
_POLL_SECONDS = 0.2


class Run(Protocol):
    """A started job."""

    job: Job
    place: str
    log: Path

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""

    def stop(self) -> None:
        """Ask it to save and end."""

    def kill(self) -> None:
        """End it at once."""

    def evaluated(self) -> bool:
        """Whether it has trained and evaluated for an epoch."""

    @property
    def last_line(self) -> str:
        """What it printed last: for a failed run, why."""


class Machine(Protocol):
    """Hands out places; see ``engine.machine``."""

    at_once: int

    def place(self, job: Job, running: Sequence[Run]) -> str | None: ...

    def environment(self, place: str) -> dict[str, str]: ...


class LocalRun:
    """``train.py`` in a process of its own; what it prints goes to a log beside its directory, and on if ``show``."""

    def __init__(self, job: Job, place: str, environment: dict[str, str], *, show: bool) -> None:
        self.job, self.place = job, place
        self.log = job.directory.parent / ".logs" / f"{job.directory.name}.txt"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._began = time.time()
        self._last = ""
        # A pipe and not the log itself: a run whose parent was killed ends at its next line instead of going on unseen.
        # A process group of its own: Ctrl-C reaches the parent alone, which asks every run once.
        self._process = subprocess.Popen(
            [sys.executable, str(TRAIN), *job.overrides], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", bufsize=1, process_group=0,
            env={**os.environ, **environment},
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, args=(show,), daemon=True)
        self._reader.start()

    def _read(self, show: bool) -> None:
        assert self._process.stdout is not None
        with self.log.open("a", encoding="utf-8") as log:
            for line in self._process.stdout:
                log.write(line)
                log.flush()
                if show:
                    print(line, end="", flush=True)
                self._last = line.strip() or self._last

    def poll(self) -> int | None:
        status = self._process.poll()
        if status is not None:
            self._reader.join(timeout=10)  # a worker process that outlives its run may hold the pipe open
        return status

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def evaluated(self) -> bool:
        return any(path.stat().st_mtime > self._began for path in self.job.directory.glob("checkpoint_*.pt"))

    @property
    def last_line(self) -> str:
        return self._last


def run_all(
    jobs: Sequence[Job],
    machine: Machine,
    start: Callable[[Job, str, dict[str, str]], Run],
    stopping: Interruption,
    tell: Callable[[str, Run, int | None], None],
) -> dict[Job, tuple[int, str]]:
    """Run ``jobs`` in order, as many at once as ``machine`` has places for; one that fails does not stop the others.

    When ``stopping`` asks, or a run was told by somebody else to stop, the others are stopped too and none begins.

    Args:
        start: begins a job at a place, with variables for its environment.
        tell: is called with "started", "finished", "failed" or "stopped", the run, and its exit status.

    Returns:
        Exit status and, where it failed, the reason of every job that has ended.
    """
    waiting, running, ended = deque(jobs), [], {}
    asked, at_hand = False, set()
    try:
        while waiting or running:
            for run in list(running):
                if run.job.directory.joinpath("run.json").exists():
                    at_hand.add(_data(run.job))
                status = run.poll()
                if status is None:
                    continue
                running.remove(run)
                stopped = status == EXIT_UNFINISHED or (asked and status in (-signal.SIGTERM, 128 + signal.SIGTERM))
                ended[run.job] = (EXIT_UNFINISHED, "") if stopped else (status, _reason(run, status) if status else "")
                tell("stopped" if stopped else "failed" if status else "finished", run, status)
                if stopped and not asked:
                    stopping.reason = stopping.reason or "a run was stopped from outside"
            if stopping.requested(0):
                waiting.clear()
                if not asked:
                    asked = True
                    for run in running:
                        run.stop()
            while waiting:
                job = waiting[0]
                # the first run that uses a data set may have to download it: nobody reads a half of it
                if _data(job) not in at_hand and any(_data(run.job) == _data(job) for run in running):
                    break
                place = machine.place(job, running)
                if place is None:
                    break
                run = start(waiting.popleft(), place, machine.environment(place))
                running.append(run)
                tell("started", run, None)
            if running:
                time.sleep(_POLL_SECONDS)
    finally:
        for run in running:
            run.kill()
    return ended


def _data(job: Job) -> tuple[str, str]:
    return job.config.dataset.name, job.config.dataset.root


def _reason(run: Run, status: int) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        return f"it was ended by {name}" + (" (was the memory full?)." if name == "SIGKILL" else ".")
    return run.last_line or f"it ended with status {status}."
