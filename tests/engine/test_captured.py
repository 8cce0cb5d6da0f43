"""Runs whose steps are recorded and replayed; the stand-in for CUDA graphs is `tests.graph_recorder`."""

import math
from pathlib import Path

import pytest
import torch

import engine.captured
import engine.optimization
from engine.captured import WARM_UP, recorder
from engine.checkpoint import load_checkpoint
from engine.config import ConfigError
from engine.distributed import Ranks
from engine.precision import resolve_precision
from engine.seeding import set_deterministic
from tests.graph_recorder import GraphRecorder
from tests.train_helpers import outcome, read_metrics, start

STEPS = 20  # five epochs, the fourth step of each with fewer images
RUN = ("trainer.epochs=5", "trainer.log_every=1", "sparsity=0.96")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    yield
    set_deterministic(False)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> GraphRecorder:
    """In place of CUDA's."""
    stand_in = GraphRecorder()
    monkeypatch.setattr(engine.captured, "recorder", lambda ranks, precision: stand_in)
    return stand_in


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("trainer.accumulate=3", "trainer.label_smoothing=0.1", "trainer.clip_grad_norm=null"),
        ("method=gmp", "trainer.precision=bf16", "model.options.width=1", "trainer.epochs=4"),
        ("optimizer=adamw", "optimizer.lr=0.01", "lr_schedule.warmup_epochs=1"),
        ("sparsity=0",),
        ("sparsity_schedule.start_fraction=0.4",),
    ],
    ids=["feather", "micro-batches", "gmp-bf16", "adamw", "dense", "late"],
)
def test_a_run_of_replays_is_the_run_of_the_same_steps_taken_one_by_one(
    options: tuple[str, ...], graphs: GraphRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(*RUN, *options, "trainer.capture=true", "run_dir=replayed")
    shapes = 2
    assert graphs.replays >= 16 - 2 * shapes * WARM_UP
    replays = graphs.replays
    monkeypatch.setattr(engine.captured, "WARM_UP", STEPS)
    start(*RUN, *options, "trainer.capture=true", "run_dir=ordinary")
    assert graphs.replays == replays
    assert outcome(Path("replayed")) == outcome(Path("ordinary"))


def test_what_captured_steps_compute_is_what_all_steps_compute(graphs: GraphRecorder) -> None:
    """The optimizer is a fused one, so that rounding differs."""
    for name, captured in (("plain", "false"), ("captured", "true")):
        start(*RUN, f"trainer.capture={captured}", f"run_dir={name}", "optimizer.lr=0.01")
    for ours, theirs in zip(read_metrics(Path("captured")), read_metrics(Path("plain")), strict=True):
        assert ours["train/lr"] == theirs["train/lr"]
        assert ours["sparsity/target"] == theirs["sparsity/target"]
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-3)


def test_a_captured_run_goes_on_as_if_nothing_had_happened(graphs: GraphRecorder) -> None:
    start(*RUN, "trainer.capture=true", "run_dir=whole")
    with pytest.raises(SystemExit):
        start(*RUN, "trainer.capture=true", "run_dir=parts", "time_limit_minutes=0.00001")
    start(*RUN, "trainer.capture=true", "run_dir=parts")
    whole, parts = (read_metrics(Path(name)) for name in ("whole", "parts"))
    assert [r["step"] for r in parts] == [r["step"] for r in whole]
    assert [r["train/loss"] for r in parts] == pytest.approx([r["train/loss"] for r in whole], rel=1e-3)


def test_what_is_not_finite_ends_a_captured_run_one_step_late_and_reaches_no_file(
    graphs: GraphRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python does not run in a replay, so the poison comes through the learning rate of step 15."""
    ordinary = engine.optimization.learning_rate
    monkeypatch.setattr(
        "engine.optimization.learning_rate", lambda step, *rest: math.nan if step == 14 else ordinary(step, *rest)
    )
    with pytest.raises(ConfigError, match=r"At step 16 the loss is nan"):
        start(*RUN, "trainer.capture=true", "run_dir=run")
    state, _ = load_checkpoint(Path("run"))
    assert state["step"] == 12
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


@pytest.mark.parametrize(
    ("ranks", "precision", "words"),
    [
        (Ranks(0, 1, 0, torch.device("cpu")), "fp32", "the device is cpu"),
        (Ranks(0, 2, 0, torch.device("cuda")), "fp32", "single process"),
        (Ranks(0, 1, 0, torch.device("cuda")), "fp16", "bf16"),
    ],
)
def test_what_cannot_be_captured_is_told_in_one_sentence(ranks: Ranks, precision: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recorder(ranks, resolve_precision(precision, torch.device("cpu")))


def test_capture_on_a_cpu_and_with_skip_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"rollback"):
        start("trainer.capture=true", "trainer.nonfinite=skip")
    with pytest.raises((ConfigError, SystemExit, ValueError)) as refused:
        start("trainer.capture=true")
    assert "the device is cpu" in str(refused.value)


def test_a_method_that_decides_on_the_host_is_refused_by_name(graphs: GraphRecorder) -> None:
    with pytest.raises((ConfigError, SystemExit, ValueError), match="RigL"):
        start("trainer.capture=true", "method=rigl")
