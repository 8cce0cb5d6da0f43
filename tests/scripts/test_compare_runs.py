"""compare_runs says whether two runs are equal and where they first part."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from scripts.compare_runs import main


@pytest.fixture
def runs(tmp_path):
    """Two directories of equal runs that were executed in different places at different speed."""
    a = tmp_path / "a"
    a.mkdir()
    (a / "config.yaml").write_text(
        "seed: 0\nsparsity: 0.9\nrun_dir: a\nlogger:\n  name: wandb\ntrainer:\n  device: cpu\n"
    )
    records = [{"step": s, "train/loss": 1 / s, "perf/images_per_second": 100.0} for s in (1, 2, 3)]
    (a / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    save_file({"weight": torch.arange(4.0)}, a / "model.safetensors")
    b = tmp_path / "b"
    shutil.copytree(a, b)
    (b / "config.yaml").write_text(
        "seed: 0\nsparsity: 0.9\nrun_dir: b\nlogger:\n  name: none\ntrainer:\n  device: cuda\n"
    )
    (b / "metrics.jsonl").write_text((b / "metrics.jsonl").read_text().replace("100.0", "250.0"))
    return a, b


def compare(runs, capsys):
    status = main([str(run) for run in runs])
    out = capsys.readouterr()
    return status, out.out + out.err


def test_where_and_how_fast_a_run_went_does_not_matter(runs, capsys):
    assert compare(runs, capsys) == (0, "The runs are equal.\n")


def test_the_first_step_that_differs_is_named(runs, capsys):
    path = runs[1] / "metrics.jsonl"
    path.write_text(path.read_text().replace("0.5", "0.5000001"))
    status, text = compare(runs, capsys)
    assert status == 1
    assert "step 2" in text
    assert "train/loss" in text


def test_a_missing_step_is_named(runs, capsys):
    path = runs[1] / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:2]))
    status, text = compare(runs, capsys)
    assert status == 1
    assert "only the first run has step 3" in text


def test_one_bit_of_a_weight_is_seen(runs, capsys):
    save_file({"weight": torch.tensor([0.0, 1.0, 2.0, 3.0000002])}, runs[1] / "model.safetensors")
    status, text = compare(runs, capsys)
    assert status == 1
    assert "weight differs in 1 of 4 values" in text


def test_the_sign_of_a_zero_is_seen_and_a_nan_equals_itself(runs, capsys):
    for run, zero in zip(runs, (0.0, -0.0), strict=True):
        save_file({"nan": torch.tensor([float("nan")]), "weight": torch.tensor([zero, 1.0])}, run / "model.safetensors")
    status, text = compare(runs, capsys)
    assert status == 1
    assert text == "weights: weight differs in 1 of 2 values.\n"


def test_settings_that_differ_are_named(runs, capsys):
    path = runs[1] / "config.yaml"
    path.write_text(path.read_text().replace("0.9", "0.95"))
    status, text = compare(runs, capsys)
    assert status == 1
    assert "sparsity is 0.9 in the first and 0.95" in text


def test_what_is_no_run_ends_with_one_sentence(runs, tmp_path, capsys):
    status, text = compare((runs[0], tmp_path / "nothing"), capsys)
    assert status == 2
    assert text.count("\n") == 1
