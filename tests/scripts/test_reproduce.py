"""reproduce.py plans an experiment, skips what is finished, and goes on after a failure."""

import json

import pytest

from scripts import reproduce


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def finish(job, **entries):
    job.directory.mkdir(parents=True, exist_ok=True)
    (job.directory / "result.json").write_text(json.dumps(entries))


def test_the_grid_is_every_combination_and_the_command_line_replaces_the_files_values():
    jobs = reproduce.plan("cifar100_table", ["seed=0,1", "sparsity=0.98"])
    found = {(job.config.model.name, job.config.sparsity, job.config.seed) for job in jobs}
    networks = ("resnet20", "mobilenet_v1", "densenet40_24")
    assert found == {(name, 0.98, seed) for name in networks for seed in (0, 1)}
    assert len(jobs) == 6
    assert all(job.config.trainer.epochs == 160 for job in jobs)


def test_a_dense_run_asked_for_through_two_methods_is_one_run():
    jobs = reproduce.plan("quickstart", ["sparsity=0,0.9", "method=feather,ste"])
    assert len(jobs) == 3


def test_finished_runs_are_skipped_and_failed_ones_listed_without_stopping_the_others(monkeypatch, capsys):
    jobs = reproduce.plan("quickstart", [])
    finish(jobs[0])
    started = []

    def run(job):
        started.append(job.config.sparsity)
        if job.config.sparsity == 0.95:
            return 1, "the data are gone"
        finish(job)
        return 0, ""

    monkeypatch.setattr(reproduce, "run", run)
    assert reproduce.main(["quickstart"]) == 1
    assert started == [0.9, 0.95, 0.98, 0.99, 0.995]
    out = capsys.readouterr()
    assert "sparsity=0.95: the data are gone" in out.err
    assert "5 of 6 runs are finished" in out.out


def test_an_interrupted_run_ends_the_whole_with_its_status(monkeypatch):
    calls = []
    monkeypatch.setattr(reproduce, "run", lambda job: (calls.append(job), (75, ""))[1])
    assert reproduce.main(["quickstart"]) == 75
    assert len(calls) == 1


def test_dry_run_starts_nothing_and_estimates_from_runs_of_the_same_kind(monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "run", lambda job: pytest.fail("started"))
    jobs = reproduce.plan("quickstart", [])
    monkeypatch.setattr(reproduce, "environment", lambda: {"hardware": {"gpu": None, "cpu": "x"}})
    kind = {"model": "resnet20", "dataset": "digits", "batch_size": 64, "hardware": {"gpu": None, "cpu": "x"}}
    finish(jobs[0], **kind, wall_seconds=600.0, epochs=10)
    epochs = jobs[0].config.trainer.epochs
    assert reproduce.main(["quickstart", "--dry-run"]) == 0
    assert f"about {epochs:.1f} min" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nope"], "choose one of"),
        (["quickstart", "sparsity=1.5"], "out of range"),
        (["quickstart", "method=fether"], "choose one of"),
        (["quickstart", "trainer.epoch=3"], "did you mean trainer.epochs"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, says, capsys):
    assert reproduce.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert says in told
