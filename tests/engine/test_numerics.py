"""A loss or gradient that is not finite: found at its step, named with its layer, kept out of every file."""

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import models.factory
from engine import interruption
from engine.checkpoint import list_checkpoints, load_checkpoint
from engine.config import ConfigError
from engine.distributed import Ranks
from engine.interruption import Interruption
from engine.numerics import MOST_IN_A_ROW, NotFiniteError, NumberGuard, RollBack, first_nonfinite_layer
from tests.train_helpers import Plain, outcome, read_json, read_metrics, read_weights, start, two_processes

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Poisoned(Plain):
    """`Plain` with BatchNorm, in which numbers break at given training steps (counted from 1 in each process)."""

    breaks: dict[int, str] = {}  # noqa: RUF012 - set by each test
    seen = 0

    def __init__(self, num_classes: int, width: int = 4) -> None:
        super().__init__(num_classes, width)
        self.norm = nn.BatchNorm2d(2 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        how = ""
        if self.training and torch.is_grad_enabled():
            Poisoned.seen += 1
            how = Poisoned.breaks.get(Poisoned.seen, "")
        x = self.conv1(x)
        if how == "forward":
            x = x * math.nan
        x = self.norm(self.conv2(x.relu())).relu()
        if how == "backward":
            x.register_hook(lambda gradient: gradient * math.inf)
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))


def poison(**breaks: str) -> None:
    """In this process: `poison(at6="forward")`."""
    models.factory.OURS["resnet20"] = Poisoned
    Poisoned.breaks = {int(at.removeprefix("at")): how for at, how in breaks.items()}
    Poisoned.seen = 0


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(models.factory.OURS, "resnet20", Plain)  # put back afterwards
    return poison


@pytest.mark.parametrize("method", ["sparsity=0.6", "sparsity=0"])
@pytest.mark.parametrize("how", ["forward", "backward"])
def test_raise_stops_at_that_step_and_keeps_the_last_checkpoint(how: str, method: str, poisoned: Any) -> None:
    poisoned(at6=how)
    with pytest.raises(ConfigError) as told:
        start("run_dir=run", method, "trainer.log_every=1")
    what = {
        "forward": "the loss is nan",
        "backward": r"the gradient of norm.bias is nan",
    }[how]
    assert str(told.value).startswith(f"At step 6 {what}")
    assert "trainer.nonfinite=skip or rollback" in str(told.value)
    assert len(str(told.value).splitlines()) == 1
    assert [record["step"] for record in read_metrics(Path("run"))] == [1, 2, 3, 4, 5]
    state, _ = load_checkpoint("run")
    assert (state["step"], len(list_checkpoints("run"))) == (4, 1)
    assert all(weight.isfinite().all() for weight in state["model"].values())


@pytest.mark.parametrize("how", ["forward", "backward"])
def test_skip_leaves_everything_as_it_was_before_the_step(how: str, poisoned: Any) -> None:
    options = ("trainer.nonfinite=skip", "trainer.log_every=1", "lr_schedule=constant")
    poisoned(at6=how)
    start("run_dir=run", *options)
    assert all(weight.isfinite().all() for weight in read_weights(Path("run")).values())
    records = read_metrics(Path("run"))
    assert [record["step"] for record in records] == list(range(1, 9))
    assert records[4]["sparsity/target"] == records[5]["sparsity/target"]
    assert records[5]["sparsity/mask_change"] == 0
    result = read_json(Path("run/result.json"))
    assert (result["skipped_steps"], result["achieved_sparsity"]) == (1, pytest.approx(0.6, abs=2e-3))


def test_a_step_left_out_of_a_ramp_that_fills_the_run_still_reaches_the_target(poisoned: Any) -> None:
    poisoned(at8="backward")
    start("run_dir=run", "trainer.nonfinite=skip", "sparsity_schedule.end_fraction=1")
    assert read_json(Path("run/result.json"))["achieved_sparsity"] == pytest.approx(0.6, abs=2e-3)


