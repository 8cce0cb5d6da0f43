"""What looking at the numbers costs, and what a W&B server costs that is away, slow, refusing or dying.

The guard: steps of one network with and without it alternate in one process. W&B: two processes train the same network
and take turns of some steps, one of them tracked; whoever has not its turn is stopped, W&B's own process included. The
tracked one writes ten times as many records as `train.py` does by default. Its start, which imports W&B and may wait
for the server, is told apart from the ratio. The row without a server ("no tracker") shows what is noise.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
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

SERVERS = ("no tracker", "away", "slow", "refusing", "dying")
TARGET = 1.01
BATCH_SIZE = 32
STEPS_A_RECORD = 5  # train.py: 50
START_TURNS = 4  # in which W&B is imported and its process starts


class Training:
    """ResNet-20 on random 32x32 images; ``guarded``: the loss and the gradients of every step are looked at."""

    def __init__(self, device: torch.device, guarded: bool) -> None:
        torch.manual_seed(0)
        self.model = create_model("resnet20", num_classes=100).to(device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.images = torch.randn(BATCH_SIZE, 3, 32, 32).to(device, memory_format=torch.channels_last)
        self.labels = torch.randint(0, 100, (BATCH_SIZE,)).to(device)
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
    turns = 2 if quick else 12
    rows = [_guard(10 if quick else 60, device)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        plain = Partner(device, None, folder)
        rows += [_server(mode, turns, plain, device, folder) for mode in SERVERS]
        plain.end()
    return rows


def _guard(count: int, device: torch.device) -> Row:
    guarded, plain = Training(device, True), Training(device, False)
    found = pairs(guarded.step, plain.step, count, device)
    return {
        "name": "guard of the numbers, resnet20", "ratio": median_ratio(found), "better": "lower", "target": TARGET,
        "slack": 0.03, "pairs": count, "batch_size": BATCH_SIZE,
        "step_seconds": statistics.median(second for _, second in found),
    }  # fmt: skip


def _server(mode: str, turns: int, plain: Partner, device: torch.device, folder: str) -> Row:
    from tests.engine.wandb_server import Server

    server = Server("well" if mode in ("no tracker", "away", "dying") else mode)
    if mode == "away":
        server.shutdown()
        server.server_close()
    tracked = Partner(device, None if mode == "no tracker" else server.url, f"{folder}/{mode}")
    start = [tracked.turn(what) for what in ("start", *["train"] * START_TURNS)]
    found = []
    for turn in range(turns):
        if mode == "dying" and turn == turns // 2:
            server.mode = "hanging"
        if turn % 2:
            one = plain.turn("train")
            found.append((tracked.turn("train"), one))
        else:
            found.append((tracked.turn("train"), plain.turn("train")))
    tracked.end()
    server.shutdown()
    total = [sum(pair[index] for pair in found) for index in (0, 1)]
    return {
        "name": "W&B, no tracker (noise)" if mode == "no tracker" else f"W&B, server {mode}",
        "ratio": total[0] / total[1], "better": "lower", "target": None if mode == "no tracker" else TARGET,
        "slack": 0.05, "median_ratio": median_ratio(found), "seconds_with": total[0], "seconds_without": total[1],
        "turns": turns, "steps_a_turn": STEPS_A_RECORD, "batch_size": BATCH_SIZE,
        "seconds_of_the_start_beyond_training": sum(start) - START_TURNS * total[1] / turns,
    }  # fmt: skip


class Partner:
    """A process that trains in turns; stopped, with its descendants, outside of them."""

    def __init__(self, device: torch.device, url: str | None, folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_train, args=(theirs, device, url, folder, torch.get_num_threads()))
        self._process.start()
        self._pipe.recv()
        self._signal(signal.SIGSTOP)

    def turn(self, what: str) -> float:
        """Seconds that it took."""
        self._signal(signal.SIGCONT)
        self._pipe.send(what)
        seconds: float = self._pipe.recv()
        self._signal(signal.SIGSTOP)
        return seconds

    def end(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.join()

    def _signal(self, number: int) -> None:
        assert self._process.pid is not None
        for pid in _with_descendants(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _with_descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for known in found:  # grows meanwhile
        found += children.get(known, [])
    return found


def _train(pipe: Connection, device: torch.device, url: str | None, folder: str, threads: int) -> None:
    torch.set_num_threads(threads)
    training = Training(device, True)
    log: Callable[[dict[str, Any], int], None] = lambda record, step: None  # noqa: E731
    if url is not None:
        os.environ |= {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": url, "WANDB_MODE": "online"}
    for _ in range(3):
        training.step()
    pipe.send("ready")
    while True:
        what, began = pipe.recv(), time.perf_counter()
        if what == "start" and url is not None:
            from engine.tracking import create_tracker

            log = create_tracker(
                "wandb", project="p", name="n", group="g", job_type="t", tags=[], config={}, directory=folder,
                run_id="run0",
            ).log  # fmt: skip
        if what == "train":
            for _ in range(STEPS_A_RECORD):
                training.step()
            log({"step": training.steps, "train/loss": 1.0}, training.steps)
        pipe.send(time.perf_counter() - began)
