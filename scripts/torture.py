"""Kill training runs at random moments, resume each, and compare what is left with the uninterrupted run, bit by bit.

    python scripts/torture.py [--kills 100] [--seed 0] [--out results/benchmarks/torture.json]

Every kill is a SIGKILL: at a random moment of the whole run, or at a random moment inside one phase of it (writing a
checkpoint, evaluating, finalising). Of two processes it hits a random one, or both. The run is then started again with
the same command until it ends; a third of the runs are killed a second time on the way. Compared with the
uninterrupted run are the model's bytes, all records of metrics.jsonl, result.json, and the offline history of W&B: the
same values, no step twice, none missing. Exit status: 0 when every kill was survived.
"""

from __future__ import annotations

import argparse
import collections
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "OMP_NUM_THREADS": "1"}

from engine import script  # noqa: E402
from engine.records import environment, write_json  # noqa: E402
from tests.engine.wandb_reader import read_history  # noqa: E402
from tests.train_helpers import Command, outcome, two_processes  # noqa: E402

# ResNet-20 of width 8 on 8x8 digits, two epochs of four steps, a record at every step
BASE = (
    "model.options.width=8", "dataset.image_size=8", "trainer.batch_size=400", "trainer.epochs=2", "trainer.device=cpu",
    "trainer.log_every=1", "trainer.precision=fp32", "trainer.progress=false", "sparsity=0.6", "run_dir=run",
)  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    name: str
    overrides: tuple[str, ...]
    processes: int = 1
    wandb: bool = True

    @property
    def arguments(self) -> tuple[str, ...]:
        return (*BASE, *self.overrides, "logger=wandb_offline" if self.wandb else "logger=none")


CONFIGURATIONS = (
    Configuration("feather", ()),
    Configuration("feather bf16", ("trainer.precision=bf16",)),
    Configuration("feather accumulated", ("trainer.accumulate=3",)),
    Configuration("ASL+", ("framework=asl_plus", "sparsity_schedule.end_fraction=1")),
    Configuration("STR", ("method=str",)),
    Configuration("RigL", ("method=rigl",)),
    Configuration("AC/DC", ("method=acdc",)),
    Configuration("Spartan bf16 accumulated", ("method=spartan", "trainer.precision=bf16", "trainer.accumulate=2")),
    Configuration("HAM, AdamW", ("modifier=ham", "optimizer=adamw", "optimizer.lr=0.01")),
    Configuration("two processes", ("trainer.batch_size=361",), processes=2),
    Configuration("two processes RigL", ("trainer.batch_size=361", "method=rigl"), processes=2, wandb=False),
)

# phase: the function that it is, as (module, name)
PHASES = {
    "checkpoint": ("engine.checkpoint", "save_checkpoint"),
    "evaluation": ("engine.evaluate", "evaluate"),
    "finalisation": ("engine.outcome", "describe_result"),
}
MOMENTS = ("any", "any", *PHASES)  # two in five kills at any moment


