"""Full disks, vanished folders, second processes, dead peers: named in one sentence, and the run goes on to the bit."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import engine.checkpoint
import engine.records
from engine.checkpoint import list_checkpoints
from engine.config import ConfigError
from engine.data import create_data
from engine.evaluate import evaluate
from engine.interruption import EXIT_UNFINISHED
from engine.lock import NAME, hold, release
from models import create_model
from tests.train_helpers import (
    ROOT,
    TINY,
    Command,
    command,
    outcome,
    read_json,
    read_metrics,
    read_weights,
    start,
    two_processes,
)

LONG = pytest.mark.long
RUN = (*TINY, "trainer.log_every=1", "run_dir=run")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    release()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the uninterrupted run leaves."""
    folder = tmp_path_factory.mktemp("whole")
    assert command(*RUN, cwd=folder).status == 0
    return outcome(folder / "run")


# ---- the lock --------------------------------------------------------------------------------------------------------

HOLDER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from engine.lock import hold
hold(Path({folder!r}))
child = os.fork()  # as a data worker is
if child:
    print(child, flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_owner_is_free_although_its_worker_lives(tmp_path: Path) -> None:
    program = HOLDER.format(root=str(ROOT), folder=str(tmp_path))
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    worker = int(owner.stdout.readline())
    try:
        with pytest.raises(ConfigError, match=rf"is in use by another process \(process {owner.pid} on .*\): wait"):
            hold(tmp_path)
        owner.kill()
        owner.wait()
        os.kill(worker, 0)  # lives
        hold(tmp_path)
        assert f"process {os.getpid()} " in (tmp_path / NAME).read_text()
    finally:
        os.kill(worker, signal.SIGKILL)
        owner.kill()
    release()
    assert not (tmp_path / NAME).exists()


def test_a_lock_whose_file_was_replaced_is_not_trusted(tmp_path: Path) -> None:
    hold(tmp_path)
    (tmp_path / NAME).unlink()
    hold(tmp_path)  # anew
    assert (tmp_path / NAME).exists()


def test_where_locks_are_not_supported_a_run_works_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    hold(tmp_path)
    assert "cannot be locked" in caplog.text


def wait_for(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_second_process_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    long = (*RUN, "trainer.epochs=2000")
    first = Command(*long, cwd=tmp_path)
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    second = command(*long, cwd=tmp_path, name="second")
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.join()
    assert second.status == 1
    assert "run_dir=run is in use by another process" in second.err
    assert len(second.err.splitlines()) == 1
    assert "overwrite" not in second.err
    steps = [record["step"] for record in read_metrics(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))


# ---- disks -----------------------------------------------------------------------------------------------------------


def limit_files(size: int) -> None:
    """No file of this process grows beyond ``size`` bytes, as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_disk_that_is_full_is_one_sentence_and_the_checkpoint_before_stays(tmp_path: Path, whole: Any) -> None:
    stopped = command(*RUN, "time_limit_minutes=0.00001", cwd=tmp_path)
    assert stopped.status == EXIT_UNFINISHED
    (kept,) = list_checkpoints(tmp_path / "run")
    content = kept.read_bytes()
    full = command(*RUN, cwd=tmp_path, before=limit_files, with_arguments=(len(content) // 2,))
    assert full.status == 1, full
    assert "Traceback" not in full.err
    last = full.err.splitlines()[-1]
    assert "The checkpoint of step 4 cannot be written to run (File too large): make room" in last
    assert list_checkpoints(tmp_path / "run") == [kept]
    assert kept.read_bytes() == content
    assert not list((tmp_path / "run").glob(".tmp-*"))
    assert command(*RUN, cwd=tmp_path).status == 0
    assert outcome(tmp_path / "run") == whole


@pytest.mark.parametrize("number", [errno.ENOSPC, *(pytest.param(n, marks=LONG) for n in (errno.EROFS, errno.EACCES))])
def test_a_record_that_cannot_be_written_is_one_sentence(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, record: Any) -> None:
        raise OSError(number, os.strerror(number), str(self.path))

    monkeypatch.setattr(engine.records.MetricsLog, "append", refuse)
    with pytest.raises(ConfigError) as told:
        start("run_dir=run")
    assert str(told.value).startswith(f"run/metrics.jsonl: {os.strerror(number).lower()}; the same command goes on")


def test_a_read_only_run_directory_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "run/.lock")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match=r"^run_dir=run cannot be written \(Read-only file system\): name another"):
        start("run_dir=run")


def test_a_directory_that_vanishes_is_named_and_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    append = engine.records.MetricsLog.append

    def append_and_lose(self: Any, record: Any) -> None:
        append(self, record)
        if record["step"] == 3:
            shutil.rmtree("run")

    monkeypatch.setattr(engine.records.MetricsLog, "append", append_and_lose)
    with pytest.raises(ConfigError, match="run_dir=run has vanished while the run was working in it: restore it"):
        start("run_dir=run", "trainer.log_every=1")
    assert not Path("run").exists()


@pytest.mark.parametrize("damage", ["cut", *(pytest.param(kind, marks=LONG) for kind in ("gone", "zeros", "middle"))])
def test_damaged_metrics_come_back_from_the_checkpoint(
    damage: str, whole: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        start("run_dir=run", "trainer.log_every=1", "time_limit_minutes=0.00001")
    metrics = Path("run/metrics.jsonl")
    content = metrics.read_bytes()
    match damage:
        case "cut":
            metrics.write_bytes(content[:-30])
        case "gone":
            metrics.unlink()
        case "zeros":
            metrics.write_bytes(content[:50] + bytes(len(content) - 50))
        case "middle":
            metrics.write_bytes(content[:20] + b"\xff" + content[21:])
    start("run_dir=run", "trainer.log_every=1")
    assert "METRICS DAMAGED" in caplog.text
    assert outcome(Path("run")) == whole


def test_a_half_written_line_after_the_checkpoint_is_dropped_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SystemExit):
        start("run_dir=run", "trainer.log_every=1", "time_limit_minutes=0.00001")
    with Path("run/metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "trai')
    start("run_dir=run", "trainer.log_every=1")
    assert [record["step"] for record in read_metrics(Path("run"))] == list(range(1, 9))
    assert "DAMAGED" not in caplog.text


def test_a_checkpoint_of_an_older_version_is_read(monkeypatch: pytest.MonkeyPatch, whole: Any) -> None:
    """The first version's had no history of metrics and no counts of steps left out."""
    save = engine.checkpoint.save_checkpoint

    def as_before(directory: Path, state: dict[str, Any], step: int) -> Path:
        return save(directory, {k: v for k, v in state.items() if k not in ("metrics", "guard")}, step)

    with monkeypatch.context() as patch:
        patch.setattr(engine.checkpoint, "save_checkpoint", as_before)
        with pytest.raises(SystemExit):
            start("run_dir=run", "trainer.log_every=1", "time_limit_minutes=0.00001")
    start("run_dir=run", "trainer.log_every=1")
    assert outcome(Path("run")) == whole


# ---- signals ---------------------------------------------------------------------------------------------------------


def signalled(where: str, number: int) -> None:
    """This process sends itself a signal as it comes to ``where``, or in its sixth step."""
    import importlib

    from torch.optim.optimizer import register_optimizer_step_pre_hook

    if where == "training":
        seen = iter(range(1, 99))
        register_optimizer_step_pre_hook(lambda *_: os.kill(os.getpid(), number) if next(seen) == 6 else None)
        return
    module, name = {"setup": ("engine.data", "create_data"), "end": ("engine.outcome", "describe_result")}[where]
    owner = importlib.import_module(module)
    function = getattr(owner, name)

    def send(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), number)
        return function(*args, **options)

    setattr(owner, name, send)


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("training", signal.SIGUSR2),
        ("setup", signal.SIGTERM),
        pytest.param("training", signal.SIGINT, marks=LONG),
        pytest.param("end", signal.SIGUSR2, marks=LONG),
    ],
)
def test_a_signal_at_any_time_ends_with_the_status_that_asks_for_a_restart(
    where: str, number: signal.Signals, tmp_path: Path
) -> None:
    ended = command(*RUN, cwd=tmp_path, before=signalled, with_arguments=(where, number))
    assert ended.status == EXIT_UNFINISHED == 75
    assert f"{number.name} was received; the same command goes on from here." in ended.out
    assert "Traceback" not in ended.err
    if where == "training":
        assert "Stopped after step 6 of 8" in ended.out
    again = command(*RUN, cwd=tmp_path)
    assert again.status == 0
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == list(range(1, 9))


