"""Runs side by side share cores and GPUs: no more than fit, and the first of a kind shows what it needs."""

from dataclasses import dataclass, replace

import pytest

from engine.config import Config
from engine.machine import Cores, GPUs, this_machine
from engine.plan import Job

GIB = 2**30


def job(name="resnet20", workers=0, **trainer):
    config = Config()
    config.model.name, config.dataset.name, config.dataset.workers = name, "cifar100", workers
    config.trainer = replace(config.trainer, epochs=1, batch_size=128, **trainer)
    return Job((), config, None)


@dataclass
class Running:
    job: Job
    place: str
    warm: bool = True

    def evaluated(self):
        return self.warm


def gpus(names=("0",), at_once=4, cores=64, free=80, used=10):
    """GPUs with ``free`` GiB, of which a run takes ``used``."""
    memory = iter([free * GIB] * len(names))
    return GPUs(names, at_once, cores, lambda name: next(memory, (free - used) * GIB))


@pytest.mark.parametrize(("at_once", "threads"), [(1, 8), (2, 4), (3, 2), (8, 1), (16, 1)])
def test_cores_are_divided_evenly(at_once, threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = Cores(at_once, 8)
    assert cores.environment(cores.place(job(), [])) == {"OMP_NUM_THREADS": str(threads)}
    assert cores.place(job(), [Running(job(), "")] * (at_once - 1)) == ""
    assert cores.place(job(), [Running(job(), "")] * at_once) is None


def test_a_number_of_threads_that_was_asked_for_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert Cores(2, 8).environment("") == {"OMP_NUM_THREADS": "3"}


def test_runs_go_round_the_gpus():
    machine, running = gpus(("2", "5"), at_once=4), []
    for expected in ("2", "5"):
        place = machine.place(job(), running)
        assert place == expected
        assert machine.environment(place)["CUDA_VISIBLE_DEVICES"] == expected
        running.append(Running(job(), place))


def test_nobody_joins_a_run_until_it_has_shown_what_it_needs():
    machine, first = gpus(), Running(job(), "0", warm=False)
    assert machine.place(job(), [first]) is None
    first.warm = True
    assert machine.place(job(), [first]) == "0"
    assert machine.place(job("mobilenet_v1"), [first]) is None  # another kind, of unknown size
    assert machine.place(job(), [first, Running(job("mobilenet_v1"), "0")]) is None


@pytest.mark.parametrize(("free", "used", "fit"), [(80, 10, 7), (80, 30, 2), (80, 41, 1), (80, 79, 1), (80, 1, 8)])
def test_as_many_as_memory_permits(free, used, fit):
    machine, running = gpus(at_once=8, free=free, used=used), [Running(job(), "0")]
    while machine.place(job(), running) is not None:
        running.append(Running(job(), "0"))
    assert len(running) == fit
    assert len(running) * used <= free


def test_without_knowledge_of_memory_a_run_has_its_gpu_alone():
    machine = GPUs(["0", "1"], 8, 64, lambda name: None)
    assert machine.place(job(), [Running(job(), "0")]) == "1"
    assert machine.place(job(), [Running(job(), "0"), Running(job(), "1")]) is None


def test_decoding_processes_count_as_cores():
    machine = gpus(("0", "1"), cores=16)
    assert machine.place(job(workers=8), [Running(job(workers=8), "0")]) is None
    assert machine.place(job(workers=6), [Running(job(workers=8), "0")]) == "1"
    assert machine.place(job(workers=99), []) == "0"  # one runs in any case


def test_the_number_of_threads_does_not_depend_on_what_is_finished(monkeypatch):
    monkeypatch.setattr("engine.machine.os.sched_getaffinity", lambda pid: set(range(4)), raising=False)
    jobs = [job(device="cpu")] * 8
    assert this_machine(jobs).threads == 1
    assert this_machine(jobs, at_once=2).threads == 2
    assert this_machine(jobs[:1]).threads == 4
