"""Powerpropagation, https://arxiv.org/abs/2110.00296: weights as powers, which move the faster the larger they are.

    w = v |v|^(alpha - 1),   dL/dv = alpha |v|^(alpha - 1) dL/dw,   v_0 = sign(w_0) |w_0|^(1/alpha)

so that the network starts with the weights that its initialisation gave it. Many weights end near zero and can be
pruned; one at zero has no gradient and stays there.

The paper prunes the trained weights by magnitude, or combines with Top-KAST. Here the effective weight w is pruned as
gradual magnitude pruning does, on the schedule that all methods share: kept where |w| > T, with gradients to the kept
weights alone. Inferred are this combination, that weight decay acts on v, the trained parameter, and alpha = 1.25:
larger ones learn slowly in short runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from feather.frameworks import Framework
from feather.method import Thresholding
from feather.operator import cast_sparse, compute_dtype
from feather.schedule import Schedule


class PowerProp(Thresholding):
    """Hard thresholding of ``v |v|^(alpha - 1)``; the sparsifier's dense weight, as ``dense()`` shows it, is v."""

    alpha = 1.25

    def __init__(self, schedule: Schedule, framework: Framework, total_steps: int) -> None:
        super().__init__(schedule, framework, p=math.inf, theta=0.0)
        self._prunes = False

    def update(self, weights: Sequence[Tensor], step: int) -> None:
        super().update([self._effective(weight) for weight in weights], step)
        self._prunes, self.active = self.active, True  # the model sees w from the start, pruned or not

    def forward(self, weights: Sequence[Tensor]) -> Iterable[Tensor]:
        effective = [self._effective(weight) for weight in weights]
        shown = super().forward(effective) if self._prunes else effective
        return (cast_sparse(sparse, weight.dtype) for sparse, weight in zip(shown, weights, strict=True))

    def backward(self, index: int, grad: Tensor, sparse_weight: Tensor) -> Tensor:
        # |v|^(alpha - 1) = |w|^((alpha - 1) / alpha), which is 0 where w is pruned
        magnitude = sparse_weight.to(compute_dtype(sparse_weight.dtype)).abs()
        return (magnitude.pow_((self.alpha - 1) / self.alpha).mul_(self.alpha) * grad).to(grad.dtype)

    def encode(self, index: int, weight: Tensor) -> Tensor:
        return _signed_power(weight, 1 / self.alpha).to(weight.dtype)

    def thresholds(self) -> list[Tensor] | None:
        return super().thresholds() if self._prunes else None

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "alpha": self.alpha}

    def _effective(self, weight: Tensor) -> Tensor:
        return _signed_power(weight, self.alpha)


def _signed_power(weight: Tensor, exponent: float) -> Tensor:
    magnitude = weight.to(compute_dtype(weight.dtype)).abs()
    return magnitude.pow_(exponent).copysign_(weight)
