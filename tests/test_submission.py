"""Runs on a cluster: the settings of Slurm compose, and submitit's local executor runs, resumes and reports jobs."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra

from tests.train_helpers import CONF, ROOT, TRAIN, compose, read_json

submitit = pytest.importorskip("submitit")
pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

TINY = ("model.options.width=4", "debug=few_steps", "trainer.max_steps=2", "trainer.device=cpu", "logger=none")


def launcher(*overrides: str):
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", list(overrides), return_hydra_config=True).hydra.launcher


def test_slurm_requeues_and_gives_each_run_a_gpu() -> None:
    composed = launcher("hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.account=me")
    assert composed._target_.endswith(".SlurmLauncher")
    assert (composed.gpus_per_node, composed.tasks_per_node, composed.nodes) == (1, 1, 1)
    assert (composed.partition, composed.account) == ("gpu", "me")
    assert composed.max_num_timeout > 0  # else a run longer than the time limit is never continued
    assert composed.signal_delay_s >= 60  # enough to finish a step and save
    with pytest.raises(Exception, match="partitoin"):
        launcher("hydra/launcher=slurm", "hydra.launcher.partitoin=gpu")


def test_every_setting_for_slurm_is_known_to_submitit() -> None:
    valid = submitit.SlurmExecutor._valid_parameters() | {"timeout_min", "mem_gb", "name", "tasks_per_node", "nodes"}
    settings = set(launcher("hydra/launcher=slurm")) - {"_target_", "submitit_folder", "max_num_timeout"}
    renamed = {"timeout_min": "time", "name": "job_name", "tasks_per_node": "ntasks_per_node", "mem_gb": "mem"}
    assert not {renamed.get(key, key) for key in settings} - valid


def test_train_py_is_submitted_by_its_sweep(tmp_path: Path) -> None:
    command = [sys.executable, str(TRAIN), "-m", *TINY, "sparsity=0.5", "hydra/launcher=submitit_local"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    (result,) = tmp_path.glob("runs/default/*/result.json")
    assert read_json(result)["target_sparsity"] == 0.5


@pytest.mark.long
def test_reproduce_submits_names_what_failed_and_finishes_the_rest(tmp_path: Path) -> None:
    arguments = ["quickstart", *TINY, "sparsity=0.5", "model.options.width=4,-1", "hydra/launcher=submitit_local"]
    command = [sys.executable, str(ROOT / "scripts" / "reproduce.py"), *arguments]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 1, ended.stderr
    (failed,) = [line for line in ended.stderr.splitlines() if line.startswith("failed: ")]
    assert "model.options.width=-1" in failed
    assert "1 of 2 runs are finished" in ended.stdout
    (result,) = tmp_path.glob("runs/quickstart/*/result.json")
    assert read_json(result)["target_sparsity"] == 0.5


def test_without_a_cluster_slurm_is_refused_in_one_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    from scripts import reproduce

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert reproduce.main(["quickstart", "hydra/launcher=slurm"]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert "srun" in told.err
    assert not (tmp_path / "runs" / "quickstart").exists()
    assert reproduce.main(["quickstart", "hydra/launcher=joblib"]) == 2
    assert "hydra/launcher=joblib is unknown" in capsys.readouterr().err


def test_a_requeued_job_has_saved_and_starts_the_same_run(tmp_path: Path, monkeypatch) -> None:
    """What submitit does when a job's time is nearly up: it asks for what to call next time, then queues that."""
    from engine.submission import Training

    monkeypatch.chdir(tmp_path)
    overrides = [*TINY, "trainer.max_steps=100000", "trainer.epochs=1000", "trainer.checkpoint_every=1000", "run_dir=r"]
    training, ended, handler = Training(), [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # not possible in a thread
    thread = threading.Thread(target=lambda: ended.append(training(overrides)))
    thread.start()
    deadline = time.monotonic() + 120
    log = tmp_path / "r" / "metrics.jsonl"
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:  # until it trains
        time.sleep(0.05)
    again = training.checkpoint(overrides)
    thread.join(60)
    assert ended[0][0] == 75
    assert len(list((tmp_path / "r").glob("checkpoint_*.pt"))) == 1
    assert isinstance(again.function, Training)
    assert again.args == (overrides,)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_the_composed_launcher_leaves_the_run_directory_alone() -> None:
    from engine.config import prepare, run_directory

    plain, submitted = (run_directory(prepare(compose(*o))) for o in ([], ["hydra/launcher=slurm"]))
    assert plain == submitted
    assert "SUBMITIT_EXECUTOR" not in os.environ
