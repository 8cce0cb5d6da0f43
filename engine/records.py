"""What a run writes down: ``metrics.jsonl``, JSON files, and the environment it ran in."""

import json
import logging
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import atomic_write
from engine.precision import cpu_has_bf16

_PACKAGES = ("torch", "feather-sparsity", "torchvision", "timm", "numpy", "hydra-core", "wandb")

_log = logging.getLogger(__name__)


class MetricsLog:
    """``metrics.jsonl``: one JSON object per line, each with a ``step`` (optimizer steps done).

    Numbers come back exactly as written. NaN and infinities, which JSON does not have, are written as null.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record; it survives the death of the process.

        Raises:
            ValueError: the record has no integer ``step``.
        """
        if not isinstance(record.get("step"), int):
            raise ValueError(f"a metrics record needs an integer 'step', got {record.get('step')!r}")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_dump(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All records, oldest first; see ``read_metrics``."""
        return read_metrics(self.path)

    def content(self) -> bytes:
        """The file as it is, which a checkpoint holds: with it nothing of the history can be lost."""
        return self.path.read_bytes() if self.path.exists() else b""

    def restore(self, checkpoint: Mapping[str, Any] | None) -> list[dict[str, Any]]:
        """Make the file what it was at a checkpoint, empty where there is None; returns its records.

        Records of later steps and a half-written line go, so that each step stands in the file once. What a damaged
        file lacks comes back from the checkpoint's ``metrics``; an older checkpoint has none, but its ``step``.

        Raises:
            ValueError: a line that is needed is damaged, and the checkpoint does not hold it.
        """
        if checkpoint is not None and "metrics" not in checkpoint:
            return self.truncate(after_step=checkpoint["step"])
        content = b"" if checkpoint is None else checkpoint["metrics"]
        if not self.content().startswith(content):
            _log.warning("METRICS DAMAGED: %s is not what it was; it is restored from the checkpoint", self.path)
        atomic_write(self.path, content)
        return self.read()

    def truncate(self, after_step: int) -> list[dict[str, Any]]:
        """Drop every record of a later step, and a half-written last line; returns what stays."""
        kept = [record for record in self.read() if record["step"] <= after_step]
        atomic_write(self.path, "".join(_dump(record) + "\n" for record in kept).encode())
        return kept


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, oldest first; empty where there is no file.

    A last line that was cut off, by a crash or because the run is still writing, is left out.

    Raises:
        ValueError: any other line is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    *lines, _cut = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number} is no JSON object with a step: restore the file or start the run anew"
            ) from error
        records.append(record)
    return records


def write_json(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write a JSON file atomically, indented; NaN and infinities become null."""
    return atomic_write(path, (_dump(content, indent=2) + "\n").encode())


def environment(root: str | Path | None = None) -> dict[str, Any]:
    """Where a result came from: ``versions``, ``hardware``, ``git_commit``, ``dirty``. Names no machine and no user.

    Args:
        root: a folder of the git repository to describe; the one of this file by default. Outside of any repository
            ``git_commit`` and ``dirty`` are None. ``dirty``: tracked files differ from the commit.
    """
    root = Path(root) if root is not None else Path(__file__).resolve().parent.parent
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    cuda = torch.cuda.is_available()
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
            "cuda": torch.version.cuda if cuda else None,
        },
        "hardware": {
            "platform": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu_model(),
            "cpu_instructions": torch.backends.cpu.get_cpu_capability() + (" with bf16" if cpu_has_bf16() else ""),
            "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if cuda else None,
            "gpu_count": torch.cuda.device_count() if cuda else 0,
        },
        "git_commit": commit,
        "dirty": None if commit is None or changes is None else bool(changes),
    }


def _dump(content: Mapping[str, Any], indent: int | None = None) -> str:
    return json.dumps(_finite(content), allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
