"""Weights & Biases as a mirror of ``metrics.jsonl``. Tracking never asks, never stops a run, and no run waits for a
server while it trains.

W&B cannot resume an offline run. A resumed run therefore writes a new offline run with the same id that holds the whole
history, and the one it replaces is renamed, so that ``wandb sync`` sends every step once.

A sweep's agent decides itself where its trial is logged: its run id and project then take the place of ours.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from omegaconf import OmegaConf

from engine.background import BackgroundTracker
from engine.charts import CURVE, final_charts
from engine.wandb_login import logged_in

if TYPE_CHECKING:
    from engine.config import Config
    from engine.rundir import RunDirectory

_INIT_TIMEOUT_SECONDS = 15.0
_FINISH_TIMEOUT_SECONDS = 60.0

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where a run's figures are shown."""

    description: str
    """One line that says where to see the run; empty where nothing is tracked."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Mirror one record; ``step`` never goes back."""

    def summary(self, result: Mapping[str, Any]) -> None:
        """Show a finished run's figures: the numbers and words of ``result.json``, and charts of it."""

    def artifact(self, path: str | Path, name: str) -> None:
        """Keep a file of the run, such as the final model."""

    def finish(self) -> None:
        """Write out what is left; nothing may follow."""


class NoTracker:
    """Tracks nothing."""

    description = ""

    def log(self, metrics: Mapping[str, Any], step: int) -> None: ...

    def summary(self, result: Mapping[str, Any]) -> None: ...

    def artifact(self, path: str | Path, name: str) -> None: ...

    def finish(self) -> None: ...


def create_tracker(
    kind: str,
    *,
    project: str,
    name: str,
    group: str,
    job_type: str,
    tags: list[str],
    config: Mapping[str, Any],
    directory: str | Path,
    run_id: str,
    history: Iterable[Mapping[str, Any]] = (),
) -> Tracker:
    """Start tracking a run; online, in a thread of its own, so that no server holds training up.

    Args:
        kind: ``wandb`` (online where somebody is logged in, else offline), ``wandb_offline`` or ``none``. The
            environment variable WANDB_MODE may turn ``wandb`` to offline, and tracking off.
        project, name, group, job_type, tags, config: what W&B shows the run under.
        directory: W&B writes into its subfolder ``wandb``.
        run_id: the same for a run and its resumption; a sweep's agent has its own.
        history: the records of ``metrics.jsonl`` up to the checkpoint that the run resumes from, in order.

    Returns:
        A tracker. Where W&B cannot be started it is an offline one, or one that does nothing, after a warning.

    Raises:
        ValueError: unknown ``kind``.
    """
    if kind not in ("wandb", "wandb_offline", "none"):
        raise ValueError(f"logger={kind} is unknown: choose wandb, wandb_offline or none")
    modes = _modes(kind)
    if not modes:
        return NoTracker()
    arguments = {
        "project": project, "name": name, "group": group, "job_type": job_type, "tags": tags, "config": dict(config),
    }  # fmt: skip
    directory, past = Path(directory).resolve(), list(history)
    if modes[0] == "online":
        return BackgroundTracker(lambda: _start(modes, directory, run_id, past, arguments), _say)
    return _start(modes, directory, run_id, past, arguments)


def _say(description: str) -> None:
    if description:
        print(f"  {description}", flush=True)


def _start(
    modes: Iterable[Literal["online", "offline"]],
    directory: Path,
    run_id: str,
    history: list[Mapping[str, Any]],
    arguments: dict[str, Any],
) -> Tracker:
    try:
        import wandb
    except ImportError as error:
        _log.warning("W&B is not used, it cannot be imported (%s); metrics.jsonl holds everything", error)
        return NoTracker()

    directory.mkdir(parents=True, exist_ok=True)
    before = _run_folders(directory)
    _set_aside(folder for folder in before if folder.name.startswith("offline-run-"))
    in_sweep = started_by_agent()
    for mode in modes:
        try:
            run = wandb.init(
                **arguments | ({"project": None} if in_sweep else {}),
                dir=str(directory),
                id=None if in_sweep else run_id,
                mode=mode,
                resume="allow" if mode == "online" else None,
                reinit="finish_previous",
                settings=_settings(wandb),
            )
            tracker = _WandbTracker(wandb, run, mode)
            tracker.start(history)
            return tracker
        except Exception as error:
            _log.warning("W&B does not start %s (%s: %s)", mode, type(error).__name__, str(error).partition("\n")[0])
            # The failed attempt keeps the run id taken until W&B's service has gone.
            _quietly("teardown", wandb.teardown)
            _set_aside(_run_folders(directory) - before)
    _log.warning("W&B is not used; metrics.jsonl holds everything")
    return NoTracker()


