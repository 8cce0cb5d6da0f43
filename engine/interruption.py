"""Stopping cleanly: a signal or a time limit sets a flag, the step finishes, the state is saved.

Before and after training there is nothing to save: a signal ends the process at once, with the same exit status.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import torch

from engine.distributed import Ranks, all_reduce_sum

EXIT_UNFINISHED = 75
"""Exit status of a run that saved its state and wants to be started again (sysexits' EX_TEMPFAIL)."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_AGREE_EVERY = 16  # steps between two rounds of asking all processes


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Around a whole run: a signal that nobody else listens to ends it with ``EXIT_UNFINISHED``."""
    unheard = [n for n in _SIGNALS if signal.getsignal(n) in (signal.SIG_DFL, signal.default_int_handler)]
    before = {number: signal.signal(number, _stop) for number in unheard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    name = signal.Signals(number).name
    print(f"Stopped outside of training: {name} was received; the same command goes on from here.", flush=True)
    sys.exit(EXIT_UNFINISHED)


class Interruption:
    """Collects requests to stop; use it as a context manager around the training loop.

    Args:
        time_limit_minutes: stop after so long; None for no limit.
        ranks: with several processes, all of them stop at the same step.
        since: the ``time.monotonic()`` from which the limit counts; now, where it is None.
    """

    def __init__(self, time_limit_minutes: float | None, ranks: Ranks, since: float | None = None) -> None:
        self.reason = ""
        began = time.monotonic() if since is None else since
        self._deadline = None if time_limit_minutes is None else began + 60 * time_limit_minutes
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
        if kind is SystemExit and callable(before) and before not in (signal.default_int_handler, _stop):
            before(self._received, None)  # now that the state is saved, such as submitit's, which requeues the job
