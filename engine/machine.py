"""How many runs this machine takes at once, and with which share of its cores and GPUs each."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from engine.plan import Job

PER_GPU = 4  # more small runs on one GPU hardly add throughput
_GIB_PER_RUN = 2  # of the machine's memory
_USABLE = 0.9  # of the GPU's free memory: caches and fragments take some more than was measured


class Placed(Protocol):
    """A run that has been started."""

    job: Job
    place: str

    def evaluated(self) -> bool:
        """Whether it has been through a whole epoch, evaluation included, and so uses all the memory it will."""


class Cores:
    """Runs on the CPU: the cores are divided evenly.

    Two runs of one thread each get more done than one after another with two threads.
    """

    def __init__(self, at_once: int, cores: int) -> None:
        self.at_once = at_once
        self.threads = max(cores // at_once, 1)

    def place(self, job: Job, running: Sequence[Placed]) -> str | None:
        """Where ``job`` can start now; None: not yet."""
        return "" if len(running) < self.at_once else None

    def environment(self, place: str) -> dict[str, str]:
        """Variables of a process at ``place``."""
        return _threads(self.threads)


class GPUs:
    """Runs on GPUs, the least loaded first, several on one where its memory and the cores suffice.

    What a run needs is seen while it is the only one of ours on a GPU; until then no other one joins it there.

    Args:
        names: what CUDA_VISIBLE_DEVICES takes.
        at_once: at most so many on all of them together.
        cores: of the machine; a run takes one and those of its ``dataset.workers``.
        free_memory: bytes free on a GPU, None where it cannot be told; then every run has a GPU to itself.
    """

    def __init__(
        self, names: Sequence[str], at_once: int, cores: int, free_memory: Callable[[str], float | None]
    ) -> None:
        self.at_once = at_once
        self.threads = max(cores // at_once, 1)
        self._names, self._cores, self._free_memory = list(names), cores, free_memory
        self._per_gpu = math.ceil(at_once / len(names))
        self._free = {name: free_memory(name) for name in names}  # before any of ours began
        self._needs: dict[tuple[object, ...], float] = {}

    def place(self, job: Job, running: Sequence[Placed]) -> str | None:
        self._learn(running)
        if len(running) >= self.at_once:
            return None
        cores = [1 + run.job.config.dataset.workers for run in running]
        if running and sum(cores) + 1 + job.config.dataset.workers > self._cores:
            return None
        on = {name: [run.job for run in running if run.place == name] for name in self._names}
        for name in sorted(self._names, key=lambda name: len(on[name])):
            if not on[name] or (len(on[name]) < self._per_gpu and self._fits([*on[name], job], name)):
                return name
        return None

    def environment(self, place: str) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": place, **_threads(self.threads)}

    def _fits(self, jobs: Sequence[Job], name: str) -> bool:
        free, needs = self._free[name], [self._needs.get(_kind(job)) for job in jobs]
        return free is not None and None not in needs and sum(needs) <= _USABLE * free  # type: ignore[arg-type]

    def _learn(self, running: Sequence[Placed]) -> None:
        for name in self._names:
            on = [run for run in running if run.place == name]
            if len(on) == 1 and _kind(on[0].job) not in self._needs and on[0].evaluated():
                before, now = self._free[name], self._free_memory(name)
                if before is not None and now is not None:
                    self._needs[_kind(on[0].job)] = max(before - now, 0.0)


def this_machine(jobs: Sequence[Job], at_once: int | None = None) -> Cores | GPUs:
    """Places for ``jobs``: GPUs where there are any and the runs are not kept from them, else cores.

    Args:
        at_once: runs side by side; None for as many as the machine carries. The number of threads follows from it and
            from all jobs, finished or not: an experiment that was interrupted goes on with as many.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = [] if all(job.config.trainer.device == "cpu" for job in jobs) else visible_gpus()
    if gpus:
        wanted = at_once or min(PER_GPU * len(gpus), cores, len(jobs))
        return GPUs(gpus, max(wanted, 1), cores, free_gpu_memory)
    wanted = at_once or min(cores, len(jobs), max(_free_memory_gib() // _GIB_PER_RUN, 1))
    return Cores(max(wanted, 1), cores)


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(index) for index in range(count)])[:count]


def free_gpu_memory(name: str) -> float | None:
    """Bytes, from the driver's tool: asking CUDA itself would take memory on the GPU. None where it does not say."""
    command = ["nvidia-smi", "-i", name, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _kind(job: Job) -> tuple[object, ...]:
    """What decides how much memory a run needs; methods differ by a copy of the weights or two."""
    config = job.config
    trainer = config.trainer
    return (
        config.model.name, str(config.model.options), config.dataset.name, config.dataset.image_size,
        trainer.batch_size // trainer.accumulate, trainer.eval_batch_size, trainer.precision, trainer.compile,
        trainer.capture,
    )  # fmt: skip


def _threads(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}


def _free_memory_gib() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) // 2**20
    except OSError:
        pass
    return 2**20
