"""Every file of conf/sweep is a W&B sweep whose trials are valid commands, and a trial's run belongs to its sweep."""

import itertools
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.errors import HydraException

import feather
from engine.cli import sentence
from engine.config import prepare, run_directory
from tests.engine.wandb_reader import read_about, read_config, read_history, read_summary
from tests.train_helpers import CONF, TRAIN, command, compose, read_json, read_metrics

SWEEPS = sorted(path.stem for path in (CONF / "sweep").glob("*"))

# What W&B's own schema (wandb/sweeps, config/schema.json) allows, as far as these files need it.
TOP_LEVEL = {
    "description", "program", "entity", "project", "method", "command", "name", "run_cap", "metric", "early_terminate",
    "parameters",
}  # fmt: skip
RANGES = {"uniform", "log_uniform_values", "int_uniform"}


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / "sweep" / f"{name}.yaml").read_text())


def choices(parameter: dict[str, Any]) -> list[Any]:
    """All values of a parameter, or the ends of its range."""
    return parameter["values"] if "values" in parameter else [parameter["min"], parameter["max"]]


def trials(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """Every combination of values and ends of ranges; seeds take turns."""
    columns = {name: choices(parameter) for name, parameter in sweep["parameters"].items()}
    seeds = itertools.cycle(columns.pop("seed", [None]))
    combined = [dict(zip(columns, values, strict=True)) for values in itertools.product(*columns.values())]
    return [trial | ({} if seed is None else {"seed": seed}) for trial, seed in zip(combined, seeds, strict=False)]


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Lets W&B's own agent make a trial's command line and environment, without starting it."""
    from wandb import wandb_agent

    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # the agent sets them in its own process
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep0")

    def start(sweep: dict[str, Any], trial: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
        started = []
        monkeypatch.setattr(wandb_agent, "AgentProcess", lambda **how: started.append(how) or _Process())
        runner = wandb_agent.Agent(api=None, queue=None, sweep_id="sweep0")
        runner._sweep_command = list(sweep["command"])
        arguments = {name: {"value": value} for name, value in trial.items()}
        runner._command_run({"program": sweep["program"], "args": arguments, "run_id": "trial0"})
        (how,) = started
        return how["command"], how["env"]

    class _Process:
        pass

    return start


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_file_is_what_wandb_takes(name: str) -> None:
    sweep = load(name)
    assert sweep.keys() <= TOP_LEVEL
    assert sweep.keys() >= {"program", "method", "metric", "parameters", "command", "project"}
    assert sweep["name"] == name
    assert sweep["program"] == TRAIN.name
    assert sweep["method"] in ("grid", "bayes")
    assert sweep["metric"] == {"name": "val/top1", "goal": "maximize"}
    for key, parameter in sweep["parameters"].items():
        if "values" in parameter:
            assert parameter.keys() == {"values"}
            assert parameter["values"]
        else:
            assert sweep["method"] != "grid", "a grid needs values"
            assert parameter.keys() == {"distribution", "min", "max"}
            assert parameter["distribution"] in RANGES
            for end in (parameter["min"], parameter["max"]):
                assert isinstance(end, int | float), f"{key}: YAML reads {end!r} as a word, write 1.0e-5 for 1e-5"
            assert parameter["min"] < parameter["max"]
            assert parameter["min"] > 0 or parameter["distribution"] == "uniform"
    early = sweep.get("early_terminate")
    if early is not None:
        assert early.keys() == {"type", "max_iter", "s", "eta"}
        assert (early["type"], early["s"]) == ("hyperband", 1)
        assert early["eta"] > 1


@pytest.mark.parametrize("name", SWEEPS)
def test_parameters_do_not_take_the_place_of_a_section(name: str) -> None:
    # W&B writes a trial's parameters over the run's configuration: `method: gmp` would erase method.name, .p and .theta
    composed = compose()
    for key in load(name)["parameters"]:
        assert not hasattr(composed.get(key), "keys"), f"{key} is a section of the configuration"


@pytest.mark.parametrize("name", SWEEPS)
def test_every_trial_is_a_valid_run_of_its_own(name: str, agent: Any) -> None:
    sweep = load(name)
    directories = set()
    for trial in trials(sweep):
        (program, interpreter, script, *overrides), _ = agent(sweep, trial)
        assert (Path(program).name, interpreter, script) == ("env", "python", "train.py")
        cfg = prepare(compose(*overrides))
        assert cfg.experiment_name == name
        for key, value in trial.items():
            node: Any = cfg
            for part in key.split("."):
                node = getattr(node, part)
            assert node == value
        directories.add(run_directory(cfg))
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3))
        feather.create(  # refuses a p or theta that does not go with the method
            cfg.method.name, model, torch.optim.SGD(model.parameters(), lr=cfg.optimizer.lr), sparsity=cfg.sparsity,
            total_steps=10, p=cfg.method.p, theta=cfg.method.theta, framework=cfg.framework.name,
        )  # fmt: skip
        early = sweep.get("early_terminate")
        if early is not None:  # it judges runs that are at their sparsity, and none after its last epoch
            judged = early["max_iter"] / early["eta"]
            assert cfg.sparsity_schedule.end_fraction * cfg.trainer.epochs <= judged < cfg.trainer.epochs
        if sweep["method"] == "bayes":
            assert cfg.dataset.validation > 0, "a search that looks at the test set"
    assert len(directories) == len(trials(sweep))


@pytest.mark.parametrize("override", [f"sweep={SWEEPS[0]}", f"+sweep={SWEEPS[0]}"])
def test_a_sweep_file_as_a_choice_of_train_is_refused(override: str) -> None:
    with pytest.raises(HydraException) as caught:
        compose(override)
    assert re.search("sweep.*(is not an option|not in 'Config')", sentence(caught.value))


def test_a_trial_runs_and_belongs_to_its_sweep(agent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    sweep = load("grid_sparsity")
    small = ["dataset=digits", "model.options.width=4", "debug=few_steps", "trainer.device=cpu", "logger=wandb_offline"]
    sweep["command"] = [part for part in sweep["command"] if part != "dataset=cifar100"]
    sweep["command"][-1:-1] = small
    trial = {"method.name": "gmp", "sparsity": 0.95, "seed": 2}
    (_, _, _, *overrides), environment = agent(sweep, trial)
    given = {key: value for key, value in environment.items() if os.environ.get(key) != value or "WANDB" in key}

    # the second finds the run finished and still reports to the sweep
    for run_id in ("trial0", "trial1"):
        ended = command(*overrides, cwd=tmp_path, env=given | {"WANDB_RUN_ID": run_id})
        assert ended.status == 0, ended.err
        (run,) = (tmp_path / "runs" / "grid_sparsity").iterdir()
        about, result = read_about(run), read_json(run / "result.json")
        assert (about.run_id, about.sweep_id, about.run_group) == (run_id, "sweep0", "grid_sparsity")
        shown = read_config(run)
        assert (shown["method"]["name"], shown["sparsity"], shown["seed"]) == ("gmp", 0.95, 2)
        assert {key: shown[key] for key in trial} == trial
        steps = [entry["step"] for entry in read_history(run) if "step" in entry]
        assert steps == [record["step"] for record in read_metrics(run)]
        assert read_summary(run)["final_top1"] == result["final_top1"]
    assert (result["method"], result["seed"], result["target_sparsity"]) == ("gmp", 2, 0.95)
