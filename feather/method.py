"""What a sparse-training method is, and the family of methods that threshold magnitudes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from feather.frameworks import Framework
from feather.operator import p_threshold, p_threshold_all, p_threshold_unread, scale_pruned_gradient
from feather.schedule import Schedule


class Method(ABC):
    """Three small pieces: ``forward`` (dense weight -> the weight the model sees), ``backward`` (gradient of that ->
    gradient of the dense weight), and ``update`` (what the method recomputes or learns after an optimizer step).

    Attributes:
        sparsity: the final target, fraction of prunable weights that are zero.
        active: whether the method prunes anything at the current step; if not, the model sees the dense weights.
        identity_backward: whether ``backward`` returns its gradient unchanged, so that no hook is needed.
        rounding: weights by which rounding may move the count of zeros at the end.
    """

    sparsity: float
    active: bool = False
    identity_backward: bool = True
    rounding: int = 0

    @abstractmethod
    def scheduled_sparsity(self, step: int) -> float:
        """The sparsity that the forward pass after ``step`` optimizer steps should have."""

    @abstractmethod
    def update(self, weights: Sequence[Tensor], step: int) -> None:
        """Prepare the forward pass that follows ``step`` optimizer steps, from the dense ``weights``."""

    def make_recordable(self, device: torch.device) -> None:
        """From now on be at every step the same operations on ``device``, so that a graph of one step can be replayed.

        ``update`` is then ``announce``, which the host does at every step, and ``select``, which is recorded.

        Raises:
            ValueError: the method decides on the host what to compute.
        """
        raise ValueError(
            f"A step of {type(self).__name__} decides on the host what to compute, so that no graph of it can be "
            "recorded: train it without."
        )

    def announce(self, step: int) -> None:  # noqa: B027
        """What the host has to do for the forward pass that follows ``step`` optimizer steps."""

    def select(self, weights: Sequence[Tensor]) -> None:  # noqa: B027
        """What the device has to do for the forward pass that was announced."""

    @abstractmethod
    def forward(self, weights: Sequence[Tensor]) -> Iterable[Tensor]:
        """The sparse weight of each of the dense ``weights``, same shape and type."""

    def backward(self, index: int, grad: Tensor, sparse_weight: Tensor) -> Tensor:
        """The gradient of dense weight number ``index`` from ``grad``, that of ``sparse_weight``."""
        return grad

    def encode(self, index: int, weight: Tensor) -> Tensor:
        """The dense weight number ``index`` that stands for ``weight``, one from outside: initial or loaded."""
        return weight

    def before_step(  # noqa: B027
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        groups: Sequence[Mapping[str, Any]],
    ) -> None:
        """Look at the gradients of the dense ``weights``, or change them in place, before the optimizer uses them.

        They are reduced over all processes and clipped by then, which those that ``backward`` sees are not.

        Args:
            weights: the dense weights.
            gradients: theirs, None where there is none.
            groups: for each weight the optimizer's parameter group, with its ``lr`` and ``weight_decay``.
        """

    @abstractmethod
    def expected_zeros(self, shapes: Sequence[Sequence[int]]) -> int | None:
        """Zeros at the end where no magnitudes tie; None for a method that does not control them to the weight."""

    def thresholds(self) -> list[Tensor] | None:
        """One 0-dim threshold per weight, or None for a method without thresholds."""
        return None

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Plain values that must agree between a checkpoint and the run that resumes it."""

    def state_dict(self) -> dict[str, Any]:
        """State that cannot be recomputed from the dense weights and the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore what ``state_dict`` returned."""


