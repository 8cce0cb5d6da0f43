"""Tables and figures from made-up runs: the numbers by hand, staleness, damage."""

import json
import re
import shutil
from pathlib import Path

import pytest

from engine import figures
from engine.results import ResultError, find_runs, group_cells, read_result, read_runs, row_names
from scripts import collect, report
from tests.scripts.synthetic_runs import write_run


def cells_of(root):
    runs, problems = read_runs(find_runs(root))
    cells, repeated = group_cells(runs)
    return cells, problems + repeated


@pytest.fixture
def tree(tmp_path):
    """An experiment of five runs: three seeds at 90 %, one at 98 %, one dense."""
    runs = tmp_path / "results" / "runs"
    for seed, top1 in enumerate([60.0, 61.0, 63.5]):
        write_run(runs, seed=seed, top1=top1)
    write_run(runs, sparsity=0.98, top1=50.0)
    write_run(runs, sparsity=0.0, top1=70.0, method="dense")
    return tmp_path


def run_report(tree, *arguments):
    return report.main([*arguments, "--runs", str(tree / "results" / "runs"), "--out", str(tree / "results")])


def test_mean_deviation_and_number_by_hand(tree):
    cells, problems = cells_of(tree)
    assert not problems
    dense, at90, at98 = cells
    # 60, 61, 63.5: mean 61.5, squared deviations 2.25 + 0.25 + 4 = 6.5, over n - 1 = 2: 3.25
    top1 = at90.statistic("final_top1")
    assert (top1.mean, top1.n) == (61.5, 3)
    assert top1.std == pytest.approx(3.25**0.5)
    assert at98.statistic("final_top1").std is None
    assert (dense.setting.method, dense.setting.p, dense.setting.theta) == ("dense", "", "")
    assert run_report(tree) == 0
    text = (tree / "results/tables/table.md").read_text()
    assert "| dense | 70.00 (1) | - | - |" in text
    assert "| feather | - | 61.50 ± 1.80 (3) | 50.00 (1) |" in text
    assert "62.00 ± 1.80 (3)" in text  # the best epoch beside the last
    assert "unknown" in text  # no CIFAR-100 figure of the paper could be read
    line = next(line for line in (tree / "results/tables/table.csv").read_text().splitlines() if ",0.9," in line)
    assert "0.9,3,61.5,1.80277563" in line


def test_links_lead_to_the_evidence(tree):
    run_report(tree)
    table = tree / "results/tables/table.md"
    links = [part.split(")")[0] for part in table.read_text().split("](")[1:]]
    assert len(links) == 5
    assert all((table.parent / link).is_file() and not Path(link).is_absolute() for link in links)


def test_output_is_the_same_twice_and_for_any_order(tree):
    run_report(tree)
    files = sorted(path for kind in ("tables", "figures") for path in (tree / "results" / kind).iterdir())
    assert [path.name for path in files] == [
        *("table_curve.png", "table_layers.png", "table_training.png"),
        *("table.csv", "table.md"),
    ]
    before = [path.read_bytes() for path in files]
    run_report(tree, "table")
    assert [path.read_bytes() for path in files] == before


def test_check_turns_stale_when_one_number_changes(tree, capsys):
    run_report(tree)
    assert run_report(tree, "--check") == 0
    changed = find_runs(tree)[0] / "result.json"
    result = json.loads(changed.read_text())
    changed.write_text(json.dumps(result | {"final_top1": result["final_top1"] + 0.01}))
    capsys.readouterr()
    assert run_report(tree, "--check") == 1
    told = capsys.readouterr().err
    assert "table.csv is stale" in told
    assert "table_curve.png is stale" in told
    assert "table_layers" not in told
    assert run_report(tree) == 0
    assert run_report(tree, "--check") == 0


def test_check_names_missing_and_left_over_files(tree, capsys):
    run_report(tree)
    (tree / "results/figures/table_layers.png").unlink()
    (tree / "results/tables/throughput.md").write_text("made by something else\n")
    assert run_report(tree, "--check") == 1
    told = capsys.readouterr().err
    assert "table_layers.png is missing" in told
    assert "throughput" not in told
    shutil.rmtree(tree / "results/runs/table")
    assert run_report(tree, "--check") == 1
    assert "table.md has no runs" in capsys.readouterr().err


def test_settings_never_share_a_cell(tmp_path):
    base = {"top1": 60.0, "sparsity": 0.9}
    write_run(tmp_path, **base)
    write_run(tmp_path, **base, epochs=8)
    write_run(tmp_path, **base, precision="bf16")
    write_run(tmp_path, **base, batch_size=64)
    write_run(tmp_path, **base, label="proxy")
    write_run(tmp_path, **base, framework="asl_plus")
    write_run(tmp_path, **base, config={"optimizer": {"lr": 0.2}})
    cells, problems = cells_of(tmp_path)
    assert not problems
    assert [len(cell.runs) for cell in cells] == [1] * 7
    names = row_names(cell.setting for cell in cells)
    assert len(set(names.values())) == 7
    assert any("optimizer.lr=0.2" in name for name in names.values())


