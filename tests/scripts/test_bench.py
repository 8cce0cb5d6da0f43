"""scripts/bench.py: what counts as reached or as a regression, and the page; no test here depends on time."""

import dataclasses
import json

import pytest
import torch
import yaml

from engine.benchmarks import accuracy, base, memory, overhead, selection
from engine.data.small import RECIPES
from scripts import bench
from tests.train_helpers import start


def row(ratio, better="lower", target=None, name="x", **more):
    return {"name": name, "ratio": ratio, "better": better, "target": target, **more}


def test_targets_are_reached_from_the_right_side():
    assert base.reaches(row(1.03, target=1.03))
    assert not base.reaches(row(1.04, target=1.03))
    assert base.reaches(row(36.0, "higher", 35.0))
    assert not base.reaches(row(34.0, "higher", 35.0))
    assert base.reaches(row(1.0)) is None


@pytest.mark.parametrize(
    ("found", "committed", "worse"),
    [
        (row(1.05, slack=0.03), row(1.03), False),
        (row(1.07, slack=0.03), row(1.03), True),
        (row(30.0, "higher"), row(40.0, "higher"), False),
        (row(20.0, "higher"), row(40.0, "higher"), True),
        (row(99.0, "higher"), row(40.0, "higher"), False),
    ],
)
def test_a_regression_is_a_ratio_that_is_worse_by_more_than_noise(found, committed, worse):
    assert base.is_worse(found, committed) == worse


def test_pairs_alternate_and_the_first_one_warms_up():
    calls = []
    found = base.pairs(lambda: calls.append("a"), lambda: calls.append("b"), 3)
    assert len(found) == 3
    assert calls == ["b", "a", "a", "b", "b", "a", "a", "b"]


