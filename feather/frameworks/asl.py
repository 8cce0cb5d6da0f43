"""ASL, Weight Pruning via Adaptive Sparsity Loss, https://arxiv.org/abs/2006.02768 (code: georgeretsi/SparsityLoss).

Learned thresholds T_l = r_l std(W_l) (see ``learned.py``), r_l clamped to [0, 5], with a Gaussian model of each layer,

    s_l = erf(r_l / sqrt 2),   at first r_l = sqrt 2 erfinv(0.6 S),

weights re-centred to zero mean before each forward pass, and a budget that is S from the first step on. Layers under
1000 weights stay dense. Nothing enforces the budget: the sparsity at the end is what the training has reached, on a
short run far less than S (r learns at a hundredth of the learning rate).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from feather.frameworks.learned import LearnedThresholds
from feather.quantile import zeros_at
from feather.schedule import OneShot, Schedule

INITIAL_SHARE = 0.6  # of the target


class ASL(LearnedThresholds):
    """Adaptive sparsity loss as published: hard form of the gradient, Gaussian layers, a constant budget."""

    minimum_size = 1000
    reaches = False

    def __init__(self) -> None:
        super().__init__("hard")
        self._target = 0.0

    def start(self, schedule: Schedule, total_steps: int) -> Schedule:
        self._target = schedule.target
        return OneShot(schedule.target, start_step=0, end_step=0)

    def initial(self, weights: Sequence[Tensor]) -> Tensor:
        return gaussian_ratio(torch.full((len(weights),), INITIAL_SHARE * self._target))

    def modelled(self, ratios: Tensor) -> tuple[Tensor, Tensor]:
        return gaussian(ratios)

    def zeros(self, shapes: Sequence[Sequence[int]], sparsity: float) -> int:
        return zeros_at(sparsity, sum(math.prod(shape) for shape in shapes))


def gaussian(ratios: Tensor) -> tuple[Tensor, Tensor]:
    """Share of a zero-mean Gaussian within ``ratios`` standard deviations, and its derivative."""
    return torch.erf(ratios / math.sqrt(2)), math.sqrt(2 / math.pi) * torch.exp(-(ratios**2) / 2)


def gaussian_ratio(sparsities: Tensor) -> Tensor:
    """The inverse: the standard deviations within which ``sparsities`` of a Gaussian lie."""
    return math.sqrt(2) * torch.erfinv(sparsities)
