"""Requests to stop: a signal, a time limit, a second Ctrl-C."""

import os
import signal
from contextlib import suppress

import pytest
import torch

from engine import interruption
from engine.distributed import Ranks
from engine.interruption import Interruption

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_is_a_request_and_its_handler_is_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interruption(None, ALONE) as stop:
        assert not stop.requested(1)
        os.kill(os.getpid(), number)
        assert stop.requested(2)
        assert stop.reason == f"{number.name} was received"
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_does_not_wait() -> None:
    with Interruption(None, ALONE) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_time_limit_counts_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now)
    with Interruption(2.0, ALONE) as stop:
        now += 119
        assert not stop.requested(1)
        now += 1
        assert stop.requested(2)
        assert stop.reason == "the time limit is reached"


def test_processes_stop_together_at_a_step_they_agree_on(monkeypatch: pytest.MonkeyPatch) -> None:
    wishes = []

    def other_process_wants_to_stop(tensor: torch.Tensor) -> torch.Tensor:
        wishes.append(float(tensor))
        return tensor + 1

    monkeypatch.setattr(interruption, "all_reduce_sum", other_process_wants_to_stop)
    with Interruption(None, Ranks(0, 2, 0, torch.device("cpu"))) as stop:
        for step in range(1, 16):
            assert not stop.requested(step)  # no process asks the others at every step
        assert stop.requested(16)
        assert stop.reason == "another process is stopping"
    assert wishes == [0.0]


@pytest.mark.parametrize(("end", "called"), [(SystemExit(75), [signal.SIGUSR2]), (ValueError("x"), []), (None, [])])
def test_whoever_listened_before_hears_of_the_signal_once_the_run_has_stopped_for_it(
    end: BaseException | None, called: list[int]
) -> None:
    heard: list[int] = []
    previous = signal.signal(signal.SIGUSR2, lambda number, _: heard.append(number))  # as submitit does, to requeue
    try:
        with suppress(SystemExit, ValueError), Interruption(None, ALONE) as stop:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert stop.requested(1)
            assert heard == []
            if end is not None:
                raise end
        assert heard == called
    finally:
        signal.signal(signal.SIGUSR2, previous)
