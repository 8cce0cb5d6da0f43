"""The networks of the benchmark, and where their zeros come from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import feather
from models import create_model, load_weights

SHAPES = {
    "resnet20": (3, 32, 32),
    "mobilenet_v1": (3, 32, 32),
    "densenet40_24": (3, 32, 32),
    "resnet50": (3, 224, 224),
}
CLASSES = {"resnet50": 10}  # Imagenette's; the others have CIFAR-100's
RESULTS = Path(__file__).resolve().parents[2] / "results" / "runs"
# Finished runs of the same network at full size: no weights of theirs are kept, but how many zeros each layer has.
TRAINED_SHARES = {("resnet20", 0.98): "cifar100_short/resnet20-cifar100-feather-0.98-0-330a9bda"}


@dataclass(frozen=True)
class Subject:
    """A network in eval mode; ``origin`` says how it got its zeros."""

    model: nn.Module
    shape: tuple[int, int, int]
    origin: str


def open_subject(name: str, sparsity: float, runs: Path) -> Subject:
    """The network trained at this sparsity, ``runs/NAME-SPARSITY``, or else the dense one pruned to it.

    Where no run at a sparsity is at hand, the trained dense weights of ``runs/NAME-0`` are pruned by magnitude within
    each layer: to the layer's share of zeros in a finished run of ``results/runs``, or to that of ERK, which leaves
    about the multiplications that trained sparse networks have (ResNet-20 at 98 %: 5.39 million, against 5.29 million
    of the finished run).
    """
    run = runs / f"{name}-{sparsity:g}"
    trained = (run / "result.json").exists()
    source = run if trained else runs / f"{name}-0"
    try:
        result = json.loads((source / "result.json").read_text())
    except OSError:
        raise SystemExit(
            f"{source} holds no finished run: see docs/deployment.md for the command that trains it"
        ) from None
    model: nn.Module = create_model(name, num_classes=CLASSES.get(name, 100))
    load_weights(model, source / "model.safetensors")
    label = f"{result['method']}, {result['label']}"
    if sparsity and not trained:
        finished = TRAINED_SHARES.get((name, sparsity))
        if finished:
            prune_like(model, RESULTS / finished / "result.json")
        else:
            prune(model, sparsity)
        like = f"those of results/runs/{finished}" if finished else "ERK's"
        return Subject(model.eval(), SHAPES[name], f"{label}, then pruned by magnitude to layer-wise shares: {like}")
    return Subject(model.eval(), SHAPES[name], f"trained: {label}")


def prune_like(model: nn.Module, result: Path) -> None:
    """Magnitude pruning within each layer to the number of zeros that a finished run has there, in place."""
    zeros = {layer["name"]: int(layer["zeros"]) for layer in json.loads(result.read_text())["layers"]}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if zeros.get(name):
                weight.view(-1)[weight.abs().flatten().argsort()[: zeros[name]]] = 0


def prune(model: nn.Module, sparsity: float) -> None:
    """One-shot magnitude pruning to ERK's layer-wise shares, in place."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options: dict[str, Any] = {"framework": "erk", "schedule": "one_shot", "total_steps": 1}
    sparsifier = feather.create("gmp", model, optimizer, sparsity=sparsity, **options)
    optimizer.step()
    sparsifier.finalize()
