"""Made-up finished runs in the format that train.py leaves."""

import json
import math
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
    theta: str | float = "auto",
    p: float | None = 3.0,
    label: str = "",
    mask_change: float = 0.01,
    config: dict | None = None,
    **overrides: object,
) -> Path:
    """Write one run below `root`/<experiment> and return its directory; `overrides` replace keys of result.json."""
    directory = root / experiment / f"{model}-{dataset}-{method}-{sparsity:g}-{seed}-{abs(hash_of(locals())):08x}"
    directory.mkdir(parents=True)
    layers = []
    flatter = 0.5 if framework == "asl_plus" else 1.0  # so that frameworks differ layer by layer
    for depth, (name, size) in enumerate(LAYERS):
        zeros = int(size * sparsity ** (2 - flatter * depth / 4)) if depth else int(size * sparsity / 2)
        layers.append({"name": name, "size": size, "zeros": zeros})
    prunable = sum(layer["size"] for layer in layers)
    missing = round(sparsity * prunable) - sum(layer["zeros"] for layer in layers)
    for layer in reversed(layers):  # the last layers meet the target
        zeros = min(max(layer["zeros"] + missing, 0), layer["size"])
        layer["zeros"], missing = zeros, missing - (zeros - layer["zeros"])
    nonzeros = prunable - sum(layer["zeros"] for layer in layers)
    result = {
        "format": 1,
        "experiment": experiment,
        "model": model,
        "dataset": dataset,
        "method": method,
        "framework": framework,
        "p": p if p is None or math.isfinite(p) else "inf",
        "theta": (0.5 if sparsity > 0.95 else 1.0) if theta == "auto" else theta,
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
        "label": label,
        "model_sha256": "0" * 64,
    } | overrides
    settings = {
        "experiment_name": experiment,
        "seed": seed,
        "sparsity": sparsity,
        "model": {"name": model, "pretrained": False, "weights": None, "options": {}},
        "dataset": {"name": dataset},
        "method": {"name": method, "p": p, "theta": theta},
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
                "sparsity/target": min(1.0, 2 * epoch / epochs) * sparsity,
                "sparsity/mask_change": mask_change * 0.5**epoch,
            }
        )
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def write_comparison(root: Path, experiment: str = "table", seeds: int = 3, **settings: object) -> None:
    """Several methods, frameworks and thetas at four sparsities beside the dense run, each with `seeds` seeds."""
    rows = [
        {"method": "feather"},
        {"method": "feather", "framework": "asl_plus", "shift": 0.4},
        {"method": "feather", "theta": 1.0, "shift": -0.5, "mask_change": 0.04},
        {"method": "feather", "theta": 0.3, "shift": -0.9, "mask_change": 0.005},
        {"method": "ste", "p": math.inf, "theta": 1.0, "shift": -1.0},
        {"method": "gmp", "p": math.inf, "theta": 0.0, "shift": -2.5, "mask_change": 1e-4},
        {"method": "st3", "p": 1.0, "theta": 1.0, "shift": -1.5},
        {"method": "acdc", "p": None, "theta": None, "shift": 0.1},
    ]
    for seed in range(seeds):
        write_run(
            root, experiment=experiment, method="dense", sparsity=0.0, seed=seed, top1=70 + 0.2 * seed, **settings
        )
        for sparsity, base in ((0.9, 69.0), (0.95, 67.0), (0.98, 62.0), (0.99, 54.0)):
            for i, row in enumerate(rows):
                own = {key: value for key, value in row.items() if key != "shift"}
                noise = 0.3 * math.sin(7 * seed + 3 * i + 100 * sparsity)
                top1 = round(base + row.get("shift", 0.0) * (1 + 10 * (sparsity - 0.9)) + 0.2 * seed + noise, 2)
                write_run(root, experiment=experiment, sparsity=sparsity, seed=seed, top1=top1, **own, **settings)


def hash_of(values: dict) -> int:
    """A number that differs between different settings and is the same in every process."""
    plain = sorted(
        (k, str(v)) for k, v in values.items() if isinstance(v, (str, int, float, dict)) and k != "directory"
    )
    return sum((i + 1) * ord(c) for i, c in enumerate(str(plain))) % 2**32
