"""STR, https://arxiv.org/abs/2002.03231: soft thresholds that each layer learns.

    w' = sign(w) max(|w| - T_l, 0),      T_l = sigmoid(s_l)
    dL/dw_i = g_i [|w_i| > T_l],         dL/ds_l = -sigmoid'(s_l) sum_i g_i sign(w_i) [|w_i| > T_l]

with g the gradient of w'. s_l is trained as the weights are, with their learning rate, momentum and a decay that drives
it to 0 and T_l up, against the gradient. That decay and the initial s are all that steers the sparsity, so it is not
met to the weight: ``finalize`` reports what was reached.

The paper gives s the decay of the weights and tunes it for each network and target: from s = -3200, a decay of 2.25e-5
leads ResNet-50 to 90.23 % in 100 epochs of ImageNet. In a short run the same values prune nothing. Inferred, so that a
target is all that one has to name: s starts at -10 (T = 4.5e-5, as good as dense), and its decay is

    rate / peak lr * max(0, 1 - D / d),   rate = min(12 / steps, 0.1)

where d is the share of non-zeros and D that of the target: by exp(-6) over a run with a cosine, if it were left alone,
and the weaker the nearer. It acts beside the momentum, which would carry s past the target.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from feather.frameworks import Framework
from feather.method import Method
from feather.operator import p_threshold
from feather.schedule import Schedule


class STR(Method):
    """Soft threshold reparameterization: approaches its target from below and reports where it ends."""

    identity_backward = False
    initial_s = -10.0
    drift = 6.0  # of log(-s) over the run
    fastest = 0.1  # share of s that a step may take away

    def __init__(self, schedule: Schedule, framework: Framework, total_steps: int) -> None:
        self.sparsity = schedule.target
        self.rate = min(2 * self.drift / total_steps, self.fastest)
        self.active = True
        self.s = torch.tensor([])  # one for each layer
        self._momentum = torch.tensor([])
        self._peak_lr = 0.0
        self._behind = torch.tensor(1.0)  # 1 - D / d
        self._thresholds: list[Tensor] = []

    def scheduled_sparsity(self, step: int) -> float:
        return self.sparsity

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor], step: int) -> None:
        if not len(self.s):
            self.s = torch.full((len(weights),), self.initial_s)
            self._momentum = torch.zeros_like(self.s)
        self.s, self._momentum = (tensor.to(weights[0].device) for tensor in (self.s, self._momentum))
        self._thresholds = list(self.s.sigmoid())
        kept = torch.stack([(w.abs() > t).sum() for w, t in zip(weights, self._thresholds, strict=True)]).sum()
        wanted = (1 - self.sparsity) * sum(weight.numel() for weight in weights)
        self._behind = (1 - wanted / kept).clamp(min=0)

    def forward(self, weights: Sequence[Tensor]) -> Iterable[Tensor]:
        return (p_threshold(weight, t, p=1.0) for weight, t in zip(weights, self._thresholds, strict=True))

    def backward(self, index: int, grad: Tensor, sparse_weight: Tensor) -> Tensor:
        return grad.masked_fill(sparse_weight == 0, 0)

    def before_step(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        groups: Sequence[Mapping[str, Any]],
    ) -> None:
        grad = self.s_gradient(weights, gradients)
        lr, momentum = (torch.tensor([float(group.get(key, 0)) for group in groups]) for key in ("lr", "momentum"))
        self._peak_lr = max(self._peak_lr, float(lr.max()))
        decay = self.rate / self._peak_lr if self._peak_lr > 0 else 0.0
        lr, momentum = lr.to(self.s.device), momentum.to(self.s.device)
        self._momentum = momentum * self._momentum + grad
        self.s = self.s - lr * (self._momentum + decay * self._behind * self.s)

    def s_gradient(self, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
        """dL/ds, one value for each layer, from ``gradients`` that are zero where a weight is pruned."""
        none = torch.zeros((), device=self.s.device)
        sums = [none if g is None else (g * w.sign()).sum() for w, g in zip(weights, gradients, strict=True)]
        threshold = self.s.sigmoid()
        return -threshold * (1 - threshold) * torch.stack([total.to(self.s.dtype) for total in sums])

    def expected_zeros(self, shapes: Sequence[Sequence[int]]) -> int | None:
        return None

    def thresholds(self) -> list[Tensor] | None:
        return self._thresholds

    def settings(self) -> dict[str, Any]:
        return {"sparsity": self.sparsity, "initial_s": self.initial_s, "rate": self.rate}

    def state_dict(self) -> dict[str, Any]:
        return {"s": self.s, "momentum": self._momentum, "peak_lr": self._peak_lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.s, self._momentum = state["s"], state["momentum"]
        self._peak_lr = float(state["peak_lr"])
