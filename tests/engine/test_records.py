import json
import math
import subprocess
from pathlib import Path

import pytest
import torch

from engine.records import MetricsLog, environment, read_metrics, write_json


def log_with(path: Path, steps: list[int]) -> MetricsLog:
    path.mkdir(exist_ok=True)
    log = MetricsLog(path / "metrics.jsonl")
    for step in steps:
        log.append({"step": step, "train/loss": step / 3})
    return log


def test_numbers_come_back_exactly(tmp_path: Path) -> None:
    log = log_with(tmp_path, [1, 2, 7])
    assert [record["train/loss"] for record in log.read()] == [1 / 3, 2 / 3, 7 / 3]


def test_truncate_drops_what_follows_the_checkpoint(tmp_path: Path) -> None:
    log = log_with(tmp_path, [10, 20, 30])
    assert [record["step"] for record in log.truncate(after_step=20)] == [10, 20]
    log.append({"step": 30})
    assert [record["step"] for record in read_metrics(log.path)] == [10, 20, 30]


def test_resumed_file_is_bytewise_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = log_with(tmp_path / "a", [1, 2, 3]).path.read_bytes()
    resumed = log_with(tmp_path / "b", [1, 2])
    with resumed.path.open("a") as file:
        file.write('{"step": 3, "tra')
    resumed.truncate(after_step=2)
    resumed.append({"step": 3, "train/loss": 3 / 3})
    assert resumed.path.read_bytes() == whole


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_cut_last_line_is_left_out(tmp_path: Path, cut: int) -> None:
    log = log_with(tmp_path, [1, 2])
    log.path.write_bytes(log.path.read_bytes()[:-cut])
    assert [record["step"] for record in log.read()] == [1]
    assert [record["step"] for record in log.truncate(after_step=5)] == [1]


def test_damage_elsewhere_is_named(tmp_path: Path) -> None:
    log = log_with(tmp_path, [1, 2, 3])
    log.path.write_text(log.path.read_text().replace('{"step": 2', "###"))
    with pytest.raises(ValueError, match="line 2 is no JSON object"):
        log.read()


def test_no_file_is_no_record(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.read() == []
    assert log.truncate(after_step=0) == []


def test_a_record_needs_a_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="integer 'step', got 1.5"):
        MetricsLog(tmp_path / "metrics.jsonl").append({"step": 1.5})


def test_what_json_lacks_becomes_null(tmp_path: Path) -> None:
    path = write_json(tmp_path / "result.json", {"loss": math.nan, "deep": {"list": [math.inf, 1.0, True]}})
    assert json.loads(path.read_text()) == {"loss": None, "deep": {"list": [None, 1.0, True]}}


def test_environment_knows_commit_and_changes(tmp_path: Path) -> None:
    assert environment(tmp_path)["git_commit"] is None

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "first")
    (tmp_path / "untracked").write_text("b")
    found = environment(tmp_path)
    assert len(found["git_commit"]) == 40
    assert found["dirty"] is False
    (tmp_path / "file").write_text("changed")
    assert environment(tmp_path)["dirty"] is True


def test_environment_names_versions_and_hardware() -> None:
    found = environment()
    assert found["versions"]["torch"]
    assert found["hardware"]["cpu"]
    assert found["hardware"]["cpu_cores"] >= 1
    assert found["hardware"]["cpu_instructions"].split()[0] == torch.backends.cpu.get_cpu_capability()
    json.dumps(found)