def test_rollback_goes_back_and_leaves_the_step_out(poisoned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    poisoned(at6="forward", at8="forward")  # the second time, forward passes 5, 6 are 7, 8
    start("run_dir=back", "trainer.nonfinite=rollback", "trainer.log_every=1", "overwrite=true")
    told = capsys.readouterr()
    assert told.err.count("Going back.") == 1
    assert "\nAt step 6 the loss is nan" in told.err
    assert "at step 4 of 8" in told.out
    poisoned(at6="forward")
    start("run_dir=skip", "trainer.nonfinite=skip", "trainer.log_every=1")
    back, skip = outcome(Path("back")), outcome(Path("skip"))
    assert back[:2] == skip[:2]  # the step's batch is the damage: going back comes to the same as leaving it out
    assert read_json(Path("back/result.json"))["skipped_steps"] == 1


def test_the_time_limit_goes_on_counting_over_a_rollback(poisoned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines = []

    class Watched(Interruption):
        def __enter__(self) -> Interruption:
            deadlines.append(self._deadline)
            return super().__enter__()

    monkeypatch.setattr(interruption, "Interruption", Watched)
    poisoned(at2="backward")
    start("run_dir=run", "trainer.nonfinite=rollback", "time_limit_minutes=60")
    assert len(deadlines) == 2
    assert deadlines[0] == deadlines[1]


def test_rollback_before_the_first_checkpoint_begins_anew(poisoned: Any) -> None:
    poisoned(at2="backward")
    start("run_dir=run", "trainer.nonfinite=rollback")
    assert read_json(Path("run/result.json"))["skipped_steps"] == 1


def test_steps_that_are_all_bad_end_the_run(poisoned: Any) -> None:
    poisoned(**{f"at{step}": "backward" for step in range(1, 99)})
    with pytest.raises(ConfigError, match=rf"At step {MOST_IN_A_ROW + 1} .* after {MOST_IN_A_ROW} steps in a row"):
        start("run_dir=skip", "trainer.nonfinite=skip", "trainer.batch_size=100")


@pytest.mark.parametrize("how", ["forward", "backward"])
def test_all_processes_decide_alike(how: str, tmp_path: Path) -> None:
    """Only the second process breaks; both leave the step out and go on."""
    arguments = ("model.options.width=4", "trainer.batch_size=400", "trainer.epochs=1", "trainer.device=cpu")
    ends = two_processes(
        *arguments, "logger=none", "trainer.precision=fp32", "trainer.nonfinite=skip", "run_dir=run",
        cwd=tmp_path, before=poison_second, with_arguments=(how,),
    )  # fmt: skip
    assert [end.status for end in ends] == [0, 0], ends
    assert read_json(tmp_path / "run/result.json")["skipped_steps"] == 1


def poison_second(how: str) -> None:
    import os

    poison(**({"at2": how} if os.environ["RANK"] == "1" else {}))


# ---- the guard alone -------------------------------------------------------------------------------------------------


def guarded(policy: str = "raise", enabled: bool = False, **options: Any) -> tuple[nn.Module, Any, Any, NumberGuard]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=enabled)
    return model, optimizer, scaler, NumberGuard(model, policy, scaler, ALONE, contextlib.nullcontext, **options)


def test_a_finite_loss_passes_to_the_bit() -> None:
    *_, guard = guarded()
    loss = torch.tensor([0.1, 1e-40, 3e38, -7.25])
    assert torch.equal(guard.loss(loss), loss)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_seen_in_the_gradients(bad: float) -> None:
    model, _, _, guard = guarded()
    guard.loss(model(torch.ones(4, 2)).sum() + bad).backward()  # whose own gradients would be finite
    assert model[2].weight.grad.isnan().all()
    assert model[2].bias.grad.isnan().all()


def test_the_first_layer_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight.fill_(3e38)
        model[1].bias.fill_(3e38)
    assert first_nonfinite_layer(model, torch.full((1, 2), 1e3), contextlib.nullcontext) == "1"
    assert first_nonfinite_layer(model[:1], torch.ones(1, 2), contextlib.nullcontext) is None


def test_a_large_but_finite_gradient_is_no_offence() -> None:
    model, _, _, guard = guarded()
    guard.loss(model(torch.ones(4, 2)).sum()).backward()
    for parameter in model.parameters():
        parameter.grad.fill_(2e38)  # whose sum of squares is not finite
    assert guard.allows(0, torch.ones(4, 2))


def test_overflow_in_fp16_is_counted_and_the_run_goes_on() -> None:
    model, optimizer, scaler, guard = guarded(enabled=True)
    for step in range(3):
        loss = guard.loss(model(torch.ones(4, 2)).sum())
        scaler.scale(loss).backward()
        if step == 1:
            model[0].weight.grad.fill_(math.inf)
        scaler.unscale_(optimizer)
        assert guard.allows(step, torch.ones(4, 2))
        scaler.step(optimizer)
        scaler.update()
        guard.count_overflow(step)
        optimizer.zero_grad()
    assert (guard.overflows, guard.skipped) == (1, 0)


def test_an_overflow_that_no_scale_cures_ends_the_run() -> None:
    model, optimizer, scaler, guard = guarded(enabled=True)

    def step(number: int) -> None:
        scaler.scale(guard.loss(model(torch.ones(4, 2)).sum())).backward()
        model[0].weight.grad.fill_(math.inf)
        scaler.unscale_(optimizer)
        assert guard.allows(number, torch.ones(4, 2))
        scaler.step(optimizer)
        scaler.update()
        guard.count_overflow(number)
        optimizer.zero_grad()

    with pytest.raises(NotFiniteError, match="at a loss scale below 1"):
        list(map(step, range(40)))
    assert 10 < guard.overflows < 30


def test_in_fp16_a_loss_that_is_not_finite_is_no_overflow() -> None:
    model, optimizer, scaler, guard = guarded("skip", enabled=True)
    scale = scaler.get_scale()
    for step in range(2):  # the second unscales again
        loss = guard.loss(model(torch.ones(4, 2)).sum() * (math.nan if step == 0 else 1))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert guard.allows(step, torch.ones(4, 2)) is (step == 1)
        optimizer.zero_grad()
    assert (guard.overflows, guard.skipped, scaler.get_scale()) == (0, 1, scale)


def test_what_is_read_late_is_still_found_before_anything_is_written() -> None:
    """As on CUDA: the gradients of a step are looked at in the next one, or when something is to be saved."""
    model, _, _, guard = guarded("rollback")
    guard._at_once = False
    guard.loss(model(torch.ones(4, 2)).sum()).backward()
    model[2].weight.grad[0, 0] = math.inf
    assert guard.allows(7, torch.ones(4, 2))
    with pytest.raises(RollBack, match="At step 8 the gradient of 2.weight is infinite") as back:
        guard.settle()
    assert back.value.step == 7
    guard.settle()  # told once
