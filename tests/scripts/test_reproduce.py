"""reproduce.py plans experiments, skips what is finished, runs the rest side by side and goes on after a failure."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from engine.config import ConfigError
from engine.estimate import Estimate, known_results, makespan
from engine.plan import experiments, plan
from scripts import reproduce
from tests.train_helpers import ROOT, read_json

HARDWARE = {"gpu": None, "cpu": "x", "threads": 1}
TINY = ["model.options.width=4", "debug=few_steps", "trainer.max_steps=2", "trainer.device=cpu", "logger=none"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def finish(job, **entries):
    job.directory.mkdir(parents=True, exist_ok=True)
    (job.directory / "config.yaml").write_text(yaml.safe_dump(asdict(job.config)))
    (job.directory / "result.json").write_text(json.dumps(entries))


class Fake:
    """A run that ends at the first look."""

    def __init__(self, job, status=0, last_line=""):
        self.job, self.place, self.log, self.status, self.last_line = job, "", Path("log"), status, last_line
        if status == 0:
            finish(job)

    def poll(self):
        return self.status

    def stop(self): ...

    def kill(self): ...

    def evaluated(self):
        return False


# ---- the plan ------------------------------------------------------------------------------------------------------


def test_the_grid_is_every_combination_and_the_command_line_replaces_the_files_values():
    jobs = plan(["cifar100_table"], ["seed=0,1", "sparsity=0.98", "method=feather,ste", "framework=global"])
    found = {(job.config.model.name, job.config.sparsity, job.config.seed, job.config.method.name) for job in jobs}
    networks = ("resnet20", "mobilenet_v1", "densenet40_24")
    assert found == {(name, 0.98, seed, m) for name in networks for seed in (0, 1) for m in ("feather", "ste")}
    assert len(jobs) == 12
    assert all(job.config.trainer.epochs == 160 for job in jobs)
    assert {job.config.seed for job in plan(["sensitivity"], ["sparsity=0.9"])} == {0, 1, 2}


def test_the_most_telling_runs_come_first():
    jobs = plan(["cifar100_table"], ["seed=0,1", "model=resnet20,mobilenet_v1"])
    order = [(job.config.model.name, job.config.sparsity, job.config.seed) for job in jobs]
    rows = [
        (net, s, seed) for net in ("resnet20", "mobilenet_v1") for s in (0.98, 0.99, 0, 0.95, 0.9) for seed in (0, 1)
    ]
    assert list(dict.fromkeys(order)) == rows
    first = [(job.config.method.name, job.config.framework.name) for job in jobs[:8]]
    assert first == [
        *((m, "auto") for m in ("feather", "ste", "soft_ste", "gmp", "st3", "spartan", "rigl")),
        ("feather", "asl_plus"),
    ]


def test_a_dense_run_asked_for_through_two_methods_is_one_run():
    jobs = plan(["quickstart"], ["sparsity=0,0.9", "method=feather,ste"])
    assert len(jobs) == 3


def test_parts_keep_to_their_own_choices():
    only_linear = plan(["schedule"], ["sparsity_schedule=linear", "seed=0", "sparsity=0.9"])
    assert {job.config.sparsity_schedule.name for job in only_linear} == {"linear"}
    ends_at = plan(["schedule"], ["sparsity_schedule.end_fraction=0.3", "seed=0", "sparsity=0.9"])
    found = {(job.config.sparsity_schedule.name, job.config.sparsity_schedule.end_fraction) for job in ends_at}
    assert found == {("cubic", 0.3), ("linear", 0.3), ("one_shot", 0.0), ("one_shot", 0.25), ("one_shot", 0.5)}
    tables = plan(["cifar100_table"], ["method=rigl,gmp", "seed=0", "sparsity=0.99", "model=resnet20"])
    assert [job.config.method.name for job in tables] == ["rigl", "gmp"]  # no Feather with ASL+


def test_several_names_are_one_plan_without_repetition():
    few = ["seed=0", "sparsity=0.9", "sparsity_schedule=cubic"]
    assert len(plan(["schedule", "sensitivity", "schedule"], few)) == 4 + 12


def test_a_proxy_is_the_same_experiment_on_the_small_network_under_a_name_of_its_own():
    arguments = ["scale=proxy", "seed=0", "sparsity=0.98", "method=feather,ste"]
    jobs = plan(["cifar100_table"], arguments)
    assert {job.config.model.name for job in jobs} == {"resnet20"}
    assert {job.directory.parts[1] for job in jobs} == {"cifar100_table_proxy"}
    assert all(job.config.trainer.epochs < 160 and "scale=proxy" in job.overrides for job in jobs)


# ---- running ------------------------------------------------------------------------------------------------------


def test_finished_runs_are_skipped_and_failed_ones_listed_without_stopping_the_others(monkeypatch, capsys):
    jobs = plan(["quickstart"])
    finish(jobs[0])
    started = []

    def start(job, *_, **__):
        started.append(job.config.sparsity)
        return Fake(job, *((1, "the data are gone") if job.config.sparsity == 0.95 else ()))

    monkeypatch.setattr(reproduce, "LocalRun", start)
    assert reproduce.main(["quickstart"]) == 1
    assert started == [0.9, 0.95, 0.98, 0.99, 0.995]
    out = capsys.readouterr()
    assert "sparsity=0.95: the data are gone" in out.err
    assert "5 of 6 runs are finished" in out.out


def test_overwrite_runs_finished_ones_anew(monkeypatch):
    started = []
    monkeypatch.setattr(reproduce, "LocalRun", lambda job, *_, **__: (started.append(job), Fake(job))[1])
    for _ in range(2):
        assert reproduce.main(["quickstart", "sparsity=0.9"]) == 0
    assert len(started) == 1
    assert reproduce.main(["quickstart", "sparsity=0.9", "overwrite=true"]) == 0
    assert len(started) == 2


def test_an_interrupted_run_ends_the_whole_with_its_status(monkeypatch):
    calls = []
    monkeypatch.setattr(reproduce, "LocalRun", lambda job, *_, **__: (calls.append(job), Fake(job, 75))[1])
    assert reproduce.main(["quickstart", "--jobs", "1"]) == 75
    assert len(calls) == 1


def test_the_time_limit_is_of_the_whole_command_and_not_of_its_runs(monkeypatch, capsys):
    started = []

    class Endless(Fake):
        def __init__(self, job):
            super().__init__(job, status=None)
            started.append(job)

        def stop(self):
            self.status = 75

    monkeypatch.setattr(reproduce, "LocalRun", lambda job, *_, **__: Endless(job))
    began = time.monotonic()
    arguments = ["quickstart", "time_limit_minutes=0.02", "--jobs", "2", "trainer.device=cpu"]
    assert reproduce.main(arguments) == 75
    assert time.monotonic() - began < 60
    assert len(started) < 6
    assert not any("time_limit" in override for job in started for override in job.overrides)
    assert "the time limit is reached; the same command goes on" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_stops_every_run_cleanly_and_the_same_command_would_go_on(number, tmp_path):
    """Real processes: two at once, stopped in mid-training; then one of them resumes."""
    arguments = [
        "quickstart", *TINY, "trainer.max_steps=100000", "trainer.epochs=10000", "trainer.log_every=1",
        "trainer.checkpoint_every=10000", "sparsity=0.5,0.6,0.7", "--jobs", "2",
    ]  # fmt: skip
    script = [sys.executable, str(ROOT / "scripts" / "reproduce.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*script, *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    deadline = time.monotonic() + 240

    def training():
        return [log for log in tmp_path.glob("runs/quickstart/*/metrics.jsonl") if log.stat().st_size]

    while len(training()) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert out.count("] stopped ") == 2
    assert out.count("] started ") == 2
    assert f"{number.name} was received; the same command goes on from here" in out
    stopped = list(tmp_path.glob("runs/quickstart/*/checkpoint_*.pt"))
    assert len({path.parent for path in stopped}) == 2
    if number == signal.SIGINT:  # in the long test
        again = [argument for argument in arguments if not argument.startswith("--")][:-1]
        ended = subprocess.run(
            [*script, *again, "sparsity=0.5", "time_limit_minutes=0.001"], cwd=tmp_path, capture_output=True, text=True,
            env=environment, timeout=120,
        )  # fmt: skip
        assert ended.returncode == 75
        assert "1 unfinished" in ended.stdout


def test_runs_side_by_side_are_real_runs_whose_output_is_kept(tmp_path, capsys):
    assert reproduce.main(["quickstart", *TINY, "sparsity=0.5", "model.options.width=4,-1", "--jobs", "2"]) == 1
    told = capsys.readouterr()
    (failed,) = [line for line in told.err.splitlines() if line.startswith("failed: ")]
    assert "model.options.width=-1" in failed
    assert "Traceback" not in told.out
    (result,) = tmp_path.glob("runs/quickstart/*/result.json")
    content = read_json(result)
    assert content["target_sparsity"] == 0.5
    assert content["hardware"]["threads"] == 1
    logs = {log.stem: log.read_text() for log in tmp_path.glob("runs/quickstart/.logs/*.txt")}
    assert len(logs) == 2
    assert "top-1" in logs[result.parent.name]


# ---- how long ------------------------------------------------------------------------------------------------------


def test_dry_run_starts_nothing_and_estimates_from_runs_of_the_same_kind(monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "LocalRun", lambda *_, **__: pytest.fail("started"))
    monkeypatch.setattr(reproduce, "environment", lambda: {"hardware": HARDWARE})
    jobs = plan(["quickstart"])
    finish(jobs[0], hardware=HARDWARE, wall_seconds=6000.0, epochs=10)
    epochs = jobs[0].config.trainer.epochs
    assert reproduce.main(["quickstart", "--dry-run"]) == 0
    assert f"about {10 * epochs / 60:.1f} h" in capsys.readouterr().out


def test_an_estimate_goes_by_the_most_similar_runs_on_this_hardware():
    jobs = plan(["quickstart"], ["sparsity=0.9,0.98", "seed=0,1"])

    def estimate(threads=None):
        return Estimate(known_results(), HARDWARE, threads).seconds(jobs[-1])

    finish(jobs[0], hardware={**HARDWARE, "cpu": "another"}, wall_seconds=1.0, epochs=10)
    # the evidence in results/ may know this network, but not this machine
    assert estimate() is None
    finish(jobs[0], hardware={**HARDWARE, "cpu_instructions": "AVX512 with bf16"}, wall_seconds=1.0, epochs=10)
    assert estimate() is None  # a processor of the same name, but of another generation
    finish(jobs[1], hardware=HARDWARE, wall_seconds=100.0, epochs=10)
    finish(jobs[2], hardware={**HARDWARE, "threads": 2}, wall_seconds=60.0, epochs=10)
    epochs = jobs[0].config.trainer.epochs
    assert estimate(threads=1) == 10 * epochs
    assert estimate(threads=2) == 6 * epochs
    assert estimate() == 8 * epochs
    (wider,) = plan(["quickstart"], ["sparsity=0.9", "model.options.width=128"])
    assert Estimate(known_results(), HARDWARE).seconds(wider) is None
    jobs[-1].directory.mkdir(parents=True)
    (jobs[-1].directory / "checkpoint_00000001.pt").touch()
    (jobs[-1].directory / "metrics.jsonl").write_text('{"epoch": 4}\n{"epoch": 5.0}\n')
    assert estimate(threads=1) == 10 * (epochs - 5)


def test_runs_side_by_side_share_the_time():
    assert makespan([3, 3, 2, 2], 1) == 10
    assert makespan([3, 3, 2, 2], 2) == 5
    assert makespan([5, 1, 1, 1], 2) == 5
    assert makespan([], 2) == 0


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nope"], "choose one of"),
        (["quickstart", "nope"], "choose one of"),
        (["seed=3"], "No experiment is named"),
        (["quickstart", "sparsity=1.5"], "out of range"),
        (["quickstart", "method=fether"], "choose one of"),
        (["quickstart", "method=rigl", "framework=global", "sparsity=0.9"], "which uses erk or uniform"),
        (["quickstart", "method.p=0.9"], "method.p=0.9 is out of range"),
        (["quickstart", "method.theta=1.01"], "method.theta=1.01 is out of range"),
        (["quickstart", "method=gmp", "method.theta=1", "sparsity=0.9"], "does not go with method='gmp'"),
        (["quickstart", "sparsity_schedule=one_shot", "sparsity_schedule.end_fraction=0.4"], "does not go with"),
        (["quickstart", "modifier=hamm"], "modifier=hamm is out of range"),
        (["quickstart", "trainer.epoch=3"], "did you mean trainer.epochs"),
        (["quickstart", "seed=range(0,0)"], "has no runs: give seed at least one value"),
        (["quickstart", "run_dir=here"], "run_dir= names one directory"),
        (["quickstart", "time_limit_minutes=0"], "time_limit_minutes=0"),
        (["quickstart", "--jobs=0"], "at least 1"),
        (["quickstart", "scale=proxy"], "add dataset=cifar100"),
        (["imagenet_resnet50", "scale=proxy"], "add dataset=cifar100"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_runs(arguments, says, capsys, tmp_path):
    assert reproduce.main(arguments) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert says in told.err
    assert told.out == ""
    assert not list(tmp_path.iterdir())


def test_the_experiments_of_the_paper_have_names():
    wanted = {
        "cifar100_table", "imagenet_table", "ablation_operator", "ablation_theta", "sensitivity", "mask_stability",
        "schedule", "first_three",
    }  # fmt: skip
    assert wanted <= set(experiments())
    with pytest.raises(ConfigError, match="first_three"):
        plan(["first_p3"])