def test_check_names_each_regression_and_writes_nothing(tmp_path, monkeypatch, capsys):
    content = {"rows": [row(1.02, name="overhead, net", slack=0.03), row(40.0, "higher", name="selection")]}
    (tmp_path / "overhead.json").write_text(json.dumps(content))
    rows = [row(1.2, name="overhead, net", slack=0.03), row(39.0, "higher", name="selection"), row(9.0, name="new")]
    monkeypatch.setattr(bench, "measure", lambda part, options: rows)
    assert bench.main(["overhead", "--check", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "overhead, net: ratio 1.2, where overhead.json has 1.02.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["overhead.json"]
    rows[0]["ratio"] = 1.01
    assert bench.main(["overhead", "--check", "--out", str(tmp_path)]) == 0


def test_measurements_are_written_with_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda part, options: [row(1.01, target=1.03, name="overhead, net")])
    assert bench.main(["overhead", "--device", "cpu", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "overhead.json").read_text())
    assert {"versions", "hardware", "git_commit", "command", "clock", "rows"} <= set(content)
    page = (tmp_path / "README.md").read_text()
    assert "| overhead, net | 1.01 | <= 1.03 | yes |" in page
    assert "| selection | not measured |" in page


def test_the_committed_table_shows_the_committed_measurements():
    assert (bench.OUT / "README.md").read_text() == bench.table(bench.OUT)


def test_selection_rows_compare_equal_bits(monkeypatch):
    monkeypatch.setattr(selection, "SIZES", {"small": (1000, 35.0)})
    rows = selection.measure(True, torch.device("cpu"))
    assert [r["bit_equal"] for r in rows] == [True] * 3


@pytest.fixture
def sparsities(monkeypatch):
    """After each step of a small network that stands in for those that are measured."""
    for part in (overhead, memory):
        monkeypatch.setattr(part, "BATCH_SIZE", 2)
    monkeypatch.setattr(overhead, "create_model", lambda *a, **k: torch.nn.Sequential(
        torch.nn.Conv2d(3, 100, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()))  # fmt: skip
    seen = []
    real = overhead.Contender.step

    def step(self, *batch):
        seconds = real(self, *batch)
        seen.append(self.sparsifier.sparsity)
        return seconds

    monkeypatch.setattr(overhead.Contender, "step", step)
    return seen


def test_overhead_goes_through_the_whole_schedule(sparsities):
    _, found = overhead.measure(True, torch.device("cpu"))
    assert len(found["ratio_by_stage"]) == overhead.STAGES
    assert 0 < min(s for s in sparsities if s) < 0.7
    assert max(sparsities) == 0.98


def test_peak_memory_is_that_of_both_trainings_and_one_copy(monkeypatch):
    taken = {0.0: (1000, 100), memory.SPARSITY: (1210, 100)}
    monkeypatch.setattr(memory, "_alone", lambda name, sparsity, device: taken[sparsity])
    (found,) = memory.measure(True, torch.device("cpu"))
    assert found["ratio"] == pytest.approx(1.1)
    assert not base.reaches(found)


def test_a_peak_is_of_a_training_through_ramp_and_target(sparsities):
    taken, weights = memory.peak("resnet20", memory.SPARSITY, "cpu")
    assert weights == 4 * 3 * 100 * 9
    images = 4 * 2 * 3 * 32 * 32
    outputs = 4 * 2 * 100 * 30 * 30
    assert taken > images + outputs + 4 * weights, "sparse and dense weights, gradients and momentum"
    assert 0 < sparsities[0] < sparsities[1] < sparsities[2] == memory.SPARSITY


def test_the_plain_loop_trains_what_train_py_trains(tmp_path, monkeypatch):
    """Whole data set in a batch, no crops: no random number is left but the initial weights, so both must agree."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES, "digits", dataclasses.replace(RECIPES["digits"], padding=0))
    options = ("trainer.batch_size=1438", "trainer.epochs=6", "sparsity=0.9", "seed=5", "run_dir=run")
    ours = start(*options)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    found = accuracy.plainly(config, torch.device("cpu"), tmp_path)
    assert found == pytest.approx(ours, abs=0.3)  # one image of 359
    config["sparsity"] = 0.99
    assert accuracy.plainly(config, torch.device("cpu"), tmp_path) < ours - 2  # another experiment is told apart


def test_accuracy_is_paired_by_seed(tmp_path, monkeypatch, capsys):
    ours = {"seed=0": 50.0, "seed=1": 52.0, "seed=2": 54.0}
    monkeypatch.setattr(accuracy, "_as_train_does", lambda options, device: ({"seed": options[-2]}, ours[options[-2]]))
    monkeypatch.setattr(accuracy, "plainly", lambda config, device, data: ours[config["seed"]] + 1)
    monkeypatch.setattr(accuracy, "EXPERIMENTS", {"digits": ["dataset=digits"]})
    monkeypatch.setattr(accuracy, "SEEDS", {"digits": (0, 1, 2)})
    (found,) = accuracy.measure(True, torch.device("cpu"), tmp_path)
    assert (found["top1"], found["plain_top1"]) == ([50, 52, 54], [51, 53, 55])
    assert found["difference"] == -1
    assert found["interval_95"] == (-1, -1)
    assert found["ratio"] == pytest.approx(52 / 53)
    assert "digits, seed 1: 52.00 %, plain loop 53.00 %" in capsys.readouterr().out


def test_a_run_that_fails_ends_the_measurement_with_its_reason(tmp_path):
    with pytest.raises(RuntimeError, match=r"dataset=nothing.* failed: .*nothing"):
        accuracy._row("x", ["dataset=nothing"], (0,), torch.device("cpu"), tmp_path)


def test_unknown_parts_and_clocks_are_refused(capsys):
    for arguments, told in ((["speed"], "unknown part speed"), (["--clock", "cpu", "--device", "cuda"], "--clock cpu")):
        with pytest.raises(SystemExit) as stop:
            bench.main(arguments)
        assert stop.value.code == 2
        assert told in capsys.readouterr().err
