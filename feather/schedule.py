"""Sparsity as a pure function of the optimizer step.

A schedule is called with the number of optimizer steps taken so far and returns the sparsity (fraction of prunable
weights that are zero) that the next forward pass has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule(ABC):
    """``0`` before ``start_step``, ``target`` from ``end_step`` on, and ``target * ramp(x)`` in between, x in [0, 1).

    Attributes:
        target: final sparsity, in [0, 1).
        start_step: optimizer step at which pruning starts.
        end_step: optimizer step from which the target holds.
    """

    target: float
    start_step: int
    end_step: int

    def __post_init__(self) -> None:
        if not 0 <= self.target < 1:
            raise ValueError(f"sparsity={self.target!r} is outside [0, 1), the fraction of weights that are zero.")
        if self.start_step < 0:
            raise ValueError(f"start_step={self.start_step!r} is outside [0, end_step={self.end_step!r}].")
        if self.end_step < self.start_step:
            raise ValueError(f"end_step={self.end_step!r} is outside [start_step={self.start_step!r}, total_steps].")

    def __call__(self, step: int) -> float:
        if step < self.start_step:
            return 0.0
        if step >= self.end_step:
            return self.target
        return self.target * self.ramp((step - self.start_step) / (self.end_step - self.start_step))

    @abstractmethod
    def ramp(self, x: float) -> float:
        """Share of the target at the fraction ``x`` of the way from ``start_step`` to ``end_step``."""


@dataclass(frozen=True)
class Cubic(Schedule):
    """``S - S (1 - x)^3``: Zhu & Gupta, https://arxiv.org/abs/1710.01878; the schedule of Feather."""

    def ramp(self, x: float) -> float:
        return 1 - (1 - x) ** 3


@dataclass(frozen=True)
class Linear(Schedule):
    """``S x``."""

    def ramp(self, x: float) -> float:
        return x


@dataclass(frozen=True)
class OneShot(Schedule):
    """The whole target at ``start_step``; ``end_step`` equals it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "end_step", self.start_step)
        super().__post_init__()

    def ramp(self, x: float) -> float:
        return 1.0


SCHEDULES: dict[str, type[Schedule]] = {"cubic": Cubic, "linear": Linear, "one_shot": OneShot}


def create_schedule(
    name: str, sparsity: float, total_steps: int, *, start_step: int | None = None, end_step: int | None = None
) -> Schedule:
    """A schedule by name over a run of ``total_steps`` optimizer steps.

    ``start_step`` defaults to 0 and ``end_step`` to ``floor(total_steps / 2)``, the paper's choice.

    Raises:
        ValueError: unknown name, or steps that do not satisfy ``0 <= start_step <= end_step <= total_steps``.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule={name!r} is unknown: choose one of {', '.join(SCHEDULES)}.")
    start = 0 if start_step is None else start_step
    end = max(total_steps // 2, start) if end_step is None else end_step
    for argument, step in (("start_step", start), ("end_step", end)):
        if step > total_steps:
            raise ValueError(f"{argument}={step!r} is outside [0, total_steps={total_steps}].")
    if name == "one_shot" and end_step not in (None, start):
        raise ValueError(
            f"end_step={end_step!r} does not go with schedule='one_shot', which ends at start_step={start}."
        )
    return SCHEDULES[name](float(sparsity), int(start), int(end))
