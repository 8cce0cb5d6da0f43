"""Made-up finished runs in the format that train.py leaves."""

import json
from pathlib import Path

import yaml

LAYERS = [("conv1.weight", 864), *[(f"layer{i // 2 + 1}.{i % 2}.conv.weight", 9216 * (i + 1)) for i in range(6)]]


def write_run(
    root: Path,
    *,
    experiment: str = "table",
    model: str = "resnet20",
    dataset: str = "cifar100",
    method: str = "feather",
    framework: str = "global",
    sparsity: float = 0.9,
    seed: int = 0,
    top1: float = 60.0,
    epochs: int = 4,
    precision: str = "fp32",
    theta: str = "auto",
    config: dict | None = None,
    **overrides: object,
) -> Path:
    """Write one run below `root`/<experiment> and return its directory; `overrides` replace keys of result.json."""
    directory = root / experiment / f"{model}-{dataset}-{method}-{sparsity:g}-{seed}-{abs(hash_of(locals())):08x}"
    directory.mkdir(parents=True)
    layers = []
    for depth, (name, size) in enumerate(LAYERS):
        zeros = int(size * sparsity ** (2 - depth / 4)) if depth else int(size * sparsity / 2)
        layers.append({"name": name, "size": size, "zeros": zeros})
    prunable = sum(layer["size"] for layer in layers)
    nonzeros = prunable - sum(layer["zeros"] for layer in layers)
    result = {
        "format": 1,
        "experiment": experiment,
        "model": model,
        "dataset": dataset,
        "method": method,
        "framework": framework,
        "p": 3.0,
        "theta": 0.5 if sparsity > 0.95 else 1.0,
        "seed": seed,
        "epochs": epochs,
        "batch_size": 128,
        "precision": precision,
        "target_sparsity": sparsity,
        "achieved_sparsity": 1 - nonzeros / prunable,
        "nonzeros": nonzeros,
        "prunable": prunable,
        "parameters": prunable + 100,
        "final_top1": top1,
        "best_top1": top1 + 0.5,
        "final_loss": 1.5,
        "flops": 40_000_000 * nonzeros // prunable,
        "dense_flops": 40_000_000,
        "layers": layers,
        "wall_seconds": 30.0 + seed,
        "images_per_second": 1000.0,
        "device": "cpu",
        "versions": {"torch": "2.15.0"},
        "git_commit": "0" * 40,
        "dirty": False,
        "config_hash": f"{abs(hash_of(locals())):08x}",
        "command": "python train.py",
        "label": "",
        "model_sha256": "0" * 64,
    } | overrides
    settings = {
        "experiment_name": experiment,
        "seed": seed,
        "sparsity": sparsity,
        "model": {"name": model, "pretrained": False, "weights": None, "options": {}},
        "dataset": {"name": dataset},
        "method": {"name": method, "p": 3, "theta": theta},
        "framework": {"name": framework},
        "optimizer": {"lr": 0.1},
        "trainer": {"epochs": epochs, "batch_size": 128, "precision": "auto"},
        "logger": {"name": "wandb"},
        "run_dir": str(directory),
    } | (config or {})
    (directory / "result.json").write_text(json.dumps(result))
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    lines = []
    for epoch in range(1, epochs + 1):
        zeros = min(1.0, 2 * epoch / epochs) * result["achieved_sparsity"]
        lines.append({"step": epoch * 10 - 5, "epoch": epoch - 0.5, "train/loss": 2.0})
        lines.append(
            {
                "step": epoch * 10,
                "epoch": epoch,
                "train/loss": 1.0,
                "val/top1": top1 * (1 - 0.5**epoch),
                "val/loss": 1.5,
                "sparsity/global": zeros,
                "sparsity/target": zeros,
            }
        )
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def hash_of(values: dict) -> int:
    """A number that differs between different settings and is the same in every process."""
    plain = sorted(
        (k, str(v)) for k, v in values.items() if isinstance(v, (str, int, float, dict)) and k != "directory"
    )
    return sum((i + 1) * ord(c) for i, c in enumerate(str(plain))) % 2**32
