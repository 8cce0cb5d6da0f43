"""Tables and figures from made-up runs: the numbers by hand, staleness, damage."""

import csv
import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from engine import drawing, figures, grid, picture
from engine.results import ResultError, find_runs, group_cells, read_result, read_runs
from engine.settings import row_names
from scripts import collect, report
from tests.scripts.synthetic_runs import write_comparison, write_run


@pytest.fixture(autouse=True)
def nothing_declared(monkeypatch):
    """Made-up runs beside no declared grid, unless a test asks for one."""
    monkeypatch.setattr(report.plan, "experiments", list)
    report.declared.cache_clear()
    yield
    report.declared.cache_clear()


@pytest.fixture
def drawn():
    """Asked for by tests of pictures; the others get empty ones, which carry the same hash in a tenth of the time."""


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(drawing, "draw", lambda data: Figure((1, 1)))


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
    assert len(set(links)) == 5
    assert all((table.parent / link).is_file() and not Path(link).is_absolute() for link in links)


def test_output_is_the_same_twice_and_for_any_order(tree, drawn):
    run_report(tree)
    files = sorted(path for kind in ("tables", "figures") for path in (tree / "results" / kind).iterdir())
    kinds = ("operator_family", "table_curve", "table_layers", "table_mask", "table_training")
    assert [path.name for path in files] == [
        *(f"{kind}{suffix}" for kind in kinds for suffix in (".png", ".svg")),
        *("table.csv", "table.md", "table_paired.csv"),
    ]
    files += [tree / "results/index.html", tree / "results/README.md"]
    before = [path.read_bytes() for path in files]
    assert not any(str(tree).encode() in content for content in before)  # no path of this machine
    run_report(tree)
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
    assert "table_curve.svg is stale" in told
    assert "index.html is stale" in told
    assert "table_layers" not in told
    assert run_report(tree) == 0
    assert run_report(tree, "--check") == 0


def test_check_names_missing_and_left_over_files(tree, capsys):
    run_report(tree)
    (tree / "results/figures/table_layers.png").unlink()
    (tree / "results/figures/old_curve.svg").write_bytes((tree / "results/figures/table_curve.svg").read_bytes())
    (tree / "results/figures/photograph.svg").write_text("<svg>drawn by hand</svg>")
    (tree / "results/tables/throughput.md").write_text("made by something else\n")
    assert run_report(tree, "--check") == 1
    told = capsys.readouterr().err
    assert "table_layers.png is missing" in told
    assert "throughput" not in told
    assert "old_curve.svg shows nothing" in told
    assert "photograph" not in told
    shutil.rmtree(tree / "results/runs/table")
    assert run_report(tree, "--check") == 1
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


def test_a_setting_has_one_name_in_all_panels_of_the_curves(tmp_path):
    for framework in ("global", "asl_plus"):
        write_run(tmp_path, framework=framework, label="10 epochs")
    write_run(tmp_path, epochs=30, label="30 epochs")  # alone in its panel: "feather" would do there
    write_run(tmp_path, epochs=60, label="30 epochs")
    cells, problems = cells_of(tmp_path)
    assert not problems
    short, long = sorted(figures.curve_data(cells)["panels"], key=lambda panel: panel["title"])
    assert set(short["lines"]) == {"feather, asl_plus", "feather, global"}
    assert set(long["lines"]) == {"feather, global, 30 epochs", "feather, global, 60 epochs"}


def test_runs_of_different_labels_stand_in_tables_and_figures_of_their_own(tmp_path):
    for precision, top1 in (("bf16", 31.0), ("fp32", 32.0)):
        settings = {"precision": precision, "label": f"proxy: {precision}", "config": {"scale": "proxy"}}
        for method in ("feather", "ste"):
            write_run(tmp_path / "results/runs", experiment="short_proxy", method=method, top1=top1, **settings)
    assert run_report(tmp_path) == 0
    page = (tmp_path / "results/README.md").read_text()
    halves = page.split("**resnet20 on cifar100**")[1:]
    assert [("31.00" in half, "32.00" in half) for half in halves] == [(True, False), (False, True)]
    assert all("| feather |" in half and "| ste |" in half for half in halves)
    stems = set(figures.plots("short_proxy", cells_of(tmp_path)[0]))
    assert {"short_proxy_curve", "short_proxy_bf16_layers", "short_proxy_fp32_layers"} <= stems