# ---- processes -------------------------------------------------------------------------------------------------------


def die_in_step(step: int, rank: str) -> None:
    from tests.train_helpers import die_at

    if os.environ["RANK"] == rank:
        die_at("in", step)


@pytest.mark.parametrize("rank", ["1", pytest.param("0", marks=LONG)])
def test_a_dead_process_ends_the_others_soon_and_the_job_goes_on(rank: str, tmp_path: Path) -> None:
    pair = (*RUN, "trainer.batch_size=361")
    began = time.monotonic()
    ends = two_processes(*pair, cwd=tmp_path, before=die_in_step, with_arguments=(6, rank))
    assert time.monotonic() - began < 100
    dead, other = ends[int(rank)], ends[1 - int(rank)]
    assert dead.status == -signal.SIGKILL
    assert other.status == 1
    assert "Traceback" not in other.err
    assert "ends because another one has ended or does not answer" in other.err.splitlines()[-1]
    assert [end.status for end in two_processes(*pair, cwd=tmp_path)] == [0, 0]
    (tmp_path / "whole").mkdir()
    assert [end.status for end in two_processes(*pair, cwd=tmp_path / "whole")] == [0, 0]
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole" / "run")
    assert_the_saved_model_is_what_was_evaluated(tmp_path / "whole" / "run")


