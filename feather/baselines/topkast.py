"""Top-KAST, https://arxiv.org/abs/2106.03517: always sparse, with a larger set of weights that learn.

The forward pass uses the top D of the weights by magnitude (set A), the backward pass reaches the top D + M (set B).
An exploration loss pulls the weights of B: lambda w on A and lambda w / D on B \\ A, so that those which do not rise
fast enough fall back. M = D (B is twice as large as A) and lambda = 1e-4 are inferred.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from feather.frameworks import Framework
from feather.method import Thresholding
from feather.schedule import OneShot, Schedule


class TopKAST(Thresholding):
    """Hard thresholding from the first step, gradients to the forward set and the next largest weights."""

    decay = 1e-4

    def __init__(self, schedule: Schedule, framework: Framework, total_steps: int) -> None:
        always = OneShot(schedule.target, start_step=0, end_step=0)
        super().__init__(always, framework, p=math.inf, theta=0.0)
        self.backward_sparsity = max(0.0, 1 - 2 * (1 - self.sparsity))
        self.learning: list[Tensor] = []  # set B

    def update(self, weights: Sequence[Tensor], step: int) -> None:
        super().update(weights, step)
        if self.backward_sparsity == 0:
            self.learning = [weight == weight for weight in weights]
            return
        thresholds = self.framework.thresholds(weights, self.backward_sparsity)
        self.learning = [~(w.abs() <= t) for w, t in zip(weights, thresholds, strict=True)]

    def backward(self, index: int, grad: Tensor, sparse_weight: Tensor) -> Tensor:
        return grad.masked_fill(~self.learning[index], 0)

    def before_step(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        groups: Sequence[Mapping[str, Any]],
    ) -> None:
        density = 1 - self.sparsity
        for weight, grad, threshold, learning in zip(weights, gradients, self._thresholds, self.learning, strict=True):
            if grad is not None:
                pull = weight.where(weight.abs() > threshold, weight / density)
                grad.add_(pull.masked_fill(~learning, 0), alpha=self.decay)