def test_a_method_that_missed_the_target_says_what_it_reached_and_is_not_compared(tmp_path):
    runs = tmp_path / "results/runs"
    for method, top1, left in (("feather", 60.0, 20), ("str", 70.0, 79)):
        layers = [{"name": "conv", "size": 1000, "zeros": 1000 - left}]
        kept = {"layers": layers, "prunable": 1000, "nonzeros": left, "achieved_sparsity": 1 - left / 1000}
        for seed in range(3):
            write_run(runs, method=method, sparsity=0.98, seed=seed, top1=top1 + seed, **kept)
    assert run_report(tmp_path) == 0
    table = (tmp_path / "results/tables/table.md").read_text()
    assert "| str | 71.00 ± 1.00 (3) at 92.1 % |" in table
    assert "| feather | 61.00 ± 1.00 (3) |" in table
    assert "reached another sparsity: cannot be compared" in table
    assert "better than Feather" not in table


def test_theta_rule_is_one_row_with_the_value_used_in_each_cell(tmp_path):
    write_run(tmp_path, sparsity=0.9)
    write_run(tmp_path, sparsity=0.98)
    write_run(tmp_path, sparsity=0.98, theta="0.5")
    cells, _ = cells_of(tmp_path)
    assert [(c.setting.theta, c.sparsity) for c in cells] == [("0.5", 0.98), ("auto", 0.9), ("auto", 0.98)]
    text = report.experiment_products(grid.experiment("x", cells), [], tmp_path).texts[tmp_path / "tables/x.md"]
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


def test_files_of_two_runs_in_one_directory_are_named(tree, capsys):
    first, second = find_runs(tree)[:2]
    (second / "config.yaml").write_bytes((first / "config.yaml").read_bytes())
    assert run_report(tree) == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert "mixes two runs" in told
    assert second.name in told


def test_a_run_of_another_experiment_is_named_and_kept(tree, capsys):
    stray = write_run(tree / "elsewhere", experiment="other", method="ste", top1=55.0)
    shutil.copytree(stray, tree / "results/runs/table" / stray.name)
    assert run_report(tree) == 1
    assert "also holds runs of other" in capsys.readouterr().err
    assert "| ste | - | 55.00 (1) |" in (tree / "results/tables/table.md").read_text()


def test_declared_cells_without_evidence_are_not_run_and_say_their_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report.plan, "experiments", lambda: ["quickstart"])
    overrides = {"experiment": "quickstart", "dataset": "digits", "config": {"optimizer": {"lr": 0.5}}}
    write_run(tmp_path / "results/runs", sparsity=0.9, top1=97.0, **overrides)  # other settings than declared
    assert run_report(tmp_path) == 0
    text = (tmp_path / "results/tables/quickstart.md").read_text()
    declared_row = next(line for line in text.splitlines() if "not run | not run" in line)
    assert declared_row.count("not run") == 5  # dense is a row of its own
    assert "97.00 (1)" not in declared_row
    assert "Not run: 6 of 7 cells" in text
    assert "python scripts/reproduce.py quickstart" in text
    lines = (tmp_path / "results/tables/quickstart.csv").read_text().splitlines()
    commands = [line for line in lines if "python train.py experiment=quickstart" in line]
    assert len(commands) == 6
    assert any("sparsity=0.995" in line and ",not run,0.995,0," in line for line in commands)
    assert "not run" in (tmp_path / "results/README.md").read_text()
    assert run_report(tmp_path, "--check") == 0


