"""An interrupted run that is started again ends with the same bits as one that nothing interrupted."""

import functools
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import list_checkpoints
from engine.interruption import EXIT_UNFINISHED
from tests.train_helpers import (
    TINY,
    Finished,
    command,
    die_at,
    outcome,
    plain_network,
    read_json,
    read_metrics,
    start,
    two_processes,
)

# Two epochs of four steps. Records are written at every step, so that some are later than the last checkpoint.
FEATHER = (*TINY, "method.theta=0.5", "trainer.log_every=1", "run_dir=run")
DENSE = (*TINY, "method=dense", "sparsity=0", "trainer.log_every=1", "run_dir=run")
BF16, FP16 = "trainer.precision=bf16", "trainer.precision=fp16"


@functools.cache
def uninterrupted(*arguments: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        assert command(*arguments, cwd=Path(folder)).status == 0
        return outcome(Path(folder) / "run")


def interrupt(arguments: tuple[str, ...], cwd: Path, when: str, step: int) -> Finished:
    return command(*arguments, cwd=cwd, before=die_at, with_arguments=(when, step))


def steps_saved(run: Path) -> list[int]:
    return [int(path.name[len("checkpoint_") :][:8]) for path in list_checkpoints(run)]


@pytest.mark.parametrize(
    ("arguments", "when", "step", "saved"),
    [
        pytest.param(FEATHER, "in", 7, [4], id="fp32, in mid-epoch"),
        pytest.param((*FEATHER, BF16), "in", 7, [4], id="bf16, in mid-epoch"),
        pytest.param((*FEATHER, FP16), "in", 7, [4], id="fp16, in mid-epoch", marks=pytest.mark.long),
        pytest.param((*DENSE, BF16), "in", 6, [4], id="dense bf16, in mid-epoch", marks=pytest.mark.long),
        pytest.param(FEATHER, "checkpoint", 4, [4], id="fp32, between epochs"),
        pytest.param((*FEATHER, BF16), "checkpoint", 4, [4], id="bf16, between epochs", marks=pytest.mark.long),
        pytest.param(DENSE, "checkpoint", 4, [4], id="dense fp32, between epochs"),
        pytest.param(FEATHER, "checkpoint", 8, [8, 4], id="trained, but without a result"),
        pytest.param(FEATHER, "in", 2, [], id="before the first checkpoint"),
    ],
)
def test_after_kill_9_the_same_command_ends_with_the_same_bits(
    arguments: tuple[str, ...], when: str, step: int, saved: list[int], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert interrupt(arguments, tmp_path, when, step).status == -signal.SIGKILL
    assert steps_saved(run) == saved
    assert not (run / "result.json").exists()
    again = command(*arguments, cwd=tmp_path)
    assert again.status == 0, again.err
    assert (f"at step {saved[0]} of 8" in again.out) if saved else ("Going on" not in again.out)
    assert outcome(run) == uninterrupted(*arguments)
    assert [record["step"] for record in read_metrics(run)] == list(range(1, 9))
    assert steps_saved(run) == [8, 4]


def test_after_sigterm_the_state_of_that_very_step_is_saved(tmp_path: Path) -> None:
    stopped = interrupt(FEATHER, tmp_path, "term", 6)
    assert stopped.status == EXIT_UNFINISHED == 75
    assert "Stopped after step 6 of 8: SIGTERM was received; the same command goes on from here." in stopped.out
    assert steps_saved(tmp_path / "run") == [6, 4]
    assert command(*FEATHER, cwd=tmp_path).status == 0
    assert outcome(tmp_path / "run") == uninterrupted(*FEATHER)


def test_a_time_limit_stops_after_a_step_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (1, 2):
        with pytest.raises(SystemExit) as stopped:
            start(*FEATHER, "time_limit_minutes=0.00001")
        assert stopped.value.code == EXIT_UNFINISHED
        assert steps_saved(Path("run"))[0] == step
        assert "the time limit is reached" in capsys.readouterr().out
    start(*FEATHER)
    assert outcome(Path("run")) == uninterrupted(*FEATHER)


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    interrupt(FEATHER, tmp_path, "checkpoint", 8)
    newest, _ = list_checkpoints(tmp_path / "run")
    newest.write_bytes(newest.read_bytes()[:-100])
    again = command(*FEATHER, cwd=tmp_path)
    assert "CHECKPOINT DAMAGED" in again.err
    assert "at step 4 of 8" in again.out
    assert outcome(tmp_path / "run") == uninterrupted(*FEATHER)


# ---- two processes ---------------------------------------------------------------------------------------------------

# batches of 361: the last one of an epoch has 355 images, which two processes cannot share evenly
PAIR = (*FEATHER, "trainer.batch_size=361")


def compare(run: Path, other: Path) -> None:
    records, others = read_metrics(run), read_metrics(other)
    assert [record["step"] for record in records] == [record["step"] for record in others]
    for record, expected in zip(records, others, strict=True):
        assert record.keys() == expected.keys()
        for key in record.keys() - {"perf/images_per_second"}:
            # sums in another order; a weight at the threshold or an image at the boundary may change sides
            exact = key in ("step", "epoch", "train/lr", "sparsity/target", "sparsity/global")
            tolerance = 0 if exact else 0.3 if key == "val/top1" else 2e-3 if key.startswith("sparsity") else 1e-4
            assert record[key] == pytest.approx(expected[key], rel=tolerance, abs=tolerance), key


def test_two_processes_train_as_one_and_only_the_first_writes(tmp_path: Path) -> None:
    folders = one, two, stopped = [tmp_path / name for name in ("one", "two", "stopped")]
    for folder in folders:
        folder.mkdir()
    assert command(*PAIR, cwd=one, before=plain_network).status == 0
    ends = two_processes(*PAIR, cwd=two, before=plain_network)
    assert [end.status for end in ends] == [0, 0], ends
    assert "2 x cpu" in ends[0].out
    assert ends[1].out == ""
    assert "epoch" not in ends[1].err
    compare(two / "run", one / "run")
    assert read_json(two / "rank0.json") == read_json(two / "rank1.json")
    zeros = [read_json(folder / "run" / "result.json")["zeros"] for folder in (one, two)]
    assert zeros[0] == zeros[1] > 0
    left = sorted(path.name for path in two.iterdir() if not path.name.startswith("."))
    assert left == ["rank0.json", "rank1.json", "run"]

    # a signal to either process stops both, at a step they agree on, and both go on
    ends = two_processes(*PAIR, cwd=stopped, before=plain_network, with_arguments=("term", 2))
    assert [end.status for end in ends] == [EXIT_UNFINISHED] * 2
    assert steps_saved(stopped / "run") == [4]
    assert [end.status for end in two_processes(*PAIR, cwd=stopped, before=plain_network)] == [0, 0]
    assert outcome(stopped / "run") == outcome(two / "run")
