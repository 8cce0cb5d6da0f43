"""Small runs of train.py: in this process, or in a process of their own that has torch imported already."""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from engine.config import prepare, register_schema, run_directory
from tests.processes import forkserver

register_schema()

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
TRAIN = ROOT / "train.py"

# ResNet-20 of width 4 on 1,438 digits of 8x8 pixels: four steps an epoch, the last of them with fewer images
TINY = (
    "model.options.width=4", "dataset.image_size=8", "trainer.batch_size=400", "trainer.epochs=2",
    "trainer.precision=fp32", "trainer.device=cpu", "logger=none", "sparsity=0.6", "optimizer.lr=0.3",
    "method.exclude=[fc.*]",
)  # fmt: skip

# what of a record or a result tells of the clock, the machine or the command, not of the computation
_CIRCUMSTANCES = {
    "wall_seconds", "images_per_second", "command", "git_commit", "dirty", "hardware", "versions", "device",
    "world_size", "label",
}  # fmt: skip


def compose(*overrides: str) -> DictConfig:
    """What Hydra would hand to train.py's main."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def start(*overrides: str) -> float:
    """`python train.py` with TINY and ``overrides``, in this process and the current folder; the final top-1."""
    import train

    return train.start(compose(*TINY, *overrides))


def directory(*overrides: str) -> Path:
    """Where `start` with the same arguments works."""
    return run_directory(prepare(compose(*TINY, *overrides)))


# ---- processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    status: int  # negative: the signal that killed it
    out: str
    err: str


class Command:
    """`python train.py ARGUMENTS` in a process of its own, forked from a server that has imported torch."""

    def __init__(
        self,
        *arguments: str,
        cwd: Path,
        env: dict[str, str] | None = None,
        before: Callable[..., None] | None = None,
        with_arguments: tuple[Any, ...] = (),
        name: str = "process",
    ) -> None:
        self._streams = [cwd / f".{name}.{stream}" for stream in ("out", "err")]
        self.process = forkserver().Process(
            target=_train, args=(arguments, str(cwd), dict(env or {}), before, with_arguments, list(self._streams))
        )
        with mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT)}):  # of the server, which the first call starts
            self.process.start()

    def wait(self, timeout: float = 120) -> Finished:
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise AssertionError(f"no end after {timeout} s; {self._text()}")
        assert self.process.exitcode is not None
        return Finished(self.process.exitcode, *self._text())

    def _text(self) -> list[str]:
        return [path.read_text() if path.exists() else "" for path in self._streams]


def command(*arguments: str, cwd: Path, **options: Any) -> Finished:
    return Command(*arguments, cwd=cwd, **options).wait()


def two_processes(
    *arguments: str, cwd: Path, env: dict[str, str] | None = None, ends_together: bool = False, **options: Any
) -> list[Finished]:
    """As torchrun starts two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(env or {})}
    ranks = [
        Command(*arguments, cwd=cwd, env={**common, "RANK": r, "LOCAL_RANK": r}, name=f"rank{r}", **options)
        for r in ("0", "1")
    ]
    if ends_together:  # as torchrun sees to it: a dead process may leave the other waiting for it at the start
        while all(rank.process.is_alive() for rank in ranks):
            ranks[0].process.join(0.05)
        for rank in ranks:
            rank.process.join(20)
            if rank.process.is_alive():
                rank.process.kill()
    return [rank.wait() for rank in ranks]


def _train(
    arguments: tuple[str, ...],
    cwd: str,
    env: dict[str, str],
    before: Callable[..., None] | None,
    with_arguments: tuple[Any, ...],
    streams: list[Path],
) -> None:
    for number, path in enumerate(streams, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(cwd)
    os.environ.update(env)
    sys.argv = [str(TRAIN), *arguments]
    if before is not None:
        before(*with_arguments)
    try:
        runpy.run_path(str(TRAIN), run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def die_at(when: str, step: int) -> None:
    """Let this process kill itself, as `kill -9` would: "in" that step, or once its "checkpoint" is written."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    import engine.checkpoint

    if when == "checkpoint":
        save = engine.checkpoint.save_checkpoint

        def save_and_die(directory: Path, state: dict[str, Any], at: int, *rest: Any) -> Path:
            path = save(directory, state, at, *rest)
            if at == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return path

        engine.checkpoint.save_checkpoint = save_and_die
    else:
        number = {"in": signal.SIGKILL, "term": signal.SIGTERM}[when]
        seen = 0

        def count(*_: Any) -> None:
            nonlocal seen
            seen += 1
            if seen == step:
                os.kill(os.getpid(), number)

        register_optimizer_step_pre_hook(count)


class Plain(torch.nn.Module):
    """A network without BatchNorm, whose gradient is the same however a batch is cut."""

    def __init__(self, num_classes: int, width: int = 4) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, width, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.fc = torch.nn.Linear(2 * width * 16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(self.conv1(x).relu()).relu()
        return self.fc(torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))


def plain_network(*then: Any) -> None:
    """model=resnet20 is `Plain` in this process; each process writes what its model is at the end."""
    import models.factory
    from feather import Sparsifier

    models.factory.OURS["resnet20"] = Plain
    finalize = Sparsifier.finalize

    def finalize_and_write(self: Sparsifier, **options: Any) -> Any:
        report = finalize(self, **options)
        own = {
            "thresholds": [layer.threshold for layer in report.layers],
            "zeros": [layer.zeros for layer in report.layers],
            "weights": [parameter.double().sum().item() for parameter in self._parameters],
        }
        Path(f"rank{os.environ.get('RANK', '')}.json").write_text(json.dumps(own))
        return report

    Sparsifier.finalize = finalize_and_write
    if then:
        die_at(*then)


# ---- what a run left -------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_weights(run: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(run / "model.safetensors")


def outcome(run: Path) -> tuple[bytes, list[dict[str, Any]], dict[str, Any]]:
    """All that must not depend on interruptions: the model's bytes, the records and the result."""
    records = [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in read_metrics(run)]
    result = {k: v for k, v in read_json(run / "result.json").items() if k not in _CIRCUMSTANCES}
    return (run / "model.safetensors").read_bytes(), records, result


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file, to see that nothing was touched."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
