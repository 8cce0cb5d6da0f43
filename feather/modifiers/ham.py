"""HAM, https://arxiv.org/abs/2506.02630: a hyperbolic step after each of the optimizer's own.

    w <- w exp(lr (-alpha sign(w) dL/dw - beta)),   the exponent clamped to [-5, 5]

for parameters of at least two dimensions. No weight changes its sign by it; those that the gradient wants smaller
shrink, and all lose a little (beta). alpha = 200; beta = 1e-3 is the value for ImageNet, 16e-3 that for CIFAR-100.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch

from feather.modifiers.base import Modifier
from feather.operator import compute_dtype


class HAM(Modifier):
    """Hyperbolic aware minimisation: prunable or not, every weight matrix and kernel that the optimizer holds.

    ``lr`` is that of the parameter's group; the gradient is the one that the optimizer was given, clipped and without
    weight decay.

    Args:
        alpha: strength of the gradient's part, at least 0.
        beta: strength of the shrinkage, at least 0.

    Raises:
        ValueError: one of them is out of range.
    """

    bound = 5.0  # of the exponent, on both sides

    def __init__(self, alpha: float = 200.0, beta: float = 1e-3) -> None:
        for name, value in (("alpha", alpha), ("beta", beta)):
            number = isinstance(value, Real) and not isinstance(value, bool)
            if not number or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r} is out of range: it must be a finite number of at least 0.")
        self.alpha = float(alpha)
        self.beta = float(beta)

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            lr = group["lr"]
            for parameter in group["params"]:
                if parameter.ndim < 2 or parameter.grad is None or parameter.grad.layout != torch.strided:
                    continue
                dtype = compute_dtype(parameter.dtype)
                exponent = parameter.sign().to(dtype).mul_(parameter.grad).mul_(-lr * self.alpha).sub_(lr * self.beta)
                parameter.mul_(exponent.clamp_(-self.bound, self.bound).exp_())

    def settings(self) -> dict[str, Any]:
        return {"name": "ham", "alpha": self.alpha, "beta": self.beta}
