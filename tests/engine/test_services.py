"""A W&B server that is away, slow, hanging or hostile: training does not wait for it, and the history is whole here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import background, tracking
from engine.background import BackgroundTracker
from tests.engine.wandb_reader import read_history
from tests.engine.wandb_server import Server
from tests.train_helpers import ROOT


@pytest.fixture
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server | None]:
    import wandb

    mode = request.param
    server = Server("well" if mode in ("away", "dying") else mode)
    for name in ("WANDB_MODE", "WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setattr(tracking, "_INIT_TIMEOUT_SECONDS", 4.0)
    monkeypatch.setattr(tracking, "_FINISH_TIMEOUT_SECONDS", 3.0)
    monkeypatch.setattr(background, "_FINISH_SECONDS", 30.0)
    if mode == "away":
        server.shutdown()
        server.server_close()
    wandb.teardown()  # W&B reads the environment once
    yield server
    wandb.teardown()


def start(directory: Path, **changes: Any) -> tracking.Tracker:
    arguments: dict[str, Any] = {
        "project": "tests", "name": "a-run", "group": "g", "job_type": "t", "tags": [], "config": {"seed": 0},
        "directory": directory, "run_id": "run0",
    }  # fmt: skip
    return tracking.create_tracker("wandb", **(arguments | changes))


@pytest.mark.parametrize("server", ["well", "away", "slow", "refusing", "hanging", "dying"], indirect=True)
def test_training_does_not_wait_and_the_whole_history_is_here(
    server: Server, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    mode = request.node.callspec.params["server"]
    spent = time.monotonic()
    tracker = start(tmp_path, history=[{"step": 1, "train/loss": 1.0}])
    for step in range(2, 106):
        tracker.log({"step": step, "train/loss": 1 / step}, step)
    spent = time.monotonic() - spent
    assert isinstance(tracker, BackgroundTracker)
    assert spent < 0.5  # a record, 50 steps apart by default, costs microseconds: a call puts it into a queue
    if mode == "dying":
        deadline = time.monotonic() + 60
        while not server.received("wandb-history") and not server.received("UpsertBucket"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server.mode = "hanging"
    tracker.log({"step": 106, "train/loss": 1 / 106}, 106)
    tracker.summary({"final_top1": 50.0, "layers": []})
    began = time.monotonic()
    tracker.finish()
    assert time.monotonic() - began < 35
    folders = [*tmp_path.glob("wandb/run-*"), *tmp_path.glob("wandb/offline-run-*")]
    (folder,) = folders  # one run to sync
    assert folder.name.startswith("run-") is (mode in ("well", "dying"))
    assert [entry["step"] for entry in read_history(folder) if "step" in entry] == list(range(1, 107))


PROGRAM = """
import sys, time
sys.path.insert(0, {root!r})
from engine import background, tracking
background._FINISH_SECONDS = 2.0
tracker = tracking.create_tracker("wandb", project="p", name="n", group="g", job_type="t", tags=[], config={{}},
                                  directory={folder!r}, run_id="run0")
tracker.log({{"step": 1}}, 1)
tracker.finish()
print("the run has ended", flush=True)
"""


@pytest.mark.parametrize("server", ["hanging"], indirect=True)
def test_a_process_ends_although_the_server_hangs(server: Server, tmp_path: Path) -> None:
    program = PROGRAM.format(root=str(ROOT), folder=str(tmp_path))
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    assert ended.returncode == 0
    assert "the run has ended" in ended.stdout
    assert "metrics.jsonl holds all" in ended.stderr
