"""Mistakes on the command line end with one sentence, before anything is written; help answers at once."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train_helpers import CONF, TRAIN, command, read_json

# what is typed, and what the sentence must contain: what is wrong and what would be right
MISTAKES = {
    "sparsity=1": ["sparsity=1", "[0, 1)"],
    "sparsity=-0.1": ["sparsity=-0.1", "[0, 1)"],
    "sparsity=nan": ["sparsity=nan", "[0, 1)"],
    "sparsity=many": ["sparsity=many", "must be a number"],
    "sparsity": ["sparsity has no value", "sparsity=VALUE"],
    "sparsitty=0.9": ["sparsitty is not an option", "did you mean sparsity?"],
    "trainer.epoch=3": ["trainer.epoch is not an option", "did you mean trainer.epochs?"],
    "+model.depth=3": ["model.depth is not an option", "--cfg job"],
    "trainer.epochs=0": ["trainer.epochs=0", "at least 1"],
    "trainer.epochs=2.5": ["trainer.epochs=2.5", "must be an integer"],
    "trainer.compile=maybe": ["trainer.compile=maybe", "true or false"],
    "trainer.precision=fp8": ["trainer.precision=fp8", "auto, fp32, bf16, fp16"],
    "trainer.device=tpu": ["trainer.device=tpu", "auto, cpu, cuda"],
    "trainer.accumulate=0": ["trainer.accumulate=0", "[1, batch_size]"],
    "trainer=fast": ["trainer=fast is unknown", "default, deterministic"],
    "dataset=cifar1000": ["dataset=cifar1000 is unknown", "cifar100"],
    "method=fether": ["method=fether is unknown", "feather"],
    "framework=gobal": ["framework=gobal is unknown", "global"],
    "experiment=cifar": ["experiment=cifar is unknown", "cifar100_table"],
    "+experiment=first_three": ["experiment", "write experiment=first_three"],
    "method.p=0.5": ["method.p=0.5", "[1, inf]"],
    "method.theta=half": ["method.theta=half", "[0, 1] or auto"],
    "method.theta=-0.1": ["method.theta=-0.1", "[0, 1] or auto"],
    "method=rigl framework=global": ["framework='global'", "method='rigl'", "erk or uniform"],
    "method=gmp method.theta=1": ["theta=1", "method='gmp'"],
    "method=dense sparsity=0.9": ["method=dense", "sparsity=0.9", "leave one of them out"],
    "method.exclude=[nothing*]": ["'nothing*' matches no weight", "conv1.weight"],
    "method.exclude=conv1": ["method.exclude=conv1", "[a,b]"],
    "optimizer.lr=0": ["optimizer.lr=0", "greater than 0"],
    "optimizer.nesterov=true optimizer.momentum=0": ["optimizer.nesterov", "optimizer.momentum greater than 0"],
    "sparsity_schedule.start_fraction=0.9": ["sparsity_schedule.end_fraction=0.5", "[start_fraction, 1]"],
    "seed=-1": ["seed=-1", "[0, 2^32)"],
    "seed=0,1": ["seed=0,1", "add -m"],
    "seed=": ["seed=", "an integer"],
    "=3": ["=3", "KEY=VALUE"],
    "--frob": ["--frob", "--help"],
    "dataset.image_size=32": ["image_size=32", "16 pixels"],
    "dataset.validation=1": ["dataset.validation=1", "[0, 1)"],
    "dataset=cifar100 dataset.download=false": ["lacks train", "dataset.download=true"],
    "dataset=imagenet": ["data/imagenet/train does not exist", "dataset.root"],
    "model=resnet2O": ["'resnet2O'", "did you mean", "resnet20"],
    "model.weights=missing.pt": ["missing.pt does not exist", ".safetensors"],
    "model.weights=a.pt model.pretrained=true": ["model.pretrained", "model.weights", "one of them"],
    "model.pretrained=true": ["resnet20 has no published weights", "model.weights="],
    "model.options.widht=16": ["resnet20 has no option 'widht'", "spelling"],
    "time_limit_minutes=0": ["time_limit_minutes=0", "greater than 0"],
    "run_dir=/proc/nowhere trainer.max_steps=1": ["run_dir=/proc/nowhere cannot be written", "another folder"],
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_ends_with_one_sentence(typed: str, tmp_path: Path) -> None:
    ended = command(*typed.split(), "logger=none", cwd=tmp_path)
    assert ended.status > 0
    assert ended.out == ""
    assert len(ended.err.splitlines()) == 1
    assert ended.err.endswith((".\n", "?\n"))
    for part in MISTAKES[typed]:
        assert part in ended.err
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".process")]


def test_in_a_sweep_a_mistake_spares_the_other_jobs(tmp_path: Path) -> None:
    sizes = ["model.options.width=4", "debug=few_steps", "trainer.max_steps=1", "trainer.device=cpu", "logger=none"]
    ended = command(*sizes, "-m", "sparsity=1.5,0.5", cwd=tmp_path)
    assert ended.status == 1
    assert "Traceback" not in ended.err
    assert [line for line in ended.err.splitlines() if "sparsity=1.5 is out of range" in line]
    (result,) = tmp_path.glob("runs/default/*/result.json")
    assert read_json(result)["target_sparsity"] == 0.5
    assert "sparsity=0.5" in read_json(result)["command"]


def test_a_sweep_without_a_run_is_refused(tmp_path: Path) -> None:
    ended = command("-m", "seed=range(0,0)", cwd=tmp_path)
    assert ended.status == 1
    assert ended.err == "seed=range(0,0) has no runs: give seed at least one value.\n"


def test_a_run_dir_is_refused_for_a_sweep(tmp_path: Path) -> None:
    ended = command("run_dir=here", "-m", "seed=0,1", cwd=tmp_path)
    assert ended.status == 1
    assert ended.err.count("run_dir= names one directory and a sweep needs one per run: leave it out.") == 2
    assert not (tmp_path / "here").exists()


def test_help_answers_without_torch_and_lists_every_group() -> None:
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", str(TRAIN), "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert time.monotonic() - started < 30  # half a second where nothing else runs
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if line.startswith("import time")}
    assert "hydra" in imported
    assert not imported & {"torch", "numpy", "wandb", "torchvision", "feather"}
    for group in (path for path in CONF.iterdir() if path.is_dir() and path.name != "hydra"):  # hydra/: its launchers
        (line,) = [line for line in ended.stdout.splitlines() if line.startswith(f"{group.name}: ")]
        assert line == f"{group.name}: {', '.join(sorted(path.stem for path in group.glob('*.yaml')))}"
    for word in ("sparsity=", "seed=", "run_dir=", "torchrun", "--cfg job"):
        assert word in ended.stdout
    hydras = subprocess.run(
        [sys.executable, str(TRAIN), "seed=0", "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout.rstrip() == hydras.stdout.rstrip(), "Hydra's own, which takes seconds"
