"""AC/DC, https://arxiv.org/abs/2106.12379: alternating compressed and decompressed training.

Dense for the first 10 % of training, then sparse and dense phases of 5 % each; the last dense phase is 75-85 %, and
from there on the network stays sparse. A sparse phase starts with the projection of the weights onto the global top-k
of the full target (pruned weights become 0) and keeps its mask; a dense phase lets all weights move again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from feather.frameworks import Framework
from feather.method import Method
from feather.schedule import Schedule


class ACDC(Method):
    """Phases of hard, fixed masks and of dense training."""

    identity_backward = False

    def __init__(self, schedule: Schedule, framework: Framework, total_steps: int) -> None:
        self.sparsity = schedule.target
        self.framework = framework
        self.total_steps = total_steps
        self.masks: list[Tensor] = []  # True where a weight is kept; of the sparse phase that is on

    def scheduled_sparsity(self, step: int) -> float:
        return self.sparsity if is_sparse_phase(step / self.total_steps) else 0.0

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor], step: int) -> None:
        sparse = self.scheduled_sparsity(step) > 0
        if sparse and not self.active:
            thresholds = self.framework.thresholds(weights, self.sparsity)
            self.masks = [~(w.abs() <= t) for w, t in zip(weights, thresholds, strict=True)]
        self.active = sparse
        if not sparse:
            return
        self.masks = [mask.to(weight.device) for mask, weight in zip(self.masks, weights, strict=True)]
        for mask, weight in zip(self.masks, weights, strict=True):
            weight.masked_fill_(~mask, 0)

    def forward(self, weights: Sequence[Tensor]) -> Iterable[Tensor]:
        if not self.active:
            return weights
        return (weight.masked_fill(~mask, 0) for mask, weight in zip(self.masks, weights, strict=True))

    def backward(self, index: int, grad: Tensor, sparse_weight: Tensor) -> Tensor:
        return grad.masked_fill(~self.masks[index], 0) if self.active else grad

    def expected_zeros(self, shapes: Sequence[Sequence[int]]) -> int:
        return self.framework.zeros(shapes, self.sparsity)

    def settings(self) -> dict[str, Any]:
        return {"sparsity": self.sparsity, "framework": type(self.framework).__name__}

    def state_dict(self) -> dict[str, Any]:
        return {"active": self.active, "masks": self.masks if self.active else []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.active = bool(state["active"])
        self.masks = [mask.to(torch.bool) for mask in state["masks"]]


def is_sparse_phase(fraction: float) -> bool:
    """Whether training is sparse after ``fraction``, in [0, 1], of its steps."""
    if fraction < 0.10:
        return False
    if fraction < 0.75:
        return math.floor((fraction - 0.10) / 0.05 + 1e-9) % 2 == 0
    return fraction >= 0.85
