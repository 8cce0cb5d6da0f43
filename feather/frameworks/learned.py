"""Layer-wise thresholds that are learned: what ASL and ASL+ share.

Every layer l has one number r_l; its threshold is T_l = r_l std(W_l), the standard deviation being a constant to the
gradient. r is trained beside the weights w, by plain SGD on the task loss L and a budget loss:

    task        dL/dr_l = std(W_l) dL/dT_l,   dL/dT_l = sum_i g_i (Q(u_i) - k_i u_i)
                g = dL/dP_T(w) is the gradient that the sparse weights see, u = w / T_l, Q = P_1; k_i = 1
    budget      10 (sum_l n_l (1 - s_l) / sum_l n_l  -  (1 - S))^2,   s_l = the modelled sparsity of layer l at r_l
    step        v <- momentum v + d(task + budget)/dr,   r <- r - lr/100 v        (no weight decay)

lr and momentum are those of the layer's own group in the optimizer (0.9 where it has none, as ASL's code for SGD).

The operator P_T is Feather's, and how its task gradient should reach T is an open choice. ``gradient`` names three:

    hard              -sum of g_i u_i over the pruned weights: Q as if it were the hard operator, whatever p is (ASL)
    operator          the formula above: Q of the method's own p
    operator_masked   the same with k_i = m_i, Feather's mask: theta where a weight is pruned, 1 elsewhere

For the hard operator (p = inf) with theta = 1 the three are equal.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from feather.frameworks.base import Framework
from feather.operator import compute_dtype, p_threshold

GRADIENTS = ("operator_masked", "operator", "hard")
BUDGET_FACTOR = 10.0
LR_FACTOR = 0.01
MOMENTUM = 0.9


class LearnedThresholds(Framework):
    """T_l = r_l std(W_l) with a trained r_l.

    Attributes:
        ratios: r, one fp32 value per layer; None before the first pruned step.
        smallest, largest: the forward pass clamps r to this range, outside of which it has no task gradient.
        minimum_size: layers with fewer weights stay dense.
    """

    learns = True
    smallest = 0.0
    largest = 5.0
    minimum_size = 0

    def __init__(self, gradient: str) -> None:
        self.gradient = gradient
        self.ratios: Tensor | None = None
        self._velocity = torch.zeros(0)
        self._pending: tuple[Tensor, list[float], list[float]] | None = None  # dr, lr and momentum of the coming step
        self._step = -1  # of the last update
        self._sparsity = 0.0  # and what its thresholds were asked for: the budget
        self._thresholds: list[Tensor] = []

    # ---- what ASL and ASL+ have each of their own ------------------------------------------------------------------

    @abstractmethod
    def initial(self, weights: Sequence[Tensor]) -> Tensor:
        """The first r, one value per layer."""

    @abstractmethod
    def modelled(self, ratios: Tensor) -> tuple[Tensor, Tensor]:
        """The layers' sparsities that the model of their distribution gives at r, and the derivatives by r."""

    # ---- thresholds ------------------------------------------------------------------------------------------------

    def update(self, weights: Sequence[Tensor], step: int) -> None:
        for weight in weights:
            if self.takes_part(weight):
                centre_(weight)
        device = weights[0].device
        if self.ratios is None:
            self.ratios = self.initial(weights).float().to(device)
            self._velocity = torch.zeros_like(self.ratios)
        self.ratios, self._velocity = self.ratios.to(device), self._velocity.to(device)
        if self._pending is not None and step > self._step:  # an optimizer step that was skipped never comes here
            gradient, lr, momentum = self._pending
            self._velocity = self._velocity * torch.tensor(momentum, device=device) + gradient.to(device)
            self.ratios = self.ratios - LR_FACTOR * torch.tensor(lr, device=device) * self._velocity
        self._pending = None
        self._step = step

    def thresholds(self, weights: Sequence[Tensor], sparsity: float) -> list[Tensor]:
        self._sparsity = sparsity
        self._thresholds = self.scale(weights, self._own_thresholds(weights), sparsity)
        return self._thresholds

    def scale(self, weights: Sequence[Tensor], thresholds: list[Tensor], sparsity: float) -> list[Tensor]:
        """The ``thresholds`` to use in place of r_l std(W_l): those."""
        return thresholds

    def takes_part(self, weight: Tensor) -> bool:
        """Whether the layer is large enough to be pruned."""
        return weight.numel() >= self.minimum_size

    def _own_thresholds(self, weights: Sequence[Tensor]) -> list[Tensor]:
        assert self.ratios is not None
        clamped = self.ratios.clamp(self.smallest, self.largest)
        return [
            ratio * standard_deviation(weight) if self.takes_part(weight) else torch.zeros_like(ratio)
            for weight, ratio in zip(weights, clamped, strict=True)
        ]

    # ---- learning --------------------------------------------------------------------------------------------------

    def learn(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        groups: Sequence[Mapping[str, Any]],
        *,
        p: float,
        theta: float,
        arrived: float,
    ) -> None:
        assert self.ratios is not None
        device = self.ratios.device
        slopes = [
            torch.zeros((), device=device)
            if grad is None or not self.takes_part(weight)
            else threshold_gradient(self.gradient, weight, grad, threshold, p=p, theta=theta, arrived=arrived).float()
            for weight, grad, threshold in zip(weights, gradients, self._thresholds, strict=True)
        ]
        # T_l is proportional to r_l, whatever its other factors are: dT/dr = T / r
        clamped = self.ratios.clamp(self.smallest, self.largest)
        task = torch.stack(slopes) / clamped.clamp_min(torch.finfo(torch.float32).tiny)
        task = torch.where(self.ratios == clamped, task, 0)
        sizes = [weight.numel() if self.takes_part(weight) else 0 for weight in weights]
        self._pending = (
            task + self.budget_gradient(torch.tensor(sizes, device=device)),
            [float(group["lr"]) for group in groups],
            [float(group.get("momentum", MOMENTUM)) for group in groups],
        )

    def budget_gradient(self, sizes: Tensor) -> Tensor:
        """d(budget loss)/dr, one value per layer of ``sizes`` weights."""
        assert self.ratios is not None
        sparsities, slopes = self.modelled(self.ratios)
        shares = sizes / sizes.sum().clamp_min(1)
        excess = (shares * (1 - sparsities)).sum() - (1 - self._sparsity)  # modelled non-zeros above the budget
        return -2 * BUDGET_FACTOR * excess * shares * slopes

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        return {"gradient": self.gradient}

    def state_dict(self) -> dict[str, Any]:
        if self.ratios is None:
            return {}
        return {"ratios": self.ratios, "velocity": self._velocity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ratios = state["ratios"].clone() if state else None
        self._velocity = state["velocity"].clone() if state else torch.zeros(0)
        self._pending = None
        self._step = -1


def threshold_gradient(
    kind: str, weight: Tensor, grad: Tensor, threshold: Tensor, *, p: float, theta: float, arrived: float = 1.0
) -> Tensor:
    """``T dL/dT`` of one layer by the formula ``kind``, one of ``GRADIENTS``; zero where T is.

    Args:
        weight: dense weights of the layer, any shape and floating type.
        grad: dL/dP_T(w), same shape; where a weight is pruned, ``arrived`` (greater than 0) times that.
        threshold: T, 0-dim.
        p, theta: order of the operator and scale of pruned weights' gradients.

    Returns:
        0-dim tensor of at least fp32.
    """
    wide = weight.to(compute_dtype(weight.dtype))
    pruned = wide.abs() <= threshold
    change = -(grad * wide).where(pruned, 0).sum() / arrived  # T sum g_i (Q(u_i) - u_i) with Q = 0
    if kind == "operator_masked":
        change = change * theta
    if kind != "hard" and not math.isinf(p):
        change = change + (grad * (p_threshold(wide, threshold, p) - wide)).where(~pruned, 0).sum()
    return change


def centre_(weight: Tensor) -> None:
    """Give ``weight`` zero mean, in place; one that has it to rounding keeps its bits, so a resumed run agrees."""
    if weight.numel() == 1:
        return
    wide = weight.to(compute_dtype(weight.dtype))
    mean, tolerance = wide.mean(), 8 * torch.finfo(weight.dtype).eps * standard_deviation(weight)
    weight.sub_(torch.where(mean.abs() > tolerance, mean, 0).to(weight.dtype))


def standard_deviation(weight: Tensor) -> Tensor:
    """Of the elements of ``weight``, as the sample's, 0-dim of at least fp32; the magnitude of a single one."""
    wide = weight.to(compute_dtype(weight.dtype))
    return wide.std() if wide.numel() > 1 else wide.abs().view(())
