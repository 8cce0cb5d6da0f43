"""Layer-wise magnitude pruning: every layer has its own share of the sparsity and its own threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from feather.distribution import Distribution, erdos_renyi_kernel, uniform
from feather.frameworks.base import Framework
from feather.quantile import magnitude_quantile, zeros_at


class Layerwise(Framework):
    """T_l is the interpolated quantile of ``|w|`` in layer l at the sparsity that ``distribution`` gives the layer."""

    distribution: Distribution

    def thresholds(self, weights: Sequence[Tensor], sparsity: float) -> list[Tensor]:
        shares = self.distribution([weight.shape for weight in weights], sparsity)
        return [
            magnitude_quantile([weight], share) if share > 0 else torch.zeros((), device=weight.device)
            for weight, share in zip(weights, shares, strict=True)
        ]

    def zeros(self, shapes: Sequence[Sequence[int]], sparsity: float) -> int:
        shares = self.distribution(shapes, sparsity)
        return sum(zeros_at(share, math.prod(shape)) for share, shape in zip(shares, shapes, strict=True))


class Uniform(Layerwise):
    """The same sparsity in every layer."""

    distribution = staticmethod(uniform)


class ERK(Layerwise):
    """Erdos-Renyi-Kernel densities (RigL, https://arxiv.org/abs/1911.11134)."""

    distribution = staticmethod(erdos_renyi_kernel)
