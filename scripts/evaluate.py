"""Evaluate a saved model: loss, top-1, zeros and FLOPs. The network is built plainly; feather only counts.

    python scripts/evaluate.py runs/EXPERIMENT/RUN                         what the run's config.yaml says
    python scripts/evaluate.py model.safetensors --model resnet20 --dataset cifar100

Exit status: 0 evaluated; 2 with one sentence where the model or its data cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine import script  # noqa: E402

MODEL = "model.safetensors"
# What of a run's data settings shapes its evaluation set.
_DATASET_OPTIONS = ("image_size", "validation", "workers")


class UsageError(ValueError):
    """What the user asked for cannot be done; the message is one sentence."""


@dataclass(frozen=True)
class Subject:
    """A model file and what it takes to build the network and its data."""

    weights: Path
    model: str
    dataset: str
    root: str = "data"
    model_options: dict[str, Any] = field(default_factory=dict)
    dataset_options: dict[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] = ()  # names of the prunable weights; empty: every default one
    batch_size: int = 256
    precision: str = "fp32"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help=f"run directory, or a .safetensors file such as its {MODEL}")
    parser.add_argument("--model", help="network, such as resnet20 (default: the run's)")
    parser.add_argument("--dataset", help="data set, such as cifar100 (default: the run's)")
    parser.add_argument("--num-classes", type=int, help="classes of the network (default: the data set's)")
    parser.add_argument("--root", help="directory of the data (default: the run's, or data)")
    parser.add_argument("--batch-size", type=int, help="images per forward pass (default: the run's, or 256)")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], help="default: the run's, or fp32")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    for name in ("num_classes", "batch_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; expected at least 1")
    return options


def _from_run(directory: Path) -> Subject:
    """What ``config.yaml``, and ``result.json`` where the run has finished, say of a run's model."""
    import yaml

    config_path = directory / "config.yaml"
    if not (directory / MODEL).exists():
        raise UsageError(f"{directory} has no {MODEL}: finish the run first, or name a .safetensors file.")
    try:
        config = yaml.safe_load(config_path.read_text())
        model, dataset = dict(config["model"]), dict(config["dataset"])
        names = str(model["name"]), str(dataset["name"])
        trainer = config.get("trainer") or {}
        result_path = directory / "result.json"
        result = json.loads(result_path.read_text()) if result_path.exists() else {}
        layers = tuple(layer["name"] for layer in result.get("layers", ()))
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError):
        raise UsageError(
            f"The config.yaml or result.json of {directory} is damaged: "
            f"evaluate {directory / MODEL} with --model and --dataset instead."
        ) from None
    return Subject(
        directory / MODEL,
        *names,
        root=str(dataset.get("root") or "data"),
        model_options=dict(model.get("options") or {}),
        dataset_options={k: dataset[k] for k in _DATASET_OPTIONS if dataset.get(k) is not None},
        layers=layers,
        batch_size=int(trainer.get("eval_batch_size") or 256),
        precision=str(result.get("precision") or trainer.get("precision") or "fp32"),
    )


def find_subject(options: argparse.Namespace) -> Subject:
    """The model that the arguments name, with their changes.

    Raises:
        UsageError: it does not exist, or more must be said about it.
    """
    path: Path = options.path
    if path.is_dir():
        subject = _from_run(path)
    elif not path.exists():
        raise UsageError(f"{path} does not exist; expected a run directory or a .safetensors file.")
    elif path.suffix != ".safetensors":
        raise UsageError(f"{path} is no model: expected a run directory or a .safetensors file.")
    elif options.model is None or options.dataset is None:
        raise UsageError(f"{path} alone does not say what it is: add --model and --dataset.")
    else:
        subject = Subject(path, options.model, options.dataset)
    changes = {
        name: value
        for name in ("model", "dataset", "root", "batch_size", "precision")
        if (value := getattr(options, name)) is not None
    }
    if changes.get("model", subject.model) != subject.model:
        changes |= {"model_options": {}, "layers": ()}
    if changes.get("dataset", subject.dataset) != subject.dataset:
        changes |= {"dataset_options": {}}
    return Subject(**{**subject.__dict__, **changes})


def evaluate_subject(subject: Subject, device_name: str, num_classes: int | None) -> dict[str, Any]:
    """Load, evaluate and count; the numbers as printed by ``--json``.

    Raises:
        UsageError: the model, its data or the device cannot be had.
    """
    # Heavy imports come after the arguments have been checked.
    import torch

    from engine.data import DataError, create_data
    from engine.evaluate import evaluate
    from engine.precision import resolve_precision
    from feather.report import count_flops, sparsity_report
    from feather.selection import prunable_parameters
    from models import create_model, load_weights

    if device_name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda needs a CUDA GPU and there is none: use --device cpu.")
    device = torch.device("cuda" if device_name != "cpu" and torch.cuda.is_available() else "cpu")
    try:
        precision = resolve_precision(subject.precision, device)
        data = create_data(
            subject.dataset,
            root=subject.root,
            batch_size=subject.batch_size,
            seed=0,
            device=device,
            **subject.dataset_options,
        )
        classes = num_classes or data.num_classes
        if classes < data.num_classes:
            raise UsageError(f"--num-classes is {classes}, but {subject.dataset} has {data.num_classes} classes.")
        model = create_model(subject.model, num_classes=classes, **subject.model_options)
        if load_weights(model, subject.weights):
            raise UsageError(f"{subject.weights} does not have {classes} classes: say how many with --num-classes.")
        parameters = dict(model.named_parameters())
        unknown = [name for name in subject.layers if name not in parameters]
        if unknown:
            raise UsageError(f"result.json names the weight {unknown[0]}, which {subject.model} does not have.")
        prunable = {name: parameters[name] for name in subject.layers} or prunable_parameters(model)
    except (DataError, OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    zeros = sparsity_report(prunable)
    flops = count_flops(model, torch.zeros(1, *data.image_shape))
    loss, top1 = evaluate(model.to(device), data.eval.epoch(0), autocast=precision.autocast)
    return {
        "weights": str(subject.weights),
        "model": subject.model,
        "dataset": subject.dataset,
        "split": data.eval_split,
        "images": data.eval.num_samples,
        "precision": precision.name,
        "top1": top1,
        "loss": loss,
        "sparsity": zeros.sparsity,
        "nonzeros": zeros.nonzeros,
        "prunable": zeros.prunable,
        "flops": flops.sparse,
        "dense_flops": flops.dense,
    }


def as_text(found: dict[str, Any]) -> str:
    evaluation = f"{found['split']}, {found['images']:,} images, {found['precision']}"
    return "\n".join(
        [
            f"{found['model']} on {found['dataset']} ({evaluation})",
            f"  top-1      {found['top1']:.2f} %",
            f"  loss       {found['loss']:.4f}",
            f"  sparsity   {100 * found['sparsity']:.4f} %",
            f"  non-zeros  {found['nonzeros']:,} of {found['prunable']:,} prunable weights",
            f"  FLOPs      {found['flops'] / 1e6:.1f} M of {found['dense_flops'] / 1e6:.1f} M multiply-accumulates",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        found = evaluate_subject(find_subject(options), options.device, options.num_classes)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(found) if options.json else as_text(found))
    return 0


if __name__ == "__main__":
    script.run(main)
