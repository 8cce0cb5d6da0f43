"""RigL, https://arxiv.org/abs/1911.11134.

A sparse network from the first step, with constant non-zeros per layer (Erdos-Renyi-Kernel densities by default). Every
``interval`` steps until 75 % of training each layer drops the fraction

    f(t) = alpha / 2 (1 + cos(pi t / T_end)),   alpha = 0.3,   T_end = 0.75 * steps

of its active weights that is smallest in magnitude and grows as many where the dense gradient is largest; new weights
start at 0. The paper's interval is 100 steps; short runs take 1/500 of training, at least 5 steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from feather.frameworks import Layerwise
from feather.method import Method
from feather.quantile import zeros_at
from feather.schedule import Schedule


class RigL(Method):
    """Dynamic sparse training: drop by magnitude, grow by gradient."""

    identity_backward = False
    alpha = 0.3

    def __init__(self, schedule: Schedule, framework: Layerwise, total_steps: int) -> None:
        self.sparsity = schedule.target
        self.framework = framework
        self.interval = min(100, max(5, total_steps // 500))
        self.end_step = int(0.75 * total_steps)
        self.active = True
        self.masks: list[Tensor] = []  # True where a weight is active
        self._step = 0
        self._seed = 0
        self._scores: list[Tensor] = []  # of the growth that the coming update carries out

    def scheduled_sparsity(self, step: int) -> float:
        return self.sparsity

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor], step: int) -> None:
        self._step = step
        if not self.masks:
            self._start(weights)
        elif self._scores:
            fraction = self.alpha / 2 * (1 + math.cos(math.pi * step / self.end_step))
            for mask, weight, score in zip(self.masks, weights, self._scores, strict=True):
                drop_and_grow(mask, weight, score, fraction)
            self._scores = []
        self.masks = [mask.to(weight.device) for mask, weight in zip(self.masks, weights, strict=True)]
        for mask, weight in zip(self.masks, weights, strict=True):
            weight.masked_fill_(~mask, 0)

    def forward(self, weights: Sequence[Tensor]) -> Iterable[Tensor]:
        return (weight.masked_fill(~mask, 0) for mask, weight in zip(self.masks, weights, strict=True))

    def backward(self, index: int, grad: Tensor, sparse_weight: Tensor) -> Tensor:
        if self._grows_next():  # before_step needs the dense gradient, reduced over all processes
            return grad
        return grad.masked_fill(~self.masks[index], 0)

    def before_step(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        groups: Sequence[Mapping[str, Any]],
    ) -> None:
        self._scores = []
        if not self._grows_next():
            return
        dense = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
        self._scores = [self.growth_score(index, grad) for index, grad in enumerate(dense)]
        for mask, grad in zip(self.masks, dense, strict=True):
            grad.masked_fill_(~mask, 0)

    def growth_score(self, index: int, grad: Tensor) -> Tensor:
        """What inactive weights compete by, same shape as the dense gradient ``grad``."""
        return grad.abs()

    def expected_zeros(self, shapes: Sequence[Sequence[int]]) -> int:
        return self.framework.zeros(shapes, self.sparsity)

    def settings(self) -> dict[str, Any]:
        return {"sparsity": self.sparsity, "framework": type(self.framework).__name__, "interval": self.interval}

    def state_dict(self) -> dict[str, Any]:
        return {"masks": self.masks, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.masks = [mask.to(torch.bool) for mask in state["masks"]]
        self._seed = int(state["seed"])

    def _grows_next(self) -> bool:
        return (self._step + 1) % self.interval == 0 and self._step + 1 < self.end_step

    def _start(self, weights: Sequence[Tensor]) -> None:
        """Random masks. They follow from the initial weights, which all processes share."""
        self._seed = int(sum(float(weight.double().abs().sum()) for weight in weights) * 1e6) % 2**62
        shares = self.framework.distribution([weight.shape for weight in weights], self.sparsity)
        for index, (weight, share) in enumerate(zip(weights, shares, strict=True)):
            order = torch.randperm(weight.numel(), generator=self._generator(index))
            mask = torch.ones(weight.numel(), dtype=torch.bool)
            mask[order[: zeros_at(share, weight.numel())]] = False
            self.masks.append(mask.view(weight.shape))

    def _generator(self, *key: int) -> torch.Generator:
        return torch.Generator().manual_seed(hash((self._seed, *key)) % 2**62)


def drop_and_grow(mask: Tensor, weight: Tensor, score: Tensor, fraction: float) -> None:
    """Replace, in place, the ``fraction`` of active weights of least magnitude by the inactive ones of highest score.

    Args:
        mask: bool, True where active; keeps its number of True.
        weight: dense weights of the same shape; new ones are set to 0.
        score: of the same shape, at least 0.
        fraction: of the active weights, in [0, 1].
    """
    active = int(mask.sum())
    count = min(int(fraction * active), mask.numel() - active)
    if count == 0:
        return
    flat = mask.flatten()
    magnitude = weight.abs().flatten().masked_fill(~flat, math.inf)
    kept = flat.index_fill(0, magnitude.topk(count, largest=False).indices, False)
    grown = score.flatten().float().masked_fill(kept, -1).topk(count).indices  # what was dropped may grow back
    flat = kept.index_fill(0, grown, True)
    new = flat & ~mask.flatten()
    weight.masked_fill_(new.view_as(mask), 0)
    mask.copy_(flat.view_as(mask))
