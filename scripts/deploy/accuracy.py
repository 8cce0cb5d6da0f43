"""Finished runs of train.py as C, with fp32 and int8 weights: their accuracy, time and size beside dense runtimes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from engine.data import create_data
from feather.deploy import compile_model, load, save_weights
from feather.deploy.sources import open_model
from scripts.deploy import contenders
from scripts.deploy.timing import interleave, summary

MOST = 2000  # images of the evaluation split that the C code classifies
SECONDS = 5.0
RUNTIMES = ("onnxruntime", "openvino", "litert")
VALUES = ("fp32", "int8")


def prepare(run: Path, directory: Path) -> None:
    """Write what `measure` loads; what is there already stays."""
    if (directory / "files.json").exists():
        return
    subject = open_model(run)
    files = contenders.prepare(subject.model, subject.input_shape, directory, runtimes=True)
    for values in VALUES:
        compile_model(subject.model, subject.input_shape, directory, name=f"net_{values}", weights=values)
    (directory / "files.json").write_text(json.dumps({key: path.name for key, path in files.items()}))


def measure(run: Path, data: Path, directory: Path) -> list[dict[str, Any]]:
    """One row for fp32, one for int8 weights; the dense runtimes run the same weights, zeros included."""
    result = json.loads((run / "result.json").read_text())
    subject = open_model(run)
    images, labels = _images(run, data)
    model = subject.model
    assert isinstance(model, torch.nn.Module)
    with torch.no_grad():
        expected = torch.cat([model(part) for part in images.split(250)]).argmax(1)
    files = json.loads((directory / "files.json").read_text())
    libraries = {values: directory / f"net_{values}.so" for values in VALUES}
    runs = {name: contenders.contender(name, directory / files[name]) for name in RUNTIMES if name in files}
    runs |= {values: load(library) for values, library in libraries.items()}
    times = {key: summary(found) for key, found in interleave(runs, images[:1].numpy(), SECONDS).items()}
    fastest = min((name for name in RUNTIMES if name in runs), key=lambda name: times[name]["microseconds"])
    rows = []
    for values in VALUES:
        found = torch.from_numpy(runs[values](images.numpy()).argmax(1))
        bitmask = save_weights(model, directory / f"net_{values}.feather", values=values)
        rows.append({
            "run": run.name, "config_hash": result["config_hash"], "git_commit": result["git_commit"],
            "model": result["model"], "dataset": result["dataset"], "method": result["method"],
            "label": result["label"], "sparsity": result["target_sparsity"], "final_top1": result["final_top1"],
            "weights": values, "images": len(images),
            "top1": 100 * float((found == labels).float().mean()),
            "torch_top1": 100 * float((expected == labels).float().mean()),
            "same_class": 100 * float((found == expected).float().mean()), **times[values],
            "fastest_dense": fastest, "dense_microseconds": times[fastest]["microseconds"],
            "library_bytes": libraries[values].stat().st_size,
            "bitmask_bytes": bitmask.file, "index_bytes": bitmask.index, "index_bound_bytes": bitmask.index_bound,
            "dense_bytes": bitmask.dense, "dense_compressed_bytes": bitmask.dense_compressed,
        })  # fmt: skip
        print({key: rows[-1][key] for key in ("run", "weights", "top1", "torch_top1", "microseconds")}, flush=True)
    return rows


def _images(run: Path, root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images of the split that the run evaluated, normalised, and their classes."""
    dataset = yaml.safe_load((run / "config.yaml").read_text())["dataset"]
    data = create_data(
        dataset["name"], root=root, batch_size=250, seed=0, device="cpu",
        image_size=dataset["image_size"], validation=dataset["validation"],
    )  # fmt: skip
    images, labels, count = [], [], 0
    for batch in data.eval.epoch(0):
        images.append(batch.images)
        labels.append(batch.labels)
        count += len(batch.images)
        if count >= MOST:
            break
    return torch.cat(images)[:MOST], torch.cat(labels)[:MOST]
