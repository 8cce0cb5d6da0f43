"""What one command leaves behind, on ResNet-20 of width 4 and the embedded digits."""

import json
import math
import re
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import engine.optimization
import models.factory
from engine.checkpoint import load_checkpoint
from engine.config import ConfigError
from engine.seeding import set_deterministic
from feather import zeros_at
from models import create_model
from scripts import evaluate as evaluate_script
from tests.engine.wandb_reader import read_history, read_records, read_step_metrics, read_summary
from tests.train_helpers import (
    ROOT,
    TINY,
    Plain,
    command,
    directory,
    outcome,
    read_json,
    read_metrics,
    read_weights,
    snapshot,
    start,
)

CONTRACT = {
    "target_sparsity", "achieved_sparsity", "nonzeros", "prunable", "final_top1", "best_top1", "flops", "seed",
    "wall_seconds", "images_per_second", "device", "versions", "git_commit", "dirty", "config_hash", "command",
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    set_deterministic(False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, for tests that only read."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        start()
    return folder / directory()


def losses(run: Path) -> list[float]:
    return [record["train/loss"] for record in read_metrics(run)]


# ---- what a run leaves -----------------------------------------------------------------------------------------------


def test_the_directory_holds_what_the_contract_says(finished: Path) -> None:
    assert {path.name for path in finished.iterdir() if not path.name.startswith("checkpoint_")} == {
        "config.yaml", "metrics.jsonl", "model.safetensors", "result.json", "run.json",
    }  # fmt: skip
    assert [path.name[:19] for path in sorted(finished.glob("checkpoint_*.pt"))] == [
        "checkpoint_00000004", "checkpoint_00000008",
    ]  # fmt: skip
    state, _ = load_checkpoint(finished)
    assert state["step"] == 8
    assert "width: 4" in (finished / "config.yaml").read_text()


def test_every_epoch_has_a_record_with_the_contract_names(finished: Path) -> None:
    records = read_metrics(finished)
    assert [(record["step"], record["epoch"]) for record in records] == [(4, 1.0), (8, 2.0)]
    for record in records:
        assert record.keys() >= {
            "train/loss", "val/top1", "val/loss", "sparsity/global", "sparsity/target", "sparsity/layer/conv1.weight",
            "sparsity/mask_change", "threshold/global", "perf/images_per_second",
        }  # fmt: skip
        assert all(math.isfinite(value) for value in record.values())
        assert record["sparsity/global"] == pytest.approx(record["sparsity/target"], abs=1e-4)
    layers = [key for key in records[0] if key.startswith("sparsity/layer/")]
    assert len(layers) == 21


def test_the_result_counts_what_is_in_the_model_file(finished: Path) -> None:
    result, weights = read_json(finished / "result.json"), read_weights(finished)
    assert result.keys() >= CONTRACT
    zeros = {layer["name"]: int((weights[layer["name"]] == 0).sum()) for layer in result["layers"]}
    assert zeros == {layer["name"]: layer["zeros"] for layer in result["layers"]}
    assert result["prunable"] == sum(weights[name].numel() for name in zeros)
    assert sum(zeros.values()) == zeros_at(0.6, result["prunable"]) == result["prunable"] - result["nonzeros"]
    assert result["achieved_sparsity"] == sum(zeros.values()) / result["prunable"]
    assert result["target_sparsity"] == 0.6
    assert result["flops"] < result["dense_flops"]
    assert result["best_top1"] >= result["final_top1"] == read_metrics(finished)[-1]["val/top1"]
    assert result["config_hash"] == finished.name.rpartition("-")[2]
    assert result["eval_split"] == "test"
    assert result["command"].startswith("python train.py ")
    assert "model.options.width=4" in result["command"]


def test_the_model_loads_where_feather_cannot_be_imported(finished: Path) -> None:
    program = f"""
import sys
sys.modules["feather"] = None
sys.path.insert(0, {str(ROOT)!r})
from safetensors.torch import load_file
from models import create_model
model = create_model("resnet20", num_classes=10, width=4)
model.load_state_dict(load_file({str(finished / "model.safetensors")!r}), strict=True)
print(sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert int(ended.stdout) == read_json(finished / "result.json")["zeros"]


def test_the_evaluation_script_finds_the_recorded_accuracy(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_script.main([str(finished), "--json", "--device", "cpu"]) == 0
    found, result = json.loads(capsys.readouterr().out), read_json(finished / "result.json")
    assert found["top1"] == result["final_top1"]
    assert found["loss"] == pytest.approx(result["final_loss"], rel=1e-6)
    assert (found["nonzeros"], found["flops"]) == (result["nonzeros"], result["flops"])


# ---- one directory, one run ------------------------------------------------------------------------------------------


def test_started_again_a_finished_run_does_nothing_unless_told_to(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("trainer.max_steps=2", "run_dir=run")
    first = start(*sizes)
    before = snapshot(Path())
    capsys.readouterr()
    assert start(*sizes, "trainer.log_every=1") == pytest.approx(first, abs=1e-9)
    assert "is finished" in capsys.readouterr().out
    assert snapshot(Path()) == before

    expected, marker = outcome(Path("run")), read_json(Path("run/run.json"))
    assert start(*sizes, "overwrite=true") == first
    assert outcome(Path("run")) == expected
    assert read_json(Path("run/run.json"))["run_id"] != marker["run_id"]


def test_a_directory_of_another_configuration_is_refused() -> None:
    start("trainer.max_steps=1", "run_dir=run")
    before = snapshot(Path())
    with pytest.raises(ConfigError, match=r"run_dir=run holds a run of another configuration .* overwrite=true\.$"):
        start("trainer.max_steps=1", "run_dir=run", "seed=1")
    assert snapshot(Path()) == before
    start("trainer.max_steps=1", "run_dir=run", "seed=1", "overwrite=true")
    assert read_json(Path("run/result.json"))["seed"] == 1


@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_somebody_elses_folder_is_refused_and_left_alone(overwrite: str) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("years of work")
    before = snapshot(Path())
    with pytest.raises(ConfigError, match=r"run_dir=mine is not empty and not a run's directory: name a new folder\."):
        start("run_dir=mine", f"overwrite={overwrite}")
    assert snapshot(Path()) == before


def test_dense_runs_prune_nothing_and_are_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    start("trainer.max_steps=2", "method=gmp", "sparsity=0")
    run = directory("trainer.max_steps=2", "method=dense", "sparsity=0")
    result = read_json(run / "result.json")
    assert (result["method"], result["zeros"], result["achieved_sparsity"]) == ("dense", 0, 0)
    assert result["nonzeros"] == result["prunable"]
    assert result["flops"] == result["dense_flops"]
    assert read_metrics(run)[-1]["sparsity/global"] == 0
    start("trainer.max_steps=2", "method=dense", "sparsity=0")
    assert "is finished" in capsys.readouterr().out


# ---- the same numbers ------------------------------------------------------------------------------------------------


def test_micro_batches_add_up_to_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.factory.OURS, "resnet20", Plain)  # BatchNorm would see other batches
    for parts in (1, 2, 3):
        start(f"trainer.accumulate={parts}", f"run_dir=run{parts}", "trainer.log_every=1")
    for parts in (2, 3):
        assert losses(Path(f"run{parts}")) == pytest.approx(losses(Path("run1")), rel=1e-4)
        for name, weight in read_weights(Path("run1")).items():
            torch.testing.assert_close(read_weights(Path(f"run{parts}"))[name], weight, rtol=1e-2, atol=1e-4)


def test_two_deterministic_runs_are_bitwise_equal() -> None:
    start("trainer=deterministic", "run_dir=a")
    assert torch.are_deterministic_algorithms_enabled()
    start("trainer=deterministic", "run_dir=b")
    assert outcome(Path("a")) == outcome(Path("b"))
    start("trainer=deterministic", "run_dir=c", "seed=1")
    assert losses(Path("c")) != losses(Path("a"))


@pytest.mark.parametrize("precision", ["bf16", "fp16", "auto"])
def test_every_precision_trains(precision: str) -> None:
    start(f"trainer.precision={precision}", "run_dir=run", "trainer.max_steps=2", "trainer.log_every=1")
    start("run_dir=fp32", "trainer.max_steps=2", "trainer.log_every=1")
    assert losses(Path("run")) == pytest.approx(losses(Path("fp32")), rel=0.05)
    assert read_json(Path("run/result.json"))["precision"] in ({"bf16", "fp32"} if precision == "auto" else {precision})


@pytest.mark.long
def test_a_compiled_run_is_the_same_run() -> None:
    for run, compiled in (("one", "true"), ("other", "false")):
        start(f"trainer.compile={compiled}", f"run_dir={run}", "trainer.max_steps=4", "trainer.log_every=1")
    one, other = Path("one"), Path("other")
    assert losses(one) == pytest.approx(losses(other), rel=1e-3)
    assert read_weights(one).keys() == read_weights(other).keys()
    assert read_json(one / "result.json")["zeros"] == read_json(other / "result.json")["zeros"]


@pytest.mark.long
def test_torchrun_starts_two_processes(tmp_path: Path) -> None:
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(ROOT / "train.py"),
    ]
    ended = subprocess.run([*launch, *TINY, "run_dir=run"], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert read_json(tmp_path / "run/result.json")["world_size"] == 2
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [4, 8]
    assert ended.stdout.count("top-1") == 1


# ---- where training starts from, and what it is judged on --------------------------------------------------------


def test_a_held_out_split_is_evaluated_and_recorded() -> None:
    start("dataset.validation=0.25", "trainer.max_steps=1", "run_dir=run")
    assert read_json(Path("run/result.json"))["eval_split"] == "validation"


def test_dense_weights_are_a_start(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("trainer.max_steps=1", "trainer.log_every=1")
    start(*sizes, "run_dir=scratch")
    start(*sizes, "run_dir=tuned", f"model.weights={finished / 'model.safetensors'}")
    assert losses(Path("tuned")) != losses(Path("scratch"))
    assert losses(Path("tuned"))[0] < losses(Path("scratch"))[0] - 0.005  # what two epochs have taught

    torch.save(create_model("resnet20", num_classes=100, width=4).state_dict(), "hundred.pt")
    capsys.readouterr()
    start(*sizes, "run_dir=other", "model.weights=hundred.pt")
    assert "Started from hundred.pt, with a new fc.weight, fc.bias." in capsys.readouterr().out


def test_published_weights_without_a_network_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("sys.argv", ["train.py", "model=resnet18"])
    from engine.config import register_schema

    register_schema()
    import train
    from tests.train_helpers import compose

    with pytest.raises(ConfigError) as error:
        train.start(compose("model=resnet18", "model.pretrained=true", "logger=none", "run_dir=run"))
    assert "no route to host" in str(error.value)
    assert "model.weights=" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not Path("run").exists()


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    regular = engine.optimization.learning_rate
    monkeypatch.setattr(
        engine.optimization, "learning_rate", lambda step, *rest: 1e30 if step >= 4 else regular(step, *rest)
    )
    for run, method in (("sparse", "sparsity=0.6"), ("dense", "sparsity=0")):
        with pytest.raises(ConfigError) as error:
            start(f"run_dir={run}", method, "trainer.clip_grad_norm=null", "trainer.log_every=1")
        assert re.search(r"(At step|after) [5-8]\b", str(error.value)), error.value
        assert len(str(error.value).splitlines()) == 1
        state, _ = load_checkpoint(run)
        assert state["step"] == 4
        assert all(weight.isfinite().all() for weight in state["model"].values())
        assert not Path(run, "result.json").exists()


def test_an_absurd_learning_rate_is_one_sentence_for_the_user(tmp_path: Path) -> None:
    ended = command(*TINY, "optimizer.lr=1e30", "trainer.clip_grad_norm=null", cwd=tmp_path)
    assert ended.status == 1
    assert "Traceback" not in ended.err
    assert re.search(r"\b(step \d|\d optimizer steps)", ended.err.splitlines()[-1])


# ---- W&B -------------------------------------------------------------------------------------------------------------


def test_an_offline_wandb_run_holds_the_curve_each_step_once_also_after_a_resumption(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    options = ("logger=wandb", "experiment_name=a-group", "trainer.log_every=1")
    with pytest.raises(SystemExit):
        start(*options, "time_limit_minutes=0.00001")
    start(*options)

    run = directory(*options)
    history = [entry for entry in read_history(run) if "step" in entry]
    records = read_metrics(run)
    assert [entry["step"] for entry in history] == [record["step"] for record in records] == list(range(1, 9))
    epochs = [entry for entry in history if "val/top1" in entry]
    assert [entry["step"] for entry in epochs] == [4, 8]
    for entry, record in zip(epochs, (records[3], records[7]), strict=True):
        assert {key: entry[key] for key in record} == record
        assert entry["val/top1_vs_sparsity"] == record["val/top1"]
        assert len([key for key in entry if key.startswith("sparsity/layer/")]) == 21
    assert all("sparsity/mask_change" in entry for entry in history)
    axes = read_step_metrics(run)
    assert (axes["val/top1_vs_sparsity"], axes["*"]) == ("sparsity/global", "step")
    result, summary = read_json(run / "result.json"), read_summary(run)
    for key in ("final_top1", "best_top1", "achieved_sparsity", "nonzeros", "flops"):
        assert summary[key] == result[key]
    (about,) = [record.run for record in read_records(run) if record.HasField("run")][:1]
    assert (about.run_group, about.job_type, about.project) == ("a-group", "feather", "feather")
    assert set(about.tags) == {"feather", "resnet20", "digits"}
    assert about.run_id == read_json(run / "run.json")["run_id"]
