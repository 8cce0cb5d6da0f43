"""What a framework provides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor


class Framework(ABC):
    """Turns dense weights and a sparsity into one threshold per weight."""

    @abstractmethod
    def thresholds(self, weights: Sequence[Tensor], sparsity: float) -> list[Tensor]:
        """One 0-dim threshold per tensor of ``weights``, for ``sparsity`` in (0, 1)."""

    @abstractmethod
    def zeros(self, shapes: Sequence[Sequence[int]], sparsity: float) -> int:
        """How many of the weights of ``shapes`` are zero at ``sparsity`` where no magnitudes are equal."""
