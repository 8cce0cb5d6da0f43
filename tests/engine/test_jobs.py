"""Jobs run in order, side by side; one failure stops nobody, one request to stop stops all."""

import signal

import pytest
import torch

from engine import jobs as module
from engine.config import Config
from engine.distributed import Ranks
from engine.interruption import Interruption
from engine.jobs import run_all
from engine.machine import Cores
from engine.plan import Job


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0)


class Fake:
    """A run that ends with ``status`` after ``polls`` looks at it."""

    def __init__(self, job, place, status, polls):
        self.job, self.place, self.last_line = job, place, f"line of {job.directory.name}"
        self.status, self.polls, self.stopped, self.killed = status, polls, 0, False
        (job.directory / "run.json").parent.mkdir(parents=True, exist_ok=True)
        (job.directory / "run.json").touch()

    def poll(self):
        self.polls -= 1
        return self.status if self.polls < 0 or self.stopped else None

    def stop(self):
        self.stopped += 1
        self.status = 75

    def kill(self):
        self.killed = True

    def evaluated(self):
        return False


def make(tmp_path, number):
    config = Config()
    config.dataset.name = "digits"
    return [Job((), config, tmp_path / str(n)) for n in range(number)]


def execute(jobs, statuses, at_once=2, polls=2, each_round=None, run=Fake):
    events, started = [], []
    with Interruption(None, Ranks(0, 1, 0, torch.device("cpu"))) as stopping:

        def start(job, place, environment):
            started.append(run(job, place, statuses[jobs.index(job)], polls))
            return started[-1]

        def tell(event, run, status):
            events.append((event, run.job.directory.name))
            if each_round:
                each_round(stopping, events)

        ended = run_all(jobs, Cores(at_once, 2), start, stopping, tell)
    return {job.directory.name: end for job, end in ended.items()}, events, started, stopping


def test_a_failure_stops_nobody_and_has_its_reason(tmp_path):
    ended, events, _, _ = execute(make(tmp_path, 4), [0, 1, -9, 0])
    assert ended == {
        "0": (0, ""), "1": (1, "line of 1"), "2": (-9, "it was ended by SIGKILL (was the memory full?)."), "3": (0, ""),
    }  # fmt: skip
    assert [name for event, name in events if event == "started"] == ["0", "1", "2", "3"]
    assert [name for event, name in events if event == "failed"] == ["1", "2"]


def test_never_more_at_once_than_there_are_places(tmp_path):
    running, most = set(), []

    def watch(_, events):
        event, name = events[-1]
        (running.add if event == "started" else running.discard)(name)
        most.append(len(running))

    execute(make(tmp_path, 7), [0] * 7, at_once=3, each_round=watch)
    assert max(most) == 3


def test_a_request_to_stop_stops_every_run_once_and_starts_no_other(tmp_path):
    def ask(stopping, events):
        if len(events) == 2:
            signal.raise_signal(signal.SIGTERM)

    ended, _, started, stopping = execute(make(tmp_path, 5), [0] * 5, polls=1000, each_round=ask)
    assert ended == {"0": (75, ""), "1": (75, "")}
    assert [run.stopped for run in started] == [1, 1]
    assert stopping.reason == "SIGTERM was received"


def test_a_run_that_dies_of_the_request_while_starting_up_has_not_failed(tmp_path):
    class Starting(Fake):
        def stop(self):
            super().stop()
            self.status = -signal.SIGTERM

    ask = lambda stopping, events: signal.raise_signal(signal.SIGTERM)  # noqa: E731
    ended, *_ = execute(make(tmp_path, 3), [0] * 3, polls=1000, each_round=ask, run=Starting)
    assert set(ended.values()) == {(75, "")}


def test_a_run_that_somebody_stops_ends_the_whole(tmp_path):
    ended, _, started, stopping = execute(make(tmp_path, 5), [75, 0, 0, 0, 0], at_once=1)
    assert ended == {"0": (75, "")}
    assert len(started) == 1
    assert stopping.reason


def test_an_error_leaves_no_process_behind(tmp_path):
    def fail(_, events):
        if events[-1][0] == "finished":
            raise OSError("the disk is full")

    seen = []

    class Seen(Fake):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.polls = 1 if not seen else 1000
            seen.append(self)

    with pytest.raises(OSError, match="disk"):
        execute(make(tmp_path, 4), [0] * 4, each_round=fail, run=Seen)
    assert [run.killed for run in seen] == [False, True]


def test_while_one_run_fetches_the_data_the_others_wait(tmp_path):
    class Downloading(Fake):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            (self.job.directory / "run.json").unlink()

        def poll(self):
            if self.polls == 4:
                (self.job.directory / "run.json").touch()
            return super().poll()

    seen_by_second = []

    class Second(Downloading):
        def __init__(self, job, *rest):
            seen_by_second.append((tmp_path / "0" / "run.json").exists())
            super().__init__(job, *rest)

    _, events, _, _ = execute(make(tmp_path, 3), [0] * 3, at_once=3, polls=6, run=Second)
    assert [event for event, _ in events] == ["started"] * 3 + ["finished"] * 3
    assert seen_by_second == [False, True, True]

    class Failing(Downloading):
        def poll(self):
            return 1  # before the data are there

    _, events, _, _ = execute(make(tmp_path / "b", 2), [0] * 2, run=Failing)
    assert [event for event, _ in events] == ["started", "failed"] * 2
