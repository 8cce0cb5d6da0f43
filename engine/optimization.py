"""The optimizer's parameter groups and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from engine.config import LRScheduleConfig, OptimizerConfig


def create_optimizer(model: nn.Module, cfg: OptimizerConfig, *, captured: bool = False) -> torch.optim.Optimizer:
    """SGD or AdamW with weight decay on weights alone: parameters of one dimension (biases, norms) have none.

    Args:
        model: on its device.
        cfg: which, and with what.
        captured: keep the learning rate on the device, where steps that are recorded read it.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    lr: float | torch.Tensor = cfg.lr
    how = {"foreach": True}
    if captured:  # only the fused ones take a learning rate that the host does not read
        lr, how = torch.tensor(cfg.lr, device=trained[0].device), {"fused": True}
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, capturable=captured, **how)
    return torch.optim.SGD(groups, lr=lr, momentum=cfg.momentum, nesterov=cfg.nesterov, **how)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Of all groups, for the coming step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


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
