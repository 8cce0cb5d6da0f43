"""A tracker in a thread of its own, so that no server on the other side of a network can hold up training."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.tracking import Tracker

_FINISH_SECONDS = 60.0  # for what a server has not taken by the end of a run; `wandb sync` sends the rest

_log = logging.getLogger(__name__)


class BackgroundTracker:
    """Hands everything on, in order, to the tracker that ``create`` makes; no call but ``finish`` takes time.

    Args:
        create: makes the tracker; it may take as long as it likes.
        say: is told the tracker's description, once it is known.
    """

    def __init__(self, create: Callable[[], Tracker], say: Callable[[str], object]) -> None:
        self.description = "W&B: connecting; training does not wait for it"
        for tracker in _working[:]:  # of a run before in this process, which ended without finishing it
            tracker.finish()
        _working.append(self)
        self._create, self._say = create, say
        self._calls: queue.SimpleQueue[Callable[[Tracker], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        tracker = self._create()
        self._say(tracker.description)
        last = False
        while not last:
            call = self._calls.get()
            call(tracker)
            last = call == _finish

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        record = dict(metrics)
        self._calls.put(lambda tracker: tracker.log(record, step))

    def summary(self, result: Mapping[str, Any]) -> None:
        self._calls.put(lambda tracker: tracker.summary(result))

    def artifact(self, path: str | Path, name: str) -> None:
        self._calls.put(lambda tracker: tracker.artifact(path, name))

    def finish(self) -> None:
        """Wait for the server, but not for ever."""
        self._calls.put(_finish)
        self._thread.join(_FINISH_SECONDS)
        if self in _working:
            _working.remove(self)
        if self._thread.is_alive():
            _log.warning(
                "W&B did not take everything within %.0f s; metrics.jsonl holds all, `wandb sync` sends the rest",
                _FINISH_SECONDS,
            )


_working: list[BackgroundTracker] = []


def _finish(tracker: Tracker) -> None:
    tracker.finish()
