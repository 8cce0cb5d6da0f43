"""Sparsity as a function of the step."""

import pytest

import feather
from feather.schedule import create_schedule


def test_cubic_is_the_paper_equation():
    schedule = feather.Cubic(0.9, 10, 110)
    assert [schedule(t) for t in (0, 9, 10)] == [0, 0, 0]
    for t in (11, 35, 60, 109):
        assert schedule(t) == pytest.approx(0.9 - 0.9 * (1 - (t - 10) / 100) ** 3, rel=1e-13)
    assert [schedule(t) for t in (110, 111, 10**9)] == [0.9] * 3  # exactly the target, for ever


def test_linear_ramps_evenly():
    schedule = feather.Linear(0.8, 0, 4)
    assert [schedule(t) for t in range(6)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8])


def test_one_shot_jumps_at_its_start():
    schedule = feather.OneShot(0.8, 3, 99)
    assert [schedule(t) for t in (0, 2, 3, 4)] == [0, 0, 0.8, 0.8]


@pytest.mark.parametrize("name", ["cubic", "linear", "one_shot"])
def test_every_schedule_is_monotone_and_reaches_its_target(name):
    schedule = create_schedule(name, 0.98, 1001, start_step=7)
    values = [schedule(t) for t in range(1002)]
    assert values == sorted(values)
    assert values[0] == 0
    assert values[-1] == 0.98


def test_the_ramp_ends_at_half_of_the_run_rounded_down():
    assert create_schedule("cubic", 0.9, 101) == feather.Cubic(0.9, 0, 50)
    assert create_schedule("cubic", 0.9, 100, start_step=80) == feather.Cubic(0.9, 80, 80)


def test_zero_length_ramp_is_a_jump():
    schedule = feather.Cubic(0.5, 4, 4)
    assert [schedule(t) for t in (3, 4)] == [0, 0.5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: feather.Cubic(1.0, 0, 1), r"sparsity=1.0 is outside \[0, 1\)"),
        (lambda: feather.Cubic(-0.1, 0, 1), r"sparsity=-0.1 is outside \[0, 1\)"),
        (lambda: feather.Cubic(0.5, -1, 1), r"start_step=-1 is outside \[0, end_step=1\]"),
        (lambda: feather.Cubic(0.5, 5, 4), r"end_step=4 is outside \[start_step=5, total_steps\]"),
        (
            lambda: create_schedule("cubik", 0.5, 10),
            "schedule='cubik' is unknown: choose one of cubic, linear, one_shot",
        ),
        (lambda: create_schedule("cubic", 0.5, 10, end_step=11), r"end_step=11 is outside \[0, total_steps=10\]"),
        (lambda: create_schedule("cubic", 0.5, 10, start_step=11), r"start_step=11 is outside \[0, total_steps=10\]"),
        (lambda: create_schedule("one_shot", 0.5, 10, end_step=5), "end_step=5 does not go with schedule='one_shot'"),
    ],
)
def test_wrong_steps_are_refused_by_name_value_and_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
