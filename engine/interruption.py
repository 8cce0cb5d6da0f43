"""Stopping cleanly: a signal or a time limit sets a flag, the step finishes, the state is saved."""

from __future__ import annotations

import signal
import time
from types import FrameType

import torch

from engine.distributed import Ranks, all_reduce_sum

EXIT_UNFINISHED = 75
"""Exit status of a run that saved its state and wants to be started again (sysexits' EX_TEMPFAIL)."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_AGREE_EVERY = 16  # steps between two rounds of asking all processes


class Interruption:
    """Collects requests to stop; use it as a context manager around the training loop.

    Args:
        time_limit_minutes: stop after so long; None for no limit.
        ranks: with several processes, all of them stop at the same step.
    """

    def __init__(self, time_limit_minutes: float | None, ranks: Ranks) -> None:
        self.reason = ""
        self._deadline = None if time_limit_minutes is None else time.monotonic() + 60 * time_limit_minutes
        self._ranks = ranks
        self._previous: dict[int, object] = {}
        self._received: int | None = None

    def requested(self, step: int) -> bool:
        """Whether to stop after ``step``."""
        if not self.reason and self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = "the time limit is reached"
        if self._ranks.world_size == 1:
            return bool(self.reason)
        if step % _AGREE_EVERY:
            return False
        wishes = torch.tensor(float(bool(self.reason)), device=self._ranks.device)
        agreed = bool(all_reduce_sum(wishes))
        self.reason = self.reason or ("another process is stopping" if agreed else "")
        return agreed

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self.reason, self._received = f"{signal.Signals(number).name} was received", number

    def __enter__(self) -> Interruption:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        before = self._previous.get(self._received) if self._received is not None else None
        if kind is SystemExit and callable(before) and before is not signal.default_int_handler:
            before(self._received, None)  # now that the state is saved, such as submitit's, which requeues the job
