"""Seconds until `train.py` answers: its help, and the first training step of the default run."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from engine.benchmarks.base import Row

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {"help": 2.0, "first step": 8.0}


def measure(quick: bool) -> list[Row]:
    """The best of some starts each: what else the machine does can only delay one."""
    rounds = 1 if quick else 3
    found = {"help": min(_help() for _ in range(rounds)), "first step": min(_first_step() for _ in range(rounds))}
    return [
        {
            "name": f"start, {what}", "ratio": seconds / TARGETS[what], "better": "lower", "target": 1.0, "slack": 0.5,
            "seconds": seconds, "seconds_allowed": TARGETS[what],
        }
        for what, seconds in found.items()
    ]  # fmt: skip


def _help() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def _first_step() -> float:
    """Until the first record of a run that records every step."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "train.py", f"run_dir={run}", "logger=none", "trainer.log_every=1",
                   "trainer.device=cpu", "trainer.progress=false"]  # fmt: skip
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").stat().st_size:
                if process.poll() is not None:
                    raise RuntimeError(f"The run ended before its first step: {process.communicate()[1].decode()}")
                time.sleep(0.01)
            return time.perf_counter() - start
        finally:
            process.kill()
            process.communicate()
