"""The comparison workspace shows what train.py logs, under the names that it has in W&B."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.charts import CURVE_CHART, LAYER_NONZEROS, LAYER_SPARSITY, table_key
from scripts.wandb_workspace import main
from tests.engine.wandb_reader import read_about, read_config, read_history, read_summary, read_tables
from tests.train_helpers import directory, start

workspaces = pytest.importorskip("wandb_workspaces.workspaces", reason="wandb-workspaces is not installed")


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["team/feather", "--dry-run", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def panels(view: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for section in view["spec"]["section"]["panelBankConfig"]["sections"]:
        yield from section["panels"]


def runset(view: dict[str, Any]) -> dict[str, Any]:
    (found,) = view["spec"]["section"]["runSets"]
    return found


def named(node: Any, *keys: str) -> Iterator[str]:
    """Every text that stands under one of ``keys``, anywhere in ``node``."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in keys:
                yield from [value] if isinstance(value, str) else [v for v in value if isinstance(v, str)]
            yield from named(value, *keys)
    elif isinstance(node, list):
        for item in node:
            yield from named(item, *keys)


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The offline W&B run of a real train.py, two epochs of four steps."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("workspace")
    patch.chdir(folder)
    try:
        start("logger=wandb_offline", "experiment_name=an-experiment")
    finally:
        patch.undo()
    return folder / directory("experiment_name=an-experiment")


def test_every_name_in_the_workspace_is_one_that_a_run_logs(logged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    view = dry_run(capsys)
    history = {key for entry in read_history(logged) for key in entry}
    summary, config = set(read_summary(logged)), read_config(logged)

    names = set(named(view, "metrics", "xAxis", "yAxis", "zAxis", "groupBy"))
    names |= set(runset(view)["runFeed"]["columnOrder"])
    names |= {f"{key['section']}:{key['name']}" for key in runset(view)["grouping"]}
    names |= {f"{key['key']['section']}:{key['key']['name']}" for key in runset(view)["sort"]["keys"]}
    assert len(names) > 15
    for name in names - {"run:displayName", "_step"}:
        section, _, rest = name.replace("summary_metrics.", "summary:").partition(":")
        if section == "summary":
            assert rest in summary, name
        elif section == "config" or ".value" in name:  # W&B puts .value behind the first part of a configuration's key
            node: Any = config
            first, _, deeper = (rest or name).partition(".value")
            for part in [first, *filter(None, deeper.split("."))]:
                node = node[part]
        else:
            assert name in history, name
    for pattern in named(view, "metricRegex"):
        assert any(re.fullmatch(pattern, key) for key in history), pattern


def test_the_charts_of_layers_read_tables_that_a_run_logs(logged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    charts = [panel["config"] for panel in panels(dry_run(capsys)) if panel["viewType"] == "Vega2"]
    tables = read_tables(logged)
    assert set(tables) == {table_key(chart) for chart in (LAYER_SPARSITY, LAYER_NONZEROS, CURVE_CHART)}
    shown = {}
    for chart in charts:
        (query,) = chart["userQuery"]["queryFields"]
        (table,) = [field["args"][0]["value"] for field in query["fields"] if field["name"] == "summaryTable"]
        shown[table] = chart["fieldSettings"]["value"]
        assert chart["panelDefId"] == "wandb/bar/v0"
        assert set(chart["fieldSettings"].values()) <= set(tables[table][0])
    assert shown == {table_key(LAYER_SPARSITY): "sparsity", table_key(LAYER_NONZEROS): "nonzeros"}
    assert len(tables[table_key(LAYER_SPARSITY)]) == 21


def test_accuracy_stands_against_sparsity_and_flops(capsys: pytest.CaptureFixture[str]) -> None:
    scatter = [panel["config"] for panel in panels(dry_run(capsys)) if panel["viewType"] == "Scatter Plot"]
    assert {chart["xAxis"] for chart in scatter} >= {"summary:achieved_sparsity", "summary:flops"}
    assert {chart["yAxis"] for chart in scatter} == {"summary:final_top1"}


def test_runs_are_grouped_by_method_and_sparsity_and_filtered_by_experiment(
    logged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, chosen = dry_run(capsys), dry_run(capsys, "--experiment", "an-experiment", "another")
    assert (whole["entity"], whole["project"]) == ("team", "feather")
    assert [key["name"] for key in runset(whole)["grouping"]] == ["method.value.name", "sparsity.value"]
    assert runset(whole)["filters"]["filters"] == []
    (condition,) = runset(chosen)["filters"]["filters"]
    assert condition["key"] == {"section": "run", "name": "group"}
    assert (condition["op"], condition["value"]) == ("IN", ["an-experiment", "another"])
    assert read_about(logged).run_group == "an-experiment"


def test_without_a_login_nothing_is_sent_and_one_sentence_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspaces.Workspace, "save", lambda _: pytest.fail("was sent"))
    assert main(["team/feather"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert re.fullmatch(r"Nobody is logged in to W&B: run `wandb login` .*\n", told.err)


@pytest.mark.parametrize("project", ["feather", "team/", "/feather", "team/feather/runs"])
def test_what_is_no_project_is_refused(project: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([project, "--dry-run"]) == 2
    assert "write ENTITY/PROJECT" in capsys.readouterr().err


def test_what_the_server_says_is_told_in_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)

    def refuse(_: Any) -> None:
        raise ValueError("project not found\nand much more")

    monkeypatch.setattr(workspaces.Workspace, "save", refuse)
    assert main(["team/feather"]) == 1
    assert capsys.readouterr().err == "W&B does not save the workspace of team/feather: project not found\n"
