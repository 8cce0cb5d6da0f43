"""ASL+, a reconstruction: Feather's second framework (https://arxiv.org/abs/2310.02448), of which no code is public.

Public is an abstract (G. Glentis Georgoulakis, thesis, NTUA, October 2023): layers modelled as Gaussian *or* Laplace,
thresholds learned by the optimisation under one overall budget. Everything else here is inferred from ASL and Feather.

Learned thresholds T_l = c r_l std(W_l) (see ``learned.py``), weights re-centred to zero mean before each forward pass:

    model       Laplace where mean|w| / std(w) < 0.7583 (the likelier of the two below that), else Gaussian
                Laplace  s_l = 1 - exp(-sqrt 2 r_l),    at first r_l = -ln(1 - 0.6 S) / sqrt 2
                Gaussian s_l = erf(r_l / sqrt 2),       at first r_l = sqrt 2 erfinv(0.6 S)
                chosen anew every hundredth of the training; r_l then stays as it is, the threshold with it
    budget      the schedule's sparsity s(t)
    exactness   c is one factor for all layers: the quantile of |w| / (r_l std(W_l)) over all weights at s(t), so that
                the sparsity is s(t) to the weight, and r learns how the layers share it

All prunable layers take part, however small. r_l is kept at 0.001 or more, so that every weight can be pruned.

Two choices are by measurement (experiment asl_plus_choices). c acts at every step: r, which learns at a hundredth of
the learning rate, lags the budget on all but long runs, and a network that is brought to its sparsity all at once, at
the ramp's end or near that of training, recovers late or never. The gradient is operator_masked: at 98 % on CIFAR-100
(proxy scale) the other two went on raising the thresholds of whole layers until nothing was left of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from feather.frameworks.asl import INITIAL_SHARE, gaussian, gaussian_ratio
from feather.frameworks.learned import GRADIENTS, LearnedThresholds, standard_deviation
from feather.operator import compute_dtype
from feather.quantile import magnitude_quantile, zeros_at
from feather.schedule import Schedule

CROSSING = 0.7583  # mean|w| / std where both likelihoods are equal: (1 + ln pi) / (2 sqrt 2)
EXACT = ("always", "ramp", "end")


class ASLPlus(LearnedThresholds):
    """Learned thresholds under a scheduled budget with an exact sparsity.

    Args:
        gradient: how the task loss reaches a threshold, one of ``learned.GRADIENTS``.
        exact: from when on the common factor c acts: at every step ("always"), from the schedule's end on ("ramp"), or
            for the last 5 % of training ("end"). Before that c = 1, and the sparsity is what r gives.
    """

    options: ClassVar[Mapping[str, tuple[str, ...]]] = {"gradient": GRADIENTS, "exact": EXACT}
    smallest = 1e-3
    rounding = 8  # T_l is a product and c an order statistic of quotients: weights next to T_l may fall either way

    def __init__(self, gradient: str = GRADIENTS[0], exact: str = EXACT[0]) -> None:
        super().__init__(gradient)
        self.exact = exact
        self._target = 0.0
        self._exact_from = 0
        self._interval = 1  # steps between two choices of the model
        self._chosen_at = -1
        self._laplace = torch.zeros(0, dtype=torch.bool)

    def start(self, schedule: Schedule, total_steps: int) -> Schedule:
        self._target = schedule.target
        self._interval = max(1, total_steps // 100)
        self._exact_from = {
            "always": 0,
            "ramp": schedule.end_step,
            "end": max(schedule.end_step, min(total_steps - 1, int(0.95 * total_steps))),
        }[self.exact]
        return schedule

    def update(self, weights: Sequence[Tensor], step: int) -> None:
        if self._chosen_at < 0 or step >= self._chosen_at + self._interval:
            self._laplace = torch.stack([is_laplace(weight) for weight in weights])
            self._chosen_at = step
        self._laplace = self._laplace.to(weights[0].device)
        super().update(weights, step)

    def initial(self, weights: Sequence[Tensor]) -> Tensor:
        share = torch.full_like(self._laplace, INITIAL_SHARE * self._target, dtype=torch.float32)
        return torch.where(self._laplace, laplace_ratio(share), gaussian_ratio(share))

    def modelled(self, ratios: Tensor) -> tuple[Tensor, Tensor]:
        as_laplace, as_gaussian = laplace(ratios), gaussian(ratios)
        return (
            torch.where(self._laplace, as_laplace[0], as_gaussian[0]),
            torch.where(self._laplace, as_laplace[1], as_gaussian[1]),
        )

    def scale(self, weights: Sequence[Tensor], thresholds: list[Tensor], sparsity: float) -> list[Tensor]:
        if self._step < self._exact_from:
            return thresholds
        units = [threshold.clamp_min(1e-12) for threshold in thresholds]  # a layer of equal weights has T_l = 0
        in_units = [w.to(compute_dtype(w.dtype)) / unit for w, unit in zip(weights, units, strict=True)]
        factor = magnitude_quantile(in_units, sparsity)
        return [factor * unit for unit in units]

    def zeros(self, shapes: Sequence[Sequence[int]], sparsity: float) -> int:
        return zeros_at(sparsity, sum(math.prod(shape) for shape in shapes))

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "exact": self.exact}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "laplace": self._laplace, "chosen_at": self._chosen_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        own = dict(state)
        self._laplace = own.pop("laplace").to(torch.bool)
        self._chosen_at = int(own.pop("chosen_at"))
        super().load_state_dict(own)


def is_laplace(weight: Tensor) -> Tensor:
    """Whether a zero-mean Laplace distribution is likelier than a Gaussian of the same deviation; 0-dim bool."""
    wide = weight.to(compute_dtype(weight.dtype))
    return (wide - wide.mean()).abs().mean() < CROSSING * standard_deviation(weight)


def laplace(ratios: Tensor) -> tuple[Tensor, Tensor]:
    """Share of a zero-mean Laplace distribution within ``ratios`` standard deviations, and its derivative."""
    outside = torch.exp(-math.sqrt(2) * ratios)
    return 1 - outside, math.sqrt(2) * outside


def laplace_ratio(sparsities: Tensor) -> Tensor:
    """The inverse: the standard deviations within which ``sparsities`` of a Laplace distribution lie."""
    return -torch.log1p(-sparsities) / math.sqrt(2)