def test_an_experiment_that_is_declared_and_was_never_run_has_its_table(tree, monkeypatch):
    monkeypatch.setattr(report.plan, "experiments", lambda: ["imagenet_resnet50"])
    assert run_report(tree) == 0
    text = (tree / "results/tables/imagenet_resnet50.md").read_text()
    assert re.search(r"\| feather \| 90 % \| not run \| 76\.93 \| - \| paperswithcode board of the paper \| - \|", text)
    page = (tree / "results/README.md").read_text()
    assert "## Declared, not run" in page
    assert "[imagenet_resnet50](tables/imagenet_resnet50.md)" in page


def test_a_declaration_that_contradicts_itself_costs_a_sentence_and_no_table(tree, monkeypatch, capsys):
    def broken(name):
        raise report.ConfigError("method=nonsense is unknown.")

    monkeypatch.setattr(report, "declared", broken)
    broken.cache_clear = lambda: None
    assert run_report(tree) == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert "method=nonsense" in told
    assert "61.50 ± 1.80 (3)" in (tree / "results/tables/table.md").read_text()


def test_proxy_scale_is_said_everywhere_and_never_compared_with_the_paper(tmp_path):
    settings = {"label": "proxy: 16x16 images", "config": {"scale": "proxy"}}
    experiment = {"experiment": "imagenet_table_proxy", "model": "resnet50", "dataset": "imagenet"}
    write_run(tmp_path / "results/runs", sparsity=0.9, epochs=100, top1=76.0, **experiment, **settings)
    assert run_report(tmp_path) == 0
    table = (tmp_path / "results/tables/imagenet_table_proxy.md").read_text()
    assert "# imagenet_table_proxy (proxy)" in table
    assert "**Proxy scale**" in table
    assert "76.93" not in table
    assert "Proxy scale" in (tmp_path / "results/README.md").read_text()
    cells, _ = cells_of(tmp_path)
    assert all(data["proxy"] for data in figures.plots("x", cells).values())


def test_the_projects_readme_compares_methods_by_their_longest_training_and_links_the_rest(tmp_path):
    (tmp_path / "README.md").write_text(f"Before.\n{report.BEGIN}\n{report.END}\nAfter.\n")
    runs = tmp_path / "results/runs"
    for method, top1 in (("feather", 55.0), ("gmp", 44.0)):
        for epochs in (10, 30):
            conditions = {"epochs": epochs, "label": f"shortened: {epochs} epochs"}
            write_run(runs, experiment="methods", method=method, sparsity=0.98, top1=top1 - epochs, **conditions)
    for p, top1 in ((2.0, 11.0), (3.0, 22.0)):
        write_run(runs, experiment="orders", p=p, sparsity=0.98, top1=top1)
    assert run_report(tmp_path) == 0
    text = (tmp_path / "README.md").read_text()
    assert "| feather | 25.00 (1) |" in text
    assert "| gmp | 14.00 (1) |" in text
    assert "shortened: 30 epochs" in text
    assert "10 epochs" not in text
    assert "11.00" not in text
    paired = list(csv.DictReader((tmp_path / "results/tables/methods_paired.csv").open()))
    assert sorted((row["method"], row["epochs"]) for row in paired) == [("gmp", "10"), ("gmp", "30")]
    assert "One method alone: [orders](results/tables/orders.md)." in text
    assert text.startswith("Before.")
    assert text.endswith("After.\n")


def test_hand_written_findings_stand_in_the_page_word_for_word(tree, capsys):
    (tree / "results/FINDINGS.md").write_text("## What was found\n\nNothing | yet.\n")
    assert run_report(tree) == 0
    text = (tree / "results/README.md").read_text()
    assert "## What was found\n\nNothing | yet.\n" in text
    assert text.index("Nothing | yet.") < text.index("## table")
    (tree / "results/FINDINGS.md").write_text("Something.\n")
    assert run_report(tree, "--check") == 1
    assert "README.md is stale" in capsys.readouterr().err