def test_theta_rule_is_one_row_with_the_value_used_in_each_cell(tmp_path):
    write_run(tmp_path, sparsity=0.9)
    write_run(tmp_path, sparsity=0.98)
    write_run(tmp_path, sparsity=0.98, theta="0.5")
    cells, _ = cells_of(tmp_path)
    assert [(c.setting.theta, c.sparsity) for c in cells] == [("0.5", 0.98), ("auto", 0.9), ("auto", 0.98)]
    text = report.experiment_products("x", cells, tmp_path).texts[tmp_path / "tables/x.md"]
    assert "| 1 (auto) | 90 % |" in text
    assert "| 0.5 (auto) | 98 % |" in text


def test_infinite_order_comes_from_the_config(tmp_path):
    write_run(tmp_path, method="ste", p=None, config={"method": {"name": "ste", "p": float("inf"), "theta": 1.0}})
    assert cells_of(tmp_path)[0][0].setting.p == "inf"


def test_repeated_seed_is_named_and_counted_once(tmp_path, capsys):
    first = write_run(tmp_path / "results/runs")
    shutil.copytree(first, first.with_name(first.name + "-copy"))
    assert run_report(tmp_path) == 1
    assert "repeats seed 0" in capsys.readouterr().err
    assert "60.00 (1)" in (tmp_path / "results/tables/table.md").read_text()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda r: "{", "is damaged"),
        (lambda r: json.dumps({k: v for k, v in r.items() if k != "final_top1"}), "lacks final_top1"),
        (lambda r: json.dumps(r | {"final_top1": "good"}), "final_top1 is 'good'"),
        (lambda r: json.dumps(r | {"final_top1": 101.0}), "percentage"),
        (lambda r: json.dumps(r | {"format": 2}), "format 2"),
        (lambda r: json.dumps(r | {"nonzeros": r["nonzeros"] + 1}), "add up"),
        (lambda r: json.dumps(r | {"achieved_sparsity": 0.5}), "achieved_sparsity 0.5"),
        (lambda r: "[]", "format 'list'"),
    ],
)
def test_damaged_result_is_named(tmp_path, damage, told):
    good, broken = write_run(tmp_path, seed=0), write_run(tmp_path, seed=1) / "result.json"
    broken.write_text(damage(json.loads(broken.read_text())))
    with pytest.raises(ResultError, match=re.escape(str(broken))):
        read_result(broken)
    cells, (problem,) = cells_of(tmp_path)
    assert [run.directory for cell in cells for run in cell.runs] == [good]
    assert told in problem
    assert len(problem.splitlines()) == 1