def kill_in(phase: str, entry: int, fraction: float, rank: int | None) -> None:
    """In the process to be killed: SIGKILL itself ``fraction`` of the way through the ``entry``-th call of a phase.

    A timer set as the phase begins; ``fraction`` is that of a time in which it is usually done.
    """
    if rank is not None and int(os.environ.get("RANK", "0")) != rank:
        return
    import importlib

    module, name = PHASES[phase]
    owner = importlib.import_module(module)
    function = getattr(owner, name)
    calls = 0

    def entered(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == entry:
            delay = fraction * {"checkpoint": 0.06, "evaluation": 0.15, "finalisation": 0.6}[phase]
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return function(*args, **kwargs)

    setattr(owner, name, entered)


class Bench:
    """Runs one configuration in folders of its own and knows what the uninterrupted run left."""

    def __init__(self, configuration: Configuration, folder: Path) -> None:
        self.configuration, self.folder = configuration, folder
        expected = self.new_folder()
        began = time.monotonic()
        self.run(expected)
        self.seconds = time.monotonic() - began
        self.expected = self.left(expected)

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

    def run(self, cwd: Path, before: Callable[..., None] | None = None, *arguments: Any) -> list[int]:
        """Exit statuses, negative for a signal."""
        options: dict[str, Any] = {"cwd": cwd, "before": before, "with_arguments": arguments}
        if self.configuration.processes == 2:
            ends = two_processes(*self.configuration.arguments, ends_together=before is not None, **options)
        else:
            ends = [Command(*self.configuration.arguments, **options).wait(600)]
        if before is None and any(end.status for end in ends):
            raise RuntimeError("\n".join(end.err[-2000:] for end in ends))
        return [end.status for end in ends]

    def left(self, cwd: Path) -> Any:
        history = None
        if self.configuration.wandb:
            entries = read_history(cwd / "run")
            drop = ("_timestamp", "_runtime", "_wandb")
            history = [
                {k: v for k, v in entry.items() if not k.startswith(("perf/", *drop)) and "table" not in k}
                for entry in entries
            ]
        return (*outcome(cwd / "run"), history)


def kill_at(seconds: float, rank: int | None) -> None:
    """In the process to be killed: SIGKILL itself after so long."""
    if rank is None or int(os.environ.get("RANK", "0")) == rank:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True  # a run that is faster than that ends
        timer.start()


def differences(left: Any, expected: Any) -> list[str]:
    parts = ("model.safetensors", "metrics.jsonl", "result.json", "W&B history")
    return [part for part, a, b in zip(parts, left, expected, strict=True) if a != b]


def torture(
    configurations: tuple[Configuration, ...],
    kills: int,
    seed: int,
    folder: Path,
    say: Callable[[str], None] = print,
    minutes: float = math.inf,
) -> dict[str, Any]:
    """Kill ``kills`` times in all, or as often as ``minutes`` allow; what came of it."""
    end = time.monotonic() + 60 * minutes
    chance = random.Random(seed)
    benches: dict[str, Bench] = {}
    by_name: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    moments: collections.Counter[str] = collections.Counter()
    mismatches: list[dict[str, Any]] = []
    done = survived = trial = 0
    while done < kills and time.monotonic() < end:
        configuration = configurations[trial % len(configurations)]
        trial += 1
        if configuration.name not in benches:
            benches[configuration.name] = Bench(configuration, folder)
        bench = benches[configuration.name]
        cwd, killed = bench.new_folder(), 0
        for _ in range(min(2 if chance.random() < 1 / 3 else 1, kills - done)):
            rank = chance.choice([0, 1, None]) if configuration.processes == 2 else 0
            moment, entry, fraction = chance.choice(MOMENTS), chance.choice([1, 2]), chance.random()
            if moment == "finalisation":
                entry = 1
            if moment == "any":
                statuses = bench.run(cwd, kill_at, fraction * bench.seconds, rank)
            else:
                statuses = bench.run(cwd, kill_in, moment, entry, fraction, rank)
            if -signal.SIGKILL in statuses:  # a process that only waited for a dead one counts with it
                killed += 1
                moments[moment] += 1
        if not killed:  # the run was faster than the kill
            shutil.rmtree(cwd, ignore_errors=True)
            continue
        try:
            bench.run(cwd)
            wrong = differences(bench.left(cwd), bench.expected)
        except (RuntimeError, OSError, AssertionError) as error:
            wrong = [str(error).strip().splitlines()[-1]]
        done += killed
        by_name[configuration.name]["kills"] += killed
        if wrong:
            mismatches.append({"configuration": configuration.name, "kills": killed, "differs": wrong})
            say(f"MISMATCH {configuration.name}: {', '.join(wrong)}; see {cwd}")
        else:
            survived += killed
            by_name[configuration.name]["survived"] += killed
            shutil.rmtree(cwd, ignore_errors=True)  # W&B's own process may still write
        say(f"{done} kills, {survived} survived, {len(mismatches)} mismatches ({configuration.name})")
    return {
        "kills": done, "survived": survived, "mismatches": len(mismatches), "moments": dict(moments),
        "configurations": {name: dict(counts) for name, counts in by_name.items()}, "details": mismatches,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop earlier, after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the counts to this JSON file")
    options = parser.parse_args(arguments)
    surroundings, began = environment(), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    found = torture(
        CONFIGURATIONS, options.kills, options.seed, folder, lambda text: print(text, flush=True), options.minutes
    )
    print(f"{found['kills']} kills, {found['survived']} survived, {found['mismatches']} mismatches")
    if options.out:
        limit = f" --minutes {options.minutes:g}" if math.isfinite(options.minutes) else ""
        command = f"python scripts/torture.py --kills {options.kills} --seed {options.seed}{limit}"
        seconds = round(time.monotonic() - began)
        write_json(options.out, {"format": 1, **found, "seconds": seconds, **surroundings, "command": command})
    if not found["mismatches"]:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if found["mismatches"] else 0


if __name__ == "__main__":
    script.run(main)
