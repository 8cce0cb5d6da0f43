"""What looking at the numbers costs, and what a W&B server costs that is away, slow, refusing or dying.

The guard: steps of one network with and without it alternate in one process, at the batch size of training.

W&B: a process trains and writes ten times as many records as `train.py` does by default. What is set against the CPU
seconds of training are the CPU seconds of all other threads of the process and of W&B's own process, and the time that
training waits in the calls: as if all of it were taken from the core that trains. Importing and starting W&B, once a
run, is told apart.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from engine.benchmarks.base import Row, median_ratio, pairs
from engine.distributed import Ranks
from engine.numerics import NumberGuard
from engine.precision import resolve_precision
from models import create_model

SERVERS = ("well", "away", "slow", "refusing", "dying")
TARGET = 1.01
BATCH_SIZE = 16  # small: a short step is slowed by more
GUARDED_BATCH_SIZE = 128
STEPS_A_RECORD = 5  # train.py: 50
START_STEPS = 50  # in which W&B is imported and its process starts, however slow the server answers


class Training:
    """ResNet-20 on random 32x32 images; ``guarded``: the loss and the gradients of every step are looked at."""

    def __init__(self, device: torch.device, guarded: bool, batch_size: int = BATCH_SIZE) -> None:
        torch.manual_seed(0)
        self.model = create_model("resnet20", num_classes=100).to(device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.images = torch.randn(batch_size, 3, 32, 32).to(device, memory_format=torch.channels_last)
        self.labels = torch.randint(0, 100, (batch_size,)).to(device)
        precision = resolve_precision("fp32", device)
        ranks = Ranks(0, 1, 0, device)
        self.guard = (
            NumberGuard(self.model, "raise", precision.scaler(), ranks, precision.autocast) if guarded else None
        )
        self.steps = 0

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(self.images), self.labels)
        if self.guard is None:
            loss.backward()
        else:
            self.guard.loss(loss).backward()
            self.guard.allows(self.steps, self.images)
        self.optimizer.step()
        self.steps += 1


def measure(quick: bool, device: torch.device) -> list[Row]:
    """One row for the guard, one for each of ``SERVERS``."""
    steps = 10 if quick else 40
    return [_guard(5 if quick else 20, device), *(_server(mode, steps, device) for mode in SERVERS)]


def _guard(count: int, device: torch.device) -> Row:
    guarded, plain = (Training(device, watch, GUARDED_BATCH_SIZE) for watch in (True, False))
    found = pairs(guarded.step, plain.step, count, device)
    return {
        "name": "guard of the numbers, resnet20", "ratio": median_ratio(found), "better": "lower", "target": TARGET,
        "slack": 0.03, "pairs": count, "batch_size": GUARDED_BATCH_SIZE,
        "step_seconds": statistics.median(second for _, second in found),
    }  # fmt: skip


def _server(mode: str, steps: int, device: torch.device) -> Row:
    from tests.engine.wandb_server import Server

    server = Server("well" if mode in ("away", "dying") else mode)
    if mode == "away":
        server.shutdown()
        server.server_close()
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = context.Process(target=_train, args=(theirs, device, server.url, folder))
        process.start()
        pipe.send(START_STEPS)
        start = pipe.recv()
        spent = []
        for half in range(2):
            if mode == "dying" and half:
                server.mode = "hanging"
            pipe.send(steps // 2)
            spent.append(pipe.recv())
        process.kill()  # what is left would wait for the server
        process.join()
    if mode != "away":
        server.shutdown()
    training, besides, waited = (sum(part[index] for part in spent) for index in range(3))
    return {
        "name": f"W&B, server {mode}", "ratio": 1 + (besides + waited) / training, "better": "lower", "target": TARGET,
        "slack": 0.03, "training_cpu_seconds": training, "wandb_cpu_seconds": besides, "seconds_in_calls": waited,
        "start_cpu_seconds": start[1], "records": steps // STEPS_A_RECORD, "steps": steps, "batch_size": BATCH_SIZE,
    }  # fmt: skip


def _train(pipe: Connection, device: torch.device, url: str, folder: str) -> None:
    """Train as many steps as the pipe says; send the seconds of training, of everything else, and of waiting."""
    torch.set_num_threads(1)
    os.environ |= {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": url, "WANDB_MODE": "online"}
    from engine.tracking import create_tracker

    training = Training(device, True)
    training.step()
    tracker = None
    while True:
        steps = pipe.recv()
        own, all_threads, others, waited = time.thread_time(), time.process_time(), _cpu_of_children(), 0.0
        if tracker is None:
            labels: dict[str, Any] = {"project": "p", "name": "n", "group": "g", "job_type": "t", "tags": []}
            tracker = create_tracker("wandb", config={}, directory=folder, run_id="run0", **labels)
        for _ in range(steps):
            training.step()
            if training.steps % STEPS_A_RECORD == 0:
                began = time.perf_counter()
                tracker.log({"step": training.steps, "train/loss": 1.0}, training.steps)
                waited += time.perf_counter() - began
        own = time.thread_time() - own
        pipe.send((own, time.process_time() - all_threads - own + _cpu_of_children() - others, waited))


def _cpu_of_children() -> float:
    """CPU seconds so far of the living processes that descend from this one."""
    parents, used = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            parents[pid], used[pid] = int(fields[1]), int(fields[11]) + int(fields[12])
    found = [os.getpid()]
    for known in found:  # grows meanwhile
        found += [pid for pid, parent in parents.items() if parent == known]
    return sum(used.get(pid, 0) for pid in found[1:]) / os.sysconf("SC_CLK_TCK")
