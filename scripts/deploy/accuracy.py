"""Finished runs of train.py as C: is the accuracy that of PyTorch, with fp32 and with int8 weights; time and size."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from engine.data import create_data
from feather.deploy import compile_model, load, save_weights
from feather.deploy.sources import open_model

MOST = 2000  # images of the evaluation split that the C code classifies


def measure(run: Path, work: Path) -> list[dict[str, Any]]:
    """One row for fp32, one for int8 weights."""
    result = json.loads((run / "result.json").read_text())
    subject = open_model(run)
    images, labels = _images(run)
    model = subject.model
    assert isinstance(model, torch.nn.Module)
    with torch.no_grad():
        expected = torch.cat([model(part) for part in images.split(250)]).argmax(1)
    rows = []
    for weights in ("fp32", "int8"):
        directory = work / "accuracy" / run.name
        library = compile_model(model, subject.input_shape, directory, name=f"net_{weights}", weights=weights).library
        assert library is not None
        compiled = load(library)
        found = torch.from_numpy(compiled(images.numpy()).argmax(1))
        image = images[:1].numpy()
        times = []
        for _ in range(300):
            start = time.perf_counter_ns()
            compiled(image)
            times.append((time.perf_counter_ns() - start) / 1e3)
        bitmask = save_weights(model, directory / f"net_{weights}.feather", values=weights)
        rows.append({
            "run": run.name, "config_hash": result["config_hash"], "git_commit": result["git_commit"],
            "model": result["model"], "dataset": result["dataset"], "method": result["method"],
            "label": result["label"], "sparsity": result["target_sparsity"], "final_top1": result["final_top1"],
            "weights": weights, "images": len(images),
            "top1": 100 * float((found == labels).float().mean()),
            "torch_top1": 100 * float((expected == labels).float().mean()),
            "same_class": 100 * float((found == expected).float().mean()),
            "microseconds": statistics.median(times), "library_bytes": library.stat().st_size,
            "bitmask_bytes": bitmask.file, "index_bytes": bitmask.index, "index_bound_bytes": bitmask.index_bound,
            "dense_bytes": bitmask.dense, "dense_compressed_bytes": bitmask.dense_compressed,
        })  # fmt: skip
        print({key: rows[-1][key] for key in ("run", "weights", "top1", "torch_top1", "microseconds")}, flush=True)
    return rows


def _images(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images of the split that the run evaluated, normalised, and their classes."""
    dataset = yaml.safe_load((run / "config.yaml").read_text())["dataset"]
    data = create_data(
        dataset["name"], root=dataset["root"], batch_size=250, seed=0, device="cpu",
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
