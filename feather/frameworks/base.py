"""What a framework provides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from feather.schedule import Schedule


class Framework(ABC):
    """Turns dense weights and a sparsity into one threshold per weight.

    What follows from the weights alone needs ``thresholds`` and ``zeros``; what learns overrides the rest as well.

    Attributes:
        options: the constructor's keyword arguments, each with the values that it takes, its default first.
        learns: whether ``learn`` is to see the gradients.
        reaches: whether the zeros are ``zeros`` at the end; if not, they are what the training has come to.
        rounding: weights by which rounding may move the count of zeros at the end.
        unread: whether ``thresholds`` also takes a sparsity that is a tensor, of which the host reads nothing.
    """

    options: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    learns: bool = False
    reaches: bool = True
    rounding: int = 0
    unread: bool = False

    @abstractmethod
    def thresholds(self, weights: Sequence[Tensor], sparsity: Any) -> list[Tensor]:
        """One 0-dim threshold per tensor of ``weights``, for ``sparsity`` in (0, 1)."""

    @abstractmethod
    def zeros(self, shapes: Sequence[Sequence[int]], sparsity: float) -> int:
        """How many of the weights of ``shapes`` are zero at ``sparsity`` where no magnitudes are equal."""

    def start(self, schedule: Schedule, total_steps: int) -> Schedule:
        """Hear about the run before it begins, and say which schedule it is to follow."""
        return schedule

    def update(self, weights: Sequence[Tensor], step: int) -> None:  # noqa: B027
        """Prepare the ``thresholds`` for the forward pass after ``step`` optimizer steps; may change ``weights``.

        Called at every step at which weights are pruned, perhaps more than once: the second call changes nothing.
        """

    def learn(  # noqa: B027
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        groups: Sequence[Mapping[str, Any]],
        *,
        p: float,
        theta: float,
        arrived: float,
    ) -> None:
        """Take in the gradients of an optimizer step; what follows from them happens in the next step's ``update``.

        Args:
            weights: the dense weights.
            gradients: of the sparse weights, reduced and clipped; None where there is none.
            groups: for each weight the optimizer's parameter group.
            p, theta: of the method.
            arrived: the factor that the gradients of the pruned weights have on them already.
        """

    def settings(self) -> dict[str, Any]:
        """Plain values that must agree between a checkpoint and the run that resumes it."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """State that cannot be recomputed from the dense weights and the step."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore what ``state_dict`` returned."""
