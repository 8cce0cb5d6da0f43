"""What a modifier provides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch


class Modifier(ABC):
    """Acts on what the optimizer has just made of the dense weights, before the method looks at them."""

    @abstractmethod
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Change ``optimizer``'s parameters in place; their ``grad`` is the one that the step has used."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Plain values that must agree between a checkpoint and the run that resumes it."""
