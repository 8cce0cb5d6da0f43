"""The run directory: one per configuration, finished, unfinished or somebody else's."""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from engine.checkpoint import atomic_write
from engine.config import Config, ConfigError, config_hash, run_directory
from engine.lock import NAME as LOCK
from engine.lock import hold, still_holds
from engine.records import write_json

_FORMAT = 1
# In the order of removal: what is left after a crash half-way is still a run's directory, and not a finished one.
_OWN = ("result.json", "checkpoint_*.pt", "model.safetensors", "metrics.jsonl", "wandb", "config.yaml", "run.json")


@dataclass(frozen=True)
class RunDirectory:
    """``path`` and what was found in it; ``run_id`` names the run in W&B across resumptions."""

    path: Path
    run_id: str
    config_hash: str
    is_new: bool
    result: dict[str, Any] | None  # of a finished run

    def create(self, cfg: Config) -> None:
        """Lock the directory, once the run is known to be possible, and mark a new one; of an old one nothing changes.

        Raises:
            ConfigError: it cannot be written, or another process works or has worked there meanwhile.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            hold(self.path)
            now = open_run_directory(cfg)
            if (now.is_new, now.result) != (self.is_new, self.result):
                raise ConfigError(f"run_dir={self.path} was changed by another process meanwhile: start again.")
            if not self.is_new and (self.path / "config.yaml").exists():
                return
            if self.is_new:
                _clear(self.path)
                marker = {"format": _FORMAT, "config_hash": self.config_hash, "run_id": self.run_id}
                write_json(self.path / "run.json", marker)
            config = OmegaConf.to_yaml(OmegaConf.structured(cfg), resolve=True)
            atomic_write(self.path / "config.yaml", config.encode())
        except OSError as error:
            raise ConfigError(
                f"run_dir={self.path} cannot be written ({error.strerror}): name another folder."
            ) from None

    def check(self) -> None:
        """To be called before anything is written.

        Raises:
            ConfigError: the directory is not the one that this run has locked.
        """
        if not still_holds(self.path):
            raise ConfigError(
                f"run_dir={self.path} has vanished while the run was working in it: restore it, or start the run anew."
            )


def open_run_directory(cfg: Config) -> RunDirectory:
    """Look at the directory of this configuration; nothing is written yet.

    Raises:
        ConfigError: the directory belongs to another configuration or holds something else.
    """
    path, digest = run_directory(cfg), config_hash(cfg)
    marker = path / "run.json"
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run_dir={path} is a file: name a folder.")
    if path.is_dir() and not marker.exists() and any(not _is_passing(entry.name) for entry in path.iterdir()):
        raise ConfigError(f"run_dir={path} is not empty and not a run's directory: name a new folder.")
    if marker.exists() and not cfg.overwrite:
        known = _read_json(marker)
        if known.get("format") != _FORMAT:
            raise ConfigError(
                f"{marker} has format {known.get('format')}, this version reads {_FORMAT}: use overwrite=true."
            )
        if known.get("config_hash") != digest:
            raise ConfigError(
                f"run_dir={path} holds a run of another configuration ({known.get('config_hash')}, this is {digest}): "
                "name another folder or use overwrite=true."
            )
        finished = path / "result.json"
        result = _read_json(finished) if finished.exists() else None
        return RunDirectory(path, known["run_id"], digest, False, result)
    return RunDirectory(path, secrets.token_hex(6), digest, True, None)


def _is_passing(name: str) -> bool:
    """Whether a file is what a killed process leaves in a directory that it had not marked yet."""
    return name == LOCK or name.startswith(".tmp-")


def _clear(path: Path) -> None:
    for pattern in _OWN:
        for own in path.glob(pattern):
            if own.is_dir():
                shutil.rmtree(own)
            else:
                own.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is damaged: restore it, or start the run anew with overwrite=true.")
    return content
