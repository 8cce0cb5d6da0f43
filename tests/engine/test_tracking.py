import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from engine.charts import CURVE, CURVE_CHART, LAYER_NONZEROS, LAYER_SPARSITY, table_key
from engine.config import prepare
from engine.rundir import RunDirectory
from engine.tracking import NoTracker, Tracker, create_tracker, labels, mirror_finished
from engine.wandb_login import logged_in
from tests.engine.wandb_reader import (
    read_about,
    read_charts,
    read_config,
    read_history,
    read_step_metrics,
    read_summary,
    read_tables,
)
from tests.train_helpers import compose


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


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


RESULT = {
    "final_top1": 0.5,
    "method": "feather",
    "versions": {"torch": "2"},
    "layers": [{"name": "conv1", "size": 10, "zeros": 4}, {"name": "fc", "size": 200, "zeros": 199}],
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
    # Waits for W&B's own process, which would write on into the folder that is set aside next.
    assert [entry["step"] for entry in logged(tmp_path)] == [10, 20, 30, 40]
    # The last checkpoint was that of epoch 3; epoch 4 is trained and logged again.
    resumed = start(tmp_path, history=[record(epoch) for epoch in range(1, 4)])
    for epoch in range(4, 7):
        resumed.log(record(epoch), 10 * epoch)
    resumed.finish()

    assert [entry["step"] for entry in logged(tmp_path)] == [10, 20, 30, 40, 50, 60]
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1
    assert len(list(tmp_path.glob("wandb/superseded-*"))) == 1


def test_a_finished_run_shows_bars_per_layer_and_its_curve(tmp_path: Path) -> None:
    tracker = start(tmp_path)
    for epoch in range(1, 4):
        tracker.log(record(epoch), 10 * epoch)
    assert not list(tmp_path.glob("wandb/*/files/media")), "nothing is drawn while it trains"
    tracker.summary(RESULT)
    tracker.finish()

    tables, charts = read_tables(tmp_path), read_charts(tmp_path)
    rows = [
        {"layer": "conv1", "sparsity": 0.4, "nonzeros": 6, "size": 10},
        {"layer": "fc", "sparsity": 0.995, "nonzeros": 1, "size": 200},
    ]
    for key, value in ((LAYER_SPARSITY, "sparsity"), (LAYER_NONZEROS, "nonzeros")):
        assert charts[key]["panelDefId"] == "wandb/bar/v0"
        assert charts[key]["fieldSettings"] == {"label": "layer", "value": value}
        assert tables[table_key(key)] == rows
    assert charts[CURVE_CHART]["fieldSettings"].items() >= {("x", "sparsity"), ("y", "top1")}
    assert tables[table_key(CURVE_CHART)] == [
        {"sparsity": record(epoch)["sparsity/global"], "top1": record(epoch)["val/top1"]} for epoch in range(1, 4)
    ]
    summary = read_summary(tmp_path)
    assert (summary["final_top1"], summary["method"]) == (0.5, "feather")
    assert "versions" not in summary
    assert [entry["step"] for entry in logged(tmp_path)] == [10, 20, 30], "charts add no step"


def test_a_resumed_run_has_its_charts_once_and_whole(tmp_path: Path) -> None:
    first = start(tmp_path)
    for epoch in range(1, 4):
        first.log(record(epoch), 10 * epoch)
    first.summary(RESULT)  # killed after this, before result.json was written
    first.finish()
    resumed = start(tmp_path, history=[record(epoch) for epoch in range(1, 4)])
    resumed.summary(RESULT)
    resumed.finish()

    assert [row["sparsity"] for row in read_tables(tmp_path)[table_key(CURVE_CHART)]] == [
        record(epoch)["sparsity/global"] for epoch in range(1, 4)
    ]
    assert [entry["step"] for entry in logged(tmp_path)] == [10, 20, 30]


def test_a_dense_run_has_no_bars(tmp_path: Path) -> None:
    tracker = start(tmp_path)
    tracker.log(record(1), 10)
    tracker.summary({"final_top1": 0.5, "layers": []})
    tracker.finish()
    assert read_charts(tmp_path) == {}
    assert read_summary(tmp_path)["final_top1"] == 0.5


def test_a_run_stands_in_its_experiments_group(tmp_path: Path) -> None:
    start(tmp_path).finish()
    about = read_about(tmp_path)
    assert (about.run_group, about.job_type, about.project, about.run_id) == ("an-experiment", "train", "tests", "run0")
    assert read_config(tmp_path) == {"seed": 0, "nested": {"p": 3}}


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The environment in which a sweep's agent starts a trial, and the trial's parameters."""
    import wandb

    parameters = {"nested.p": 2.5, "sparsity": 0.98}
    file = tmp_path / "agent" / "config-trial0.yaml"
    file.parent.mkdir()
    file.write_text(yaml.safe_dump({"wandb_version": 1} | {key: {"value": v} for key, v in parameters.items()}))
    for name, value in {
        "WANDB_SWEEP_ID": "sweep0",
        "WANDB_RUN_ID": "trial0",
        "WANDB_PROJECT": "of-the-sweep",
        "WANDB_SWEEP_PARAM_PATH": str(file),
        "WANDB_DIR": str(file.parent),
    }.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # W&B reads the environment once
    yield parameters
    wandb.teardown()


def test_an_agents_trial_belongs_to_its_sweep(tmp_path: Path, agent: dict[str, Any]) -> None:
    directory = tmp_path / "run"
    for last in (2, 3):  # the second goes on from epoch 2
        tracker = start(directory, history=[record(epoch) for epoch in range(1, last)])
        tracker.log(record(last), 10 * last)
        tracker.finish()

    about = read_about(directory)
    assert (about.run_id, about.sweep_id, about.project) == ("trial0", "sweep0", "of-the-sweep")
    assert about.run_group == "an-experiment"
    # Bayesian search reads a parameter under its own name; the workspace reads the section
    assert read_config(directory) == {"seed": 0, "nested": {"p": 3}} | agent
    assert [entry["step"] for entry in logged(directory)] == [10, 20, 30]
    assert not list((tmp_path / "agent").glob("wandb/offline-run-*")), "W&B's files belong into the run directory"


def test_going_on_without_the_agent_leaves_one_run_to_send(tmp_path: Path) -> None:
    for run_id in ("trial0", "run0"):
        start(tmp_path, run_id=run_id, history=[record(1)]).finish()
    assert [path.name.rpartition("-")[2] for path in tmp_path.glob("wandb/offline-run-*")] == ["run0"]


def test_a_trial_that_is_finished_already_gets_its_figures(tmp_path: Path, agent: dict[str, Any]) -> None:
    run = RunDirectory(tmp_path / "run", "run0", "hash", False, RESULT)
    run.path.mkdir()
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(record(epoch)) + "\n" for epoch in (1, 2)))
    mirror_finished(prepare(compose("logger=wandb_offline", "experiment_name=a-group")), run)

    about = read_about(run.path)
    assert (about.run_id, about.sweep_id, about.run_group) == ("trial0", "sweep0", "a-group")
    assert [entry["val/top1"] for entry in logged(run.path)] == [0.1, 0.2]
    assert read_summary(run.path)["final_top1"] == 0.5


def test_the_configuration_that_wandb_gets_is_json(tmp_path: Path) -> None:
    cfg = prepare(compose("method=gmp", "experiment_name=a-group"))
    shown = labels(cfg, RunDirectory(tmp_path, "run0", "hash", True, None))
    content = json.loads(json.dumps(shown["config"], allow_nan=False))
    assert (content["method"]["p"], content["method"]["theta"], content["sparsity"]) == ("inf", 0, 0.9)
    assert (shown["group"], shown["job_type"], shown["name"]) == ("a-group", "gmp", tmp_path.name)


def test_a_finished_run_is_left_alone_without_an_agent(tmp_path: Path) -> None:
    mirror_finished(prepare(compose("logger=wandb_offline")), RunDirectory(tmp_path, "run0", "hash", False, RESULT))
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize(
    ("machine", "chosen", "found"),
    [
        ("the installed version's", None, True),
        ("api.wandb.ai", None, True),
        ("elsewhere.example", None, False),
        ("own.example", "https://own.example", True),
        ("api.wandb.ai", "https://own.example", False),
    ],
)
def test_a_login_counts_for_the_server_it_is_for(
    machine: str, chosen: str | None, found: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import wandb

    if machine == "the installed version's":
        machine = urlsplit(wandb.Settings().base_url).netloc
    (tmp_path / "netrc").write_text(f"machine {machine} login user password {'0' * 40}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if chosen is not None:
        monkeypatch.setenv("WANDB_BASE_URL", chosen)
    assert logged_in() is found


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
