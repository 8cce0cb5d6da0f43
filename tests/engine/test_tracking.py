import logging
from pathlib import Path
from typing import Any

import pytest

from engine.tracking import CURVE, NoTracker, Tracker, create_tracker
from tests.engine.wandb_reader import read_history, read_step_metrics, read_summary


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)


def start(directory: Path, kind: str = "wandb_offline", **changes: Any) -> Tracker:
    arguments: dict[str, Any] = {
        "project": "tests",
        "name": "a-run",
        "group": "an-experiment",
        "job_type": "train",
        "tags": ["one", "two"],
        "config": {"seed": 0, "nested": {"p": 3}},
        "directory": directory,
        "run_id": "run0",
    }
    return create_tracker(kind, **(arguments | changes))


def record(epoch: int) -> dict[str, Any]:
    return {
        "step": 10 * epoch,
        "epoch": epoch,
        "val/top1": 0.1 * epoch,
        "sparsity/global": 0.9 - 0.5**epoch,
        "sparsity/layer/conv1": 0.25,
        "train/loss": None if epoch == 3 else 1.0 / epoch,
    }


def logged(directory: Path) -> list[dict[str, Any]]:
    return [entry for entry in read_history(directory) if "step" in entry]


def test_offline_run_holds_the_curve(tmp_path: Path) -> None:
    tracker = start(tmp_path)
    for epoch in range(1, 6):
        tracker.log(record(epoch), 10 * epoch)
    tracker.summary({"final_top1": 0.5})
    tracker.finish()

    curve = [(entry["sparsity/global"], entry[CURVE]) for entry in logged(tmp_path)]
    assert curve == [(record(epoch)["sparsity/global"], record(epoch)["val/top1"]) for epoch in range(1, 6)]
    axes = read_step_metrics(tmp_path)
    assert axes[CURVE] == "sparsity/global"
    assert axes["*"] == "step"
    assert [entry["sparsity/layer/conv1"] for entry in logged(tmp_path)] == [0.25] * 5
    assert read_summary(tmp_path)["final_top1"] == 0.5
    assert str(tmp_path) in tracker.description


def test_resumed_offline_run_has_each_step_once(tmp_path: Path) -> None:
    first = start(tmp_path)
    for epoch in range(1, 5):
        first.log(record(epoch), 10 * epoch)
    first.finish()
    # The last checkpoint was that of epoch 3; epoch 4 is trained and logged again.
    resumed = start(tmp_path, history=[record(epoch) for epoch in range(1, 4)])
    for epoch in range(4, 7):
        resumed.log(record(epoch), 10 * epoch)
    resumed.finish()

    assert [entry["step"] for entry in logged(tmp_path)] == [10, 20, 30, 40, 50, 60]
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1
    assert len(list(tmp_path.glob("wandb/superseded-*"))) == 1


def test_runs_follow_each_other_in_one_process(tmp_path: Path) -> None:
    for index in range(2):
        tracker = start(tmp_path / str(index), run_id=f"run{index}")
        tracker.log(record(index + 1), 10)
        tracker.finish()
    # One that was never finished, as after an error, does not swallow the next.
    start(tmp_path / "2", run_id="run2")
    last = start(tmp_path / "3", run_id="run3")
    last.log(record(4), 40)
    last.finish()
    assert [logged(tmp_path / str(index))[0]["epoch"] for index in (0, 1, 3)] == [1, 2, 4]


def test_without_a_login_a_run_is_offline_and_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for a login"))
    tracker = start(tmp_path, "wandb")
    tracker.finish()
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_an_unreachable_server_means_offline_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    init = wandb.init
    modes = []

    def refuse_online(**arguments: Any) -> Any:
        modes.append(arguments["mode"])
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("no network")
        return init(**arguments)

    monkeypatch.setattr(wandb, "init", refuse_online)
    with caplog.at_level(logging.WARNING, "engine.tracking"):
        tracker = start(tmp_path, "wandb")
    tracker.log(record(1), 10)
    tracker.finish()
    assert modes == ["online", "offline"]
    assert "no network" in caplog.text
    assert logged(tmp_path)[0]["epoch"] == 1


def test_a_failing_wandb_never_stops_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    tracker = start(tmp_path)
    monkeypatch.setattr(wandb.Run, "log", lambda *_, **__: 1 / 0)
    for epoch in range(1, 4):
        tracker.log(record(epoch), 10 * epoch)
    monkeypatch.undo()
    assert caplog.text.count("W&B failed") == 1
    wandb.finish()

    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    assert isinstance(start(tmp_path), NoTracker)


def test_none_and_disabled_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(tmp_path, "none").log(record(1), 10)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    start(tmp_path, "wandb").log(record(1), 10)
    assert not list(tmp_path.iterdir())


def test_an_unknown_logger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="logger=wandbb is unknown: choose wandb"):
        start(tmp_path, "wandbb")