def started_by_agent() -> bool:
    """Whether a W&B sweep's agent runs this process; W&B then takes the run's id and project from it."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def mirror_finished(cfg: Config, run: RunDirectory) -> None:
    """Give a trial of a sweep the figures of the finished ``run`` that has its configuration.

    The agent has announced the trial to W&B, where it would stay empty and the search learn nothing from it.
    """
    if run.result is None or not started_by_agent():
        return
    from engine.records import read_metrics

    tracker = create_tracker(
        cfg.logger.name, directory=run.path, run_id=run.run_id, history=read_metrics(run.path / "metrics.jsonl"),
        **labels(cfg, run),
    )  # fmt: skip
    tracker.summary(run.result)
    tracker.finish()


def labels(cfg: Config, run: RunDirectory) -> dict[str, Any]:
    """What W&B shows a run under: one group per experiment, one job type per method."""
    return {
        "project": cfg.logger.project,
        "name": run.path.name,
        "group": cfg.experiment_name,
        "job_type": cfg.method.name,
        "tags": [cfg.method.name, cfg.model.name, cfg.dataset.name],
        "config": _json_values(OmegaConf.to_container(OmegaConf.structured(cfg))),
    }


def _json_values(value: Any) -> Any:
    """Infinity, which JSON lacks, as the word that ``result.json`` has for it."""
    if isinstance(value, dict):
        return {key: _json_values(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class _WandbTracker:
    def __init__(self, wandb: Any, run: Any, mode: str) -> None:
        self._wandb = wandb
        self._run = run
        self._broken = False
        self._curve: list[tuple[float, float]] = []
        if mode == "online":
            self.description = f"W&B: {run.url}"
        else:
            folder = Path(run.dir).parent
            if folder.is_relative_to(Path.cwd()):
                folder = folder.relative_to(Path.cwd())
            self.description = (
                f"W&B: offline, see it with `wandb beta leet {folder}`, send it with `wandb sync {folder}`"
            )

    def start(self, history: Iterable[Mapping[str, Any]]) -> None:
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("epoch", step_metric="step")
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric(CURVE, step_metric="sparsity/global")
        # An online run that is continued has its past on the server already.
        first = self._run.step if self._run.resumed else 0
        for record in history:
            self._log(record, record["step"], send=record["step"] >= first)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self._log(metrics, step)

    def _log(self, metrics: Mapping[str, Any], step: int, send: bool = True) -> None:
        values = {key: value for key, value in metrics.items() if value is not None} | {"step": step}
        if "val/top1" in values and "sparsity/global" in values:
            values[CURVE] = values["val/top1"]
            self._curve.append((values["sparsity/global"], values["val/top1"]))
        if send:
            self._call("log", lambda: self._run.log(values, step=step))

    def summary(self, result: Mapping[str, Any]) -> None:
        figures = {key: value for key, value in result.items() if isinstance(value, int | float | str)}
        self._call("summary", lambda: self._run.summary.update(figures))
        # without a step: into the last step's row, or the next one where that row is on the server already
        self._call("charts", lambda: self._run.log(final_charts(self._wandb, result.get("layers", []), self._curve)))

    def artifact(self, path: str | Path, name: str) -> None:
        def send() -> None:
            artifact = self._wandb.Artifact(name, type="model")
            artifact.add_file(str(path))
            self._run.log_artifact(artifact)

        self._call("artifact", send)

    def finish(self) -> None:
        self._call("finish", self._run.finish)

    def _call(self, what: str, action: Any) -> None:
        if not self._broken and not _quietly(what, action):
            self._broken = True


def _quietly(what: str, action: Any) -> bool:
    """Run a call of W&B; False, and a line of warning, where it fails."""
    try:
        action()
    except Exception as error:
        _log.warning("W&B failed in %s (%s: %s); the run goes on without it", what, type(error).__name__, error)
        return False
    return True


def _modes(kind: str) -> list[Literal["online", "offline"]]:
    """What to try, in order; empty for no tracking."""
    asked = os.environ.get("WANDB_MODE", "")
    if kind == "none" or asked == "disabled":
        return []
    if kind == "wandb_offline" or asked in ("offline", "dryrun") or not logged_in():
        return ["offline"]
    return ["online", "offline"]


def _settings(wandb: Any) -> Any:
    wanted = {
        "silent": True,
        "console": "off",
        "disable_git": True,
        "save_code": False,
        "init_timeout": _INIT_TIMEOUT_SECONDS,
        "finish_timeout": _FINISH_TIMEOUT_SECONDS,
    }
    # finish_timeout is younger than the oldest version of W&B that is supported.
    return wandb.Settings(**{key: value for key, value in wanted.items() if key in wandb.Settings.model_fields})


def _run_folders(directory: Path) -> set[Path]:
    """W&B's folders of this run, under whichever id: the directory holds no other run."""
    folder = directory / "wandb"
    return {*folder.glob("offline-run-*"), *folder.glob("run-*")}


def _set_aside(folders: Iterable[Path]) -> None:
    """Rename folders of runs, so that ``wandb sync`` no longer takes them for runs to send."""
    for folder in folders:
        number = 1
        while (target := folder.with_name(f"superseded-{number}-{folder.name}")).exists():
            number += 1
        folder.rename(target)