def assert_the_saved_model_is_what_was_evaluated(run: Path) -> None:
    """By one process, which has the main process's BatchNorm statistics alone."""
    data = create_data("digits", root="", batch_size=361, seed=0, device="cpu", image_size=8)
    model = create_model("resnet20", num_classes=10, width=4)
    model.load_state_dict(read_weights(run))
    result = read_json(run / "result.json")
    loss, top1 = evaluate(model, data.eval.epoch(0))
    assert (top1, loss) == (result["final_top1"], pytest.approx(result["final_loss"], rel=1e-5))


@pytest.mark.parametrize("workers", [2, *(pytest.param(n, marks=LONG) for n in (1, 5))])
def test_any_number_of_data_workers_gives_the_same_bits(workers: int, tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 2)):
        for label in range(3):
            folder = tmp_path / "data" / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.random.default_rng([label, index]).integers(0, 256, (24, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    options = (
        "dataset=imagenet", "dataset.root=data", "dataset.download=false", "dataset.image_size=16",
        "trainer=deterministic", "model=resnet20", "model.options.width=8", "trainer.batch_size=5", "trainer.epochs=2",
        "trainer.device=cpu", "trainer.precision=fp32", "logger=none", "trainer.log_every=1", "method.exclude=[fc.*]",
    )  # fmt: skip
    for number in (0, workers):
        ended = command(*options, f"dataset.workers={number}", f"run_dir=run{number}", cwd=tmp_path)
        assert ended.status == 0, ended.err
    assert outcome(tmp_path / f"run{workers}") == outcome(tmp_path / "run0")


@LONG
def test_torchrun_restarts_a_job_whose_process_died_to_the_same_bits(tmp_path: Path) -> None:
    """One process kills itself in its first life; torchrun starts both again."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.train_helpers import die_at
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ.get("DIE"):
    die_at("in", 6)
sys.argv[0] = {str(ROOT / "train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    for folder, dies in (("killed", "1"), ("whole", "")):
        (tmp_path / folder).mkdir()
        ended = subprocess.run(
            [*launch, str(program), *RUN, "trainer.batch_size=361"], capture_output=True, text=True, timeout=400,
            cwd=tmp_path / folder, env={**os.environ, "DIE": dies, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        assert ("Going on from" in ended.stdout) is bool(dies)
    assert outcome(tmp_path / "killed" / "run") == outcome(tmp_path / "whole" / "run")