class Thresholding(Method):
    """Magnitude thresholding: operator (p) x gradient rule (theta) x framework x schedule.

    Feather is p = 3 with theta = ``auto_theta(S)``; gradual magnitude pruning is p = inf, theta = 0; the hard
    straight-through estimator p = inf, theta = 1; soft thresholding p = 1, theta = 1.
    """

    def __init__(self, schedule: Schedule, framework: Framework, *, p: float, theta: float) -> None:
        self.schedule = schedule
        self.framework = framework
        self.p = p
        self.theta = theta
        self.sparsity = schedule.target
        # theta = 0 leaves nothing of the pruned weights' gradients to learn from: before_step removes them instead
        self._masks_late = theta == 0 and framework.learns
        self.identity_backward = theta == 1 or self._masks_late
        self.rounding = max(self.rounding, framework.rounding)
        self._thresholds: list[Tensor] = []
        self._sparsity = 0.0
        self._unread: Tensor | None = None  # the same on the device, where the host is to read nothing back

    def scheduled_sparsity(self, step: int) -> float:
        return self.schedule(step)

    def update(self, weights: Sequence[Tensor], step: int) -> None:
        self.announce(step)
        if self.active:
            self.framework.update(weights, step)
            self.select(weights)

    def make_recordable(self, device: torch.device) -> None:
        if type(self) is not Thresholding:
            super().make_recordable(device)
        if not self.framework.unread:
            raise ValueError(
                f"The framework {type(self.framework).__name__} computes its thresholds from numbers of the host, so "
                "that no graph of a step can be recorded: use the framework global, or train without."
            )
        self._unread = torch.zeros((), dtype=torch.float64, device=device)

    def announce(self, step: int) -> None:
        self._sparsity = self.schedule(step)
        self.active = self._sparsity > 0
        if self._unread is not None:
            self._unread.fill_(self._sparsity)

    def select(self, weights: Sequence[Tensor]) -> None:
        if not self.active:
            return
        if self._unread is None:
            self._thresholds = self.framework.thresholds(weights, self._sparsity)
            return
        before, self._thresholds = self._thresholds, self.framework.thresholds(weights, self._unread)
        if before:  # what is read after a replay has to be where the recorded step writes
            for kept, found in {id(k): (k, f) for k, f in zip(before, self._thresholds, strict=True)}.values():
                kept.copy_(found)
            self._thresholds = before

    def forward(self, weights: Sequence[Tensor]) -> Iterable[Tensor]:
        if not self.active:
            return weights
        if self._unread is not None:
            return p_threshold_unread(weights, self._thresholds, self.p)
        if len({(weight.device, weight.dtype) for weight in weights}) == 1:
            return p_threshold_all(weights, self._thresholds, self.p)
        return [p_threshold(w, t, self.p) for w, t in zip(weights, self._thresholds, strict=True)]

    def backward(self, index: int, grad: Tensor, sparse_weight: Tensor) -> Tensor:
        return scale_pruned_gradient(grad, sparse_weight, self.theta) if self.active else grad

    def before_step(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        groups: Sequence[Mapping[str, Any]],
    ) -> None:
        if not (self.active and self.framework.learns):
            return
        arrived = 1.0 if self._masks_late else self.theta
        self.framework.learn(weights, gradients, groups, p=self.p, theta=self.theta, arrived=arrived)
        if self._masks_late:  # after clipping, which therefore sees these gradients in full
            for weight, grad, threshold in zip(weights, gradients, self._thresholds, strict=True):
                if grad is not None:
                    grad.masked_fill_((weight.abs() <= threshold) & (threshold > 0), 0)

    def expected_zeros(self, shapes: Sequence[Sequence[int]]) -> int | None:
        return self.framework.zeros(shapes, self.sparsity) if self.framework.reaches else None

    def thresholds(self) -> list[Tensor] | None:
        return self._thresholds if self.active else None

    def settings(self) -> dict[str, Any]:
        return {
            "p": self.p,
            "theta": self.theta,
            "framework": type(self.framework).__name__,
            "schedule": repr(self.schedule),
            **self.framework.settings(),
        }

    def state_dict(self) -> dict[str, Any]:
        return self.framework.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.framework.load_state_dict(state)


class FixedMask(Method):
    """Keep the zeros that the weights have now: ``w * mask``, gradients and weight decay only on the kept weights."""

    identity_backward = False

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.masks = [weight.detach() != 0 for weight in weights]
        self.active = True
        self._zeros = sum(int((~mask).sum()) for mask in self.masks)
        self.sparsity = self._zeros / sum(mask.numel() for mask in self.masks)

    def scheduled_sparsity(self, step: int) -> float:
        return self.sparsity

    def update(self, weights: Sequence[Tensor], step: int) -> None:
        self.masks = [mask.to(weight.device) for mask, weight in zip(self.masks, weights, strict=True)]

    def forward(self, weights: Sequence[Tensor]) -> Iterable[Tensor]:
        return (torch.where(mask, weight, 0) for mask, weight in zip(self.masks, weights, strict=True))

    def backward(self, index: int, grad: Tensor, sparse_weight: Tensor) -> Tensor:
        return torch.where(self.masks[index], grad, 0)

    def expected_zeros(self, shapes: Sequence[Sequence[int]]) -> int | None:
        return None  # a kept weight may reach zero by training

    def settings(self) -> dict[str, Any]:
        return {"mask": "fixed"}

    def state_dict(self) -> dict[str, Any]:
        return {"masks": self.masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.masks = [mask.to(torch.bool) for mask in state["masks"]]
