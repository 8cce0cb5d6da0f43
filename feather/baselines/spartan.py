"""Spartan, https://arxiv.org/abs/2205.14107: top-k with a soft mask from regularised optimal transport.

The k of n weights that are kept come with a soft mask, the solution of the entropy-regularised top-k problem

    max_m  beta sum_i m_i u_i + sum_i H(m_i),   sum_i m_i = k,   u_i = |w_i| / T
    =>     m_i = sigmoid(beta u_i - mu)   with mu such that the mask sums to k

and the forward pass uses the hard top-k of ``w * m``, which cuts at |w| = T. Backward, the cut is taken for the
identity and the mask contributes its true derivative: with g the gradient of the cut ``w * m`` and d_i = m_i (1 - m_i),

    dL/dw_i = g_i m_i + beta sign(w_i) / T * d_i (g_i w_i - sum_j d_j g_j w_j / sum_j d_j)

The budget k falls linearly from n to its target over the first 20 % of the steps, beta rises linearly from 1 to 10
until 80 %, and from there on the mask is frozen.

The paper solves for mu by Sinkhorn iterations, at most 100 and to a tolerance of 0.01. Newton's method in log sum(m)
has the same fixed point and gets closer in fewer steps. Inferred: magnitudes in units of T, a constant to the gradient
(tried beside their mean on digits: better in four of four short runs), and that the frozen mask is the soft one of that
moment, so that the network does not jump.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from feather.frameworks import Framework
from feather.method import Method
from feather.operator import cast_sparse, compute_dtype
from feather.schedule import Linear, Schedule


class Spartan(Method):
    """Hard top-k of softly masked weights under one budget for all layers.

    The mask's derivative couples all weights, so ``before_step`` applies it, to gradients that are reduced over all
    processes; a user's clipping has seen ``g`` instead.
    """

    ramp = 0.2  # share of the steps in which the budget falls to its target
    freeze = 0.8  # share of the steps after which the mask stays
    sharpness = (1.0, 10.0)  # beta, at the start and when the mask freezes

    def __init__(self, schedule: Schedule, framework: Framework, total_steps: int) -> None:
        self.sparsity = schedule.target
        self.framework = framework
        self.schedule = Linear(schedule.target, start_step=0, end_step=int(self.ramp * total_steps))
        self.freeze_step = max(int(self.freeze * total_steps), self.schedule.end_step)
        self.frozen: list[Tensor] = []  # the masks of the last phase, zero where a weight is pruned
        self._thresholds: list[Tensor] = []  # of the hard cut
        self._scale = self._shift = torch.tensor(0.0)  # m = sigmoid(scale |w| - shift): beta / T, and mu

    def scheduled_sparsity(self, step: int) -> float:
        return self.schedule(step)

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor], step: int) -> None:
        sparsity = self.schedule(step)
        self.active = sparsity > 0
        if not self.active:
            return
        if not self.frozen:
            self._solve(weights, sparsity, step)
            if step < self.freeze_step:
                return
            cut = zip(weights, self._thresholds, strict=True)
            self.frozen = [self._mask(weight).masked_fill_(weight.abs() <= t, 0) for weight, t in cut]
        self.frozen = [mask.to(weight.device) for mask, weight in zip(self.frozen, weights, strict=True)]
        for mask, weight in zip(self.frozen, weights, strict=True):
            weight.masked_fill_(mask == 0, 0)

    def forward(self, weights: Sequence[Tensor]) -> Iterable[Tensor]:
        if not self.active:
            return weights
        if self.frozen:
            return (cast_sparse(w * mask, w.dtype) for w, mask in zip(weights, self.frozen, strict=True))
        return map(self._masked, weights, self._thresholds)

    def _masked(self, weight: Tensor, threshold: Tensor) -> Tensor:
        masked = torch.where(weight.abs() <= threshold, 0, weight * self._mask(weight))
        return cast_sparse(masked, weight.dtype)

    def before_step(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        groups: Sequence[Mapping[str, Any]],
    ) -> None:
        if not self.active:
            return
        if self.frozen:
            for mask, grad in zip(self.frozen, gradients, strict=True):
                if grad is not None:
                    grad.mul_(mask)
            return
        masks = [self._mask(weight) for weight in weights]
        slopes = [mask * (1 - mask) for mask in masks]
        pulls = [None if g is None else g * w for w, g in zip(weights, gradients, strict=True)]
        pulled = [(d * pull).sum() for d, pull in zip(slopes, pulls, strict=True) if pull is not None]
        if not pulled:
            return
        mean = torch.stack(pulled).sum() / torch.stack([d.sum() for d in slopes]).sum()
        mean = mean.nan_to_num(0)  # 0 / 0: so sharp that no weight lies between 0 and 1
        for weight, grad, mask, slope, pull in zip(weights, gradients, masks, slopes, pulls, strict=True):
            if grad is not None and pull is not None:
                through_mask = slope.mul_(pull - mean).mul_(weight.sign()).mul_(self._scale)
                grad.copy_(through_mask.addcmul_(grad.to(mask.dtype), mask))

    def expected_zeros(self, shapes: Sequence[Sequence[int]]) -> int:
        return self.framework.zeros(shapes, self.sparsity)

    def thresholds(self) -> list[Tensor] | None:
        return self._thresholds if self.active and not self.frozen else None

    def settings(self) -> dict[str, Any]:
        return {"schedule": repr(self.schedule), "freeze_step": self.freeze_step}

    def state_dict(self) -> dict[str, Any]:
        return {"frozen": self.frozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.frozen = list(state["frozen"])

    def _solve(self, weights: Sequence[Tensor], sparsity: float, step: int) -> None:
        first, last = self.sharpness
        beta = first + (last - first) * min(step / max(self.freeze_step, 1), 1.0)
        self._thresholds = self.framework.thresholds(weights, sparsity)
        magnitudes = torch.cat([weight.to(compute_dtype(weight.dtype)).abs().flatten() for weight in weights])
        budget = magnitudes.numel() - self.framework.zeros([weight.shape for weight in weights], sparsity)
        cut = self._thresholds[0]
        self._scale = beta / cut.clamp(min=torch.finfo(cut.dtype).tiny ** 0.5)  # T = 0 where many weights are
        self._shift = solve_shift(magnitudes.mul_(self._scale), budget, start=cut * self._scale)

    def _mask(self, weight: Tensor) -> Tensor:
        magnitude = weight.to(compute_dtype(weight.dtype)).abs()
        return magnitude.mul_(self._scale).sub_(self._shift).sigmoid_()


def solve_shift(scores: Tensor, budget: float, start: Tensor, tolerance: float = 1e-4, steps: int = 100) -> Tensor:
    """The mu for which ``sum_i sigmoid(scores_i - mu)`` is ``budget``, by Newton's method inside a shrinking bracket.

    Args:
        scores: 1-D.
        budget: what the mask sums to, in (0, n).
        start: first guess of mu, 0-dim.
        tolerance: of the sum, relative. On a device where looking means waiting, 20 steps are taken instead.
        steps: at most.

    Returns:
        mu, 0-dim.
    """
    waits = scores.device.type != "cpu"
    odds = math.log(budget / (scores.numel() - budget))
    low, high = (edge - odds for edge in scores.aminmax())
    shift = start.to(scores.dtype).clamp(low, high)
    for _ in range(20 if waits else steps):
        mask = (scores - shift).sigmoid_()
        total = mask.sum()
        error = (total / budget).log()
        if not waits and abs(float(error)) <= tolerance:
            break
        low, high = torch.where(error > 0, shift, low), torch.where(error > 0, high, shift)
        newton = shift + error * total / (total - mask.dot(mask))
        shift = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
    return shift
