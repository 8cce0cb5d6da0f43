"""The optimizer's parameter groups and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from engine.config import LRScheduleConfig, OptimizerConfig


def create_optimizer(model: nn.Module, cfg: OptimizerConfig) -> torch.optim.Optimizer:
    """SGD or AdamW with weight decay on weights alone: parameters of one dimension (biases, norms) have none."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.lr, foreach=True)
    return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov, foreach=True)


def learning_rate(step: int, total_steps: int, steps_per_epoch: int, lr: float, cfg: LRScheduleConfig) -> float:
    """The learning rate of optimizer step ``step``, counted from 0: linear warm-up, then cosine to 0 or constant."""
    if cfg.authors_lag:
        step = max(step - 1, 0)
    warmup = min(round(cfg.warmup_epochs * steps_per_epoch), total_steps)
    if step < warmup:
        return lr * (step + 1) / warmup
    if cfg.name == "constant":
        return lr
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total_steps - warmup, 1)))
