"""What a run says about itself: the sparsity part of a metrics record and ``result.json``."""

from __future__ import annotations

import hashlib
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from engine.config import Config
from feather import FlopsReport, SparsityReport, default_framework

FORMAT = 1


def sparsity_record(report: SparsityReport) -> dict[str, float]:
    """``sparsity/global``, ``sparsity/layer/<name>`` and the thresholds: one value where all layers share it."""
    record = {"sparsity/global": report.sparsity}
    record |= {f"sparsity/layer/{layer.name}": layer.sparsity for layer in report.layers}
    thresholds = {layer.name: layer.threshold for layer in report.layers if layer.threshold is not None}
    if len(set(thresholds.values())) == 1:
        record["threshold/global"] = next(iter(thresholds.values()))
    else:
        record |= {f"threshold/layer/{name}": threshold for name, threshold in thresholds.items()}
    return record


def describe_result(
    cfg: Config,
    *,
    report: SparsityReport,
    flops: FlopsReport,
    device: torch.device,
    model_file: Path,
    p: float | None,
    surroundings: dict[str, Any],
    **figures: Any,
) -> dict[str, Any]:
    """The content of ``result.json``: what was asked for, what came out, where, and the command that makes it again.

    Args:
        cfg: the prepared configuration.
        report, flops: of the final model.
        device: that the run used.
        model_file: the final weights, whose SHA-256 is recorded.
        p: order of the operator; infinity, which JSON lacks, is written as "inf".
        surroundings: ``engine.records.environment()`` as the run began.
        figures: further entries, taken as they are.
    """
    hardware = surroundings["hardware"]
    return {
        "format": FORMAT,
        "experiment": cfg.experiment_name,
        "model": cfg.model.name,
        "dataset": cfg.dataset.name,
        "method": cfg.method.name,
        "framework": default_framework(cfg.method.name) if cfg.framework.name == "auto" else cfg.framework.name,
        "modifier": cfg.modifier,
        "p": "inf" if p is not None and math.isinf(p) else p,
        "label": cfg.label,
        "seed": cfg.seed,
        "batch_size": cfg.trainer.batch_size,
        "target_sparsity": cfg.sparsity,
        "achieved_sparsity": report.sparsity,
        "zeros": report.zeros,
        "nonzeros": report.nonzeros,
        "prunable": report.prunable,
        "flops": flops.sparse,
        "dense_flops": flops.dense,
        "device": hardware["gpu"] if device.type == "cuda" else hardware["cpu"],
        **figures,
        **surroundings,
        "command": shlex.join(["python", "train.py", *_overrides(cfg)]),
        "model_sha256": hashlib.sha256(model_file.read_bytes()).hexdigest(),
        "layers": [{"name": layer.name, "size": layer.size, "zeros": layer.zeros} for layer in report.layers],
    }


def _overrides(cfg: Config) -> list[str]:
    """What was typed for this very run: in a sweep, this job's values."""
    from hydra.core.hydra_config import HydraConfig

    if HydraConfig.initialized():
        return list(HydraConfig.get().overrides.task)
    return sys.argv[1:]
