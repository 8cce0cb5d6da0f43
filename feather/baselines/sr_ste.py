"""SR-STE, https://arxiv.org/abs/2102.04010, with a global unstructured mask in place of its N:M groups.

Hard thresholding with the straight-through gradient, and a decay of the pruned weights alone:

    w' = w [|w| > T],   dw = dL/dw' + lambda [|w| <= T] w,   lambda = 2e-4
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from feather.frameworks import Framework
from feather.method import Thresholding
from feather.schedule import Schedule


class SRSTE(Thresholding):
    """Hard straight-through estimator with sparse-refined gradients."""

    decay = 2e-4

    def __init__(self, schedule: Schedule, framework: Framework, total_steps: int) -> None:
        super().__init__(schedule, framework, p=math.inf, theta=1.0)

    def before_step(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        groups: Sequence[Mapping[str, Any]],
    ) -> None:
        if not self.active:
            return
        for weight, grad, threshold in zip(weights, gradients, self._thresholds, strict=True):
            if grad is not None:
                grad.add_(weight.masked_fill(weight.abs() > threshold, 0), alpha=self.decay)