def test_incomplete_evidence_is_named(tree, capsys):
    first, second, third, *_ = find_runs(tree)
    (first / "result.json").unlink()
    (second / "config.yaml").unlink()
    (third / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "val/top1": 3.0}\n{"step": 2, "epo')
    assert run_report(tree) == 1
    unfinished, config, metrics = capsys.readouterr().err.splitlines()
    assert "has not finished" in unfinished
    assert "config.yaml cannot be read" in config
    assert "in line 2" in metrics
    assert "| 98 % |" in (tree / "results/tables/table.md").read_text()  # the rest is made


def test_unknown_experiment_is_named_with_those_there_are(tree, capsys):
    assert run_report(tree, "tabel") == 1
    assert "tabel has no runs" in (error := capsys.readouterr().err)
    assert "there are: table" in error


def test_nothing_to_report(tmp_path, capsys):
    assert run_report(tmp_path) == 0
    assert "nothing to report" in capsys.readouterr().out


def test_figures_show_the_numbers_and_decode(tree):
    image = pytest.importorskip("PIL.Image")
    run_report(tree)
    cells, _ = cells_of(tree)
    curve = figures.curve_data(cells)["panels"][0]
    assert [(p["mean"], p["n"]) for p in curve["lines"]["feather"]] == [(61.5, 3), (50.0, 1)]
    assert curve["dense"]["dense"]["mean"] == 70.0
    training = figures.training_data(cells)["panels"][0]["lines"][1]
    assert training["epoch"] == [1.0, 2.0, 3.0, 4.0]
    assert training["top1"][0] == pytest.approx(61.5 / 2)
    layers = figures.layers_data(cells)["panels"][0]
    assert layers["layers"][0] == "conv1"
    assert layers["lines"][0]["left"][0] == 1 - 388 / 864
    for path in sorted((tree / "results/figures").iterdir()):
        with image.open(path) as picture:
            assert min(picture.size) > 300
            assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 10
        assert figures.stored_hash(path)


def test_figures_without_sparse_runs_and_with_empty_layers(tmp_path):
    write_run(tmp_path, sparsity=0.0, method="dense")
    cells, _ = cells_of(tmp_path)
    assert figures.curve_data(cells) is None
    assert figures.layers_data(cells) is None
    run = write_run(tmp_path / "two", sparsity=0.9)
    result = json.loads((run / "result.json").read_text())
    layer = result["layers"][0]
    result["nonzeros"] -= layer["size"] - layer["zeros"]
    layer["zeros"] = layer["size"]
    result["achieved_sparsity"] = 1 - result["nonzeros"] / result["prunable"]
    (run / "result.json").write_text(json.dumps(result))
    cells, problems = cells_of(tmp_path / "two")
    assert not problems
    data = figures.layers_data(cells)
    figures.save(figures.draw(data), tmp_path / "layers.png", data)
    assert figures.stored_hash(tmp_path / "layers.png") == figures.data_hash(data)


def test_quickstart_prints_the_table_and_writes_its_files(tmp_path, capsys, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    for sparsity, top1 in [(0.0, 98.0), (0.9, 97.0), (0.995, 70.0)]:
        method = "feather" if sparsity else "dense"
        write_run(Path("runs"), experiment="quickstart", dataset="digits", method=method, sparsity=sparsity, top1=top1)
    arguments = ["quickstart", "--runs", "runs/quickstart", "--out", "results/quickstart"]
    assert report.main(arguments) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert ["dense", "98.00", "194,400", "1.0", "x", "40.0", "M", "30", "s"] in rows
    assert any(row[:3] == ["99.5", "%", "70.00"] for row in rows)
    assert "no W&B run lies below runs/quickstart" in printed
    out = tmp_path / "results/quickstart"
    assert "| 99.5 % | 70.00 |" in (out / "table.md").read_text()
    assert len((out / "table.csv").read_text().splitlines()) == 4
    with image.open(out / "curve.png") as picture:
        picture.load()
    assert report.main([*arguments, "--check"]) == 0

    wandb = next(Path("runs/quickstart").iterdir()) / "wandb" / "offline-run-1"
    wandb.mkdir(parents=True)
    report.main(arguments)
    printed = capsys.readouterr().out
    assert f"leet {wandb}" in printed
    assert "sync runs/quickstart/*/wandb/offline-run-*" in printed


def test_quickstart_without_runs_says_how_to_start_them(tmp_path, capsys):
    assert report.main(["quickstart", "--runs", str(tmp_path / "none"), "--out", str(tmp_path)]) == 1
    assert "make quickstart" in capsys.readouterr().err


def test_collect_copies_thinned_evidence_once(tmp_path, capsys):
    run = write_run(tmp_path / "runs")
    (run / "checkpoint_1.pt").write_bytes(b"large")
    out = tmp_path / "evidence"
    assert collect.main([str(run), str(tmp_path / "runs" / "*" / "*"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"table/{run.name}: copied result.json, config.yaml, metrics.jsonl."
    ]
    target = out / "table" / run.name
    assert sorted(path.name for path in target.iterdir()) == ["config.yaml", "metrics.jsonl", "result.json"]
    records = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert collect.main([str(run), "--out", str(out)]) == 0
    assert "up to date" in capsys.readouterr().out
    assert collect.main([str(target), "--out", str(out)]) == 0


def test_collect_refuses_what_is_no_evidence(tmp_path, capsys):
    good = write_run(tmp_path / "runs", seed=1)
    unfinished = write_run(tmp_path / "runs")
    (unfinished / "result.json").unlink()
    out = tmp_path / "evidence"
    assert collect.main([str(tmp_path / "nothing*"), str(tmp_path / "runs"), "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert "matches no run directory" in captured.err
    assert "has not finished" in captured.err
    assert good.name in captured.out
    changed = json.loads((good / "result.json").read_text()) | {"config_hash": "other"}
    (good / "result.json").write_text(json.dumps(changed))
    assert collect.main([str(good), "--out", str(out)]) == 1
    assert "other settings" in capsys.readouterr().err


def test_collect_publishes_no_path_of_this_machine():
    root, home = str(collect.ROOT), str(Path.home())
    text = f"run_dir: {root}/runs/x\nroot: {home}/data\nother: {root}-2/x\n"
    expected = f"run_dir: ./runs/x\nroot: ~/data\nother: {root}-2/x\n"
    assert collect.without_machine_paths(text) == expected