def test_many_methods_are_compared_and_drawn_by_sparsity(tmp_path):
    write_comparison(tmp_path, seeds=3)
    cells, problems = cells_of(tmp_path)
    assert not problems
    assert set(figures.plots("t", cells)) == {"t_curve", "t_training", "t_layers", "t_allocation", "t_mask"}
    allocation = figures.allocation_data(cells)
    assert [panel["sparsity"] for panel in allocation["panels"]] == [0.9, 0.95, 0.98, 0.99]
    assert {line["name"] for panel in allocation["panels"] for line in panel["lines"]} == {
        "feather, asl_plus",
        "feather, global",
    }
    mask = figures.mask_data(cells)["panels"][0]["lines"]
    first = {line["name"]: line["mean"][0] for line in mask}
    assert first["feather, global, theta = 1"] > first["feather, global, theta = auto"]
    assert figures.allocation_data([c for c in cells if c.setting.framework != "asl_plus"]) is None


def test_the_operator_figure_is_the_operator(tmp_path):
    data = figures.operator_data()
    at = {w: i for i, w in enumerate(data["weight"])}
    assert data["operators"]["1"][at[2.0]] == 1.0
    assert data["operators"]["3"][at[2.0]] == pytest.approx(7 ** (1 / 3), abs=1e-6)
    assert data["operators"]["inf"][at[2.0]] == 2.0
    assert data["operators"]["3"][at[1.0]] == 0.0
    assert (data["gradients"]["0.5"][at[0.5]], data["gradients"]["0.5"][at[1.5]]) == (0.5, 1.0)


def test_unknown_experiment_is_named_with_those_there_are(tree, capsys):
    assert run_report(tree, "tabel") == 1
    assert "tabel has no runs" in (error := capsys.readouterr().err)
    assert "there are: table" in error


def test_nothing_to_report(tmp_path, capsys):
    assert run_report(tmp_path) == 0
    assert "nothing to report" in capsys.readouterr().out


def test_figures_show_the_numbers_and_decode(tree, drawn):
    image = pytest.importorskip("PIL.Image")
    run_report(tree)
    cells, _ = cells_of(tree)
    curve = figures.curve_data(cells)["panels"][0]
    assert [(p["mean"], p["n"]) for p in curve["lines"]["feather"]] == [(61.5, 3), (50.0, 1)]
    assert curve["dense"]["dense"]["mean"] == 70.0
    training = figures.training_data(cells)["panels"][0]["lines"][1]
    mask = figures.mask_data(cells)["panels"][0]["lines"][0]
    assert (mask["mean"], mask["std"]) == ([0.005, 0.0025, 0.00125, 0.000625], [0.0] * 4)
    assert training["epoch"] == [1.0, 2.0, 3.0, 4.0]
    assert training["top1"][0] == pytest.approx(61.5 / 2)
    layers = figures.layers_data(cells)
    assert layers["layers"][0] == "conv1"
    assert layers["panels"][0]["lines"][0]["left"][0] == 1 - 388 / 864
    for path in sorted((tree / "results/figures").glob("*.svg")):
        ElementTree.parse(path)
        assert picture.stored_hash(path) == picture.stored_hash(path.with_suffix(".png"))
    for path in sorted((tree / "results/figures").glob("*.png")):
        with image.open(path) as opened:
            assert min(opened.size) > 300
            assert len(set(opened.convert("L").resize((64, 64)).tobytes())) > 10
        assert picture.stored_hash(path)


def test_figures_without_sparse_runs_and_with_empty_layers(tmp_path, drawn):
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
    picture.save(drawing.draw(data), tmp_path / "layers.png", data)
    assert picture.stored_hash(tmp_path / "layers.png") == picture.data_hash(data)


def test_quickstart_prints_the_table_and_writes_its_files(tmp_path, capsys, monkeypatch, drawn):
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
