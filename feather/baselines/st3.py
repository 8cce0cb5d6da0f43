"""ST-3, https://arxiv.org/abs/2212.01076 (code: https://github.com/vanderschuea/stthree).

Soft thresholding, rescaled filter by filter to the magnitude that the filter had before:

    w' = r_f sign(w) max(|w| - T, 0),   r_f = 1.01 / (rho_f + 0.01),
    rho_f = (mean_f(|w| [|w| > T]) + 1e-6) / (mean_f(|w|) + 1e-6)

with the identity as gradient (T and r_f are constants), a global quantile for T and the cubic schedule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from feather.frameworks import Framework, GlobalMagnitude
from feather.method import Thresholding
from feather.operator import compute_dtype, p_threshold
from feather.quantile import magnitude_quantile
from feather.schedule import Schedule


class ST3(Thresholding):
    """Soft thresholding with a rescaling of each output filter (the first dimension of a weight)."""

    def __init__(self, schedule: Schedule, framework: Framework, total_steps: int) -> None:
        super().__init__(schedule, framework, p=1.0, theta=1.0)

    def forward(self, weights: Sequence[Tensor]) -> Iterable[Tensor]:
        return map(self._rescaled, weights, self._thresholds) if self.active else weights

    def _rescaled(self, weight: Tensor, threshold: Tensor) -> Tensor:
        thresholded = p_threshold(weight, threshold, p=1.0)
        magnitude = weight.abs().to(compute_dtype(weight.dtype)).flatten(1)
        kept = magnitude.masked_fill(magnitude <= threshold, 0)
        rho = (kept.mean(1) + 1e-6) / (magnitude.mean(1) + 1e-6)
        rescale = 1.01 / (rho + 0.01)
        return thresholded * rescale.to(weight.dtype).view(-1, *[1] * (weight.ndim - 1))


class ST3Sigma(ST3):
    """ST-3's sigma variant: the global quantile is that of ``|w| sqrt(sum(weight.shape))``."""

    rounding = 8  # T_l is a quotient: weights next to it may fall on its other side

    def __init__(self, schedule: Schedule, framework: Framework, total_steps: int) -> None:
        super().__init__(schedule, SigmaMagnitude(), total_steps)


class SigmaMagnitude(GlobalMagnitude):
    """One quantile over the magnitudes of all layers, each in units of a typical initial magnitude of its layer."""

    def thresholds(self, weights: Sequence[Tensor], sparsity: float | Tensor) -> list[Tensor]:
        scales = [math.sqrt(sum(weight.shape)) for weight in weights]
        scaled = [w.to(compute_dtype(w.dtype)) * scale for w, scale in zip(weights, scales, strict=True)]
        quantile = magnitude_quantile(scaled, sparsity)
        return [quantile / scale for scale in scales]
