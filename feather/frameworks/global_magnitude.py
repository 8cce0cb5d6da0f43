"""Feather-Global: one threshold for all layers, the quantile of all magnitudes (Feather, arXiv 2310.02448)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from feather.frameworks.base import Framework
from feather.quantile import ALGORITHMS, magnitude_quantile, zeros_at


class GlobalMagnitude(Framework):
    """T is the interpolated quantile of ``|w|`` over all prunable weights, recomputed at every step.

    Args:
        selection: how the quantile is found, one of ``quantile.ALGORITHMS``; all give the same bits.
    """

    unread = True
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {"selection": ALGORITHMS}

    def __init__(self, selection: str = ALGORITHMS[0]) -> None:
        self.selection = selection

    def thresholds(self, weights: Sequence[Tensor], sparsity: float | Tensor) -> list[Tensor]:
        return [magnitude_quantile(weights, sparsity, algorithm=self.selection)] * len(weights)

    def zeros(self, shapes: Sequence[Sequence[int]], sparsity: float) -> int:
        return zeros_at(sparsity, sum(math.prod(shape) for shape in shapes))
