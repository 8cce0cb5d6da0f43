"""Every file of conf/experiment runs for a few steps, composed as it says with nothing but sizes changed."""

import hashlib
import pickle
from itertools import cycle, islice
from pathlib import Path

import hydra
import numpy as np
import pytest
import torchvision
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from engine.config import prepare
from tests.train_helpers import CONF, compose, read_json, read_metrics

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
SIZES = ("trainer.max_steps=2", "trainer.batch_size=4", "trainer.log_every=1", "trainer.device=cpu", "logger=none")


def sweep(experiment: str) -> list[list[str]]:
    """Jobs of the experiment's sweep, as few as bring every value up once."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", [f"experiment={experiment}"], return_hydra_config=True)
    values = {key: str(value).split(",") for key, value in (cfg.hydra.sweeper.params or {}).items()}
    jobs = max((len(v) for v in values.values()), default=1)
    columns = [[f"{key}={value}" for value in islice(cycle(v), jobs)] for key, v in values.items()]
    return [[f"experiment={experiment}", *job] for job in (zip(*columns, strict=True) if columns else [()])]


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10 and CIFAR-100 in the official layout and an ImageFolder tree, of a few random images each."""
    random = np.random.RandomState(0)
    for source, label in ((torchvision.datasets.CIFAR100, "fine_labels"), (torchvision.datasets.CIFAR10, "labels")):
        folder = tmp_path / source.base_folder
        folder.mkdir()
        for name, n in (("train", 12), ("test", 6)):
            content = {"data": random.randint(0, 256, (n, 3072), dtype=np.uint8), label: [i % 3 for i in range(n)]}
            (folder / name).write_bytes(pickle.dumps(content))
        meta = folder / source.meta["filename"]
        meta.write_bytes(pickle.dumps({source.meta["key"]: ["a", "b", "c"]}))
        monkeypatch.setattr(source, "train_list", [["train", md5(folder / "train")]])
        monkeypatch.setattr(source, "test_list", [["test", md5(folder / "test")]])
        monkeypatch.setattr(source, "meta", {**source.meta, "md5": md5(meta)})
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                image = Image.fromarray(random.randint(0, 256, (40, 50, 3), dtype=np.uint8))
                image.save(tmp_path / split / name / f"{number}.JPEG")
    return tmp_path


def test_every_sweep_brings_up_valid_jobs() -> None:
    for experiment in EXPERIMENTS:
        for job in sweep(experiment):
            cfg = prepare(compose(*job))
            assert cfg.experiment_name != "default"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs(experiment: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train

    monkeypatch.chdir(tmp_path)
    seen = set()
    for job in sweep(experiment):
        chosen = prepare(compose(*job))
        network = (chosen.model.name, chosen.sparsity == 0)
        if network in seen:  # each network sparse, and dense where the experiment has it
            continue
        seen.add(network)
        sizes = [*SIZES, "dataset.workers=0", f"dataset.root={data}", f"run_dir={len(seen)}"]
        if chosen.dataset.name.startswith("imagenet"):
            sizes.append("dataset.image_size=32")
        train.start(compose(*job, *sizes))
        run, result = Path(str(len(seen))), read_json(Path(str(len(seen))) / "result.json")
        assert result["experiment"] == chosen.experiment_name
        assert (result["model"], result["dataset"]) == (chosen.model.name, chosen.dataset.name)
        assert result["method"] == chosen.method.name
        assert result["target_sparsity"] == chosen.sparsity
        assert result["achieved_sparsity"] == pytest.approx(chosen.sparsity, abs=1e-4)
        assert [record["step"] for record in read_metrics(run)] == [1, 2]
    assert seen
