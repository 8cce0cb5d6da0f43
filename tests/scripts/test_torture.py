"""A short form of `make torture`, which kills a hundred times."""

from pathlib import Path

import pytest

from scripts.torture import CONFIGURATIONS, differences, torture

SHORT = tuple(c for c in CONFIGURATIONS if c.name == "feather accumulated")


@pytest.mark.parametrize(
    ("configurations", "kills"),
    [
        pytest.param(SHORT, 1, id="one configuration"),
        pytest.param(CONFIGURATIONS, 11, id="all configurations", marks=pytest.mark.long),
    ],
)
def test_killed_runs_end_with_the_same_bits(configurations: tuple, kills: int, tmp_path: Path) -> None:
    found = torture(configurations, kills, seed=1, folder=tmp_path)
    assert found["details"] == []
    assert found["survived"] == found["kills"] == kills


def test_a_difference_is_named() -> None:
    whole = (b"bits", [{"step": 1}], {"final_top1": 50.0}, [{"step": 1}])
    assert differences(whole, whole) == []
    assert differences((b"bitz", [], {}, [{"step": 1}, {"step": 1}]), whole) == [
        "model.safetensors", "metrics.jsonl", "result.json", "W&B history",
    ]  # fmt: skip
