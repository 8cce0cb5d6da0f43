import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.seeding import rng_state, seed_everything, set_deterministic, set_rng_state


@pytest.fixture(autouse=True)
def generators_as_before() -> Iterator[None]:
    state = rng_state()
    yield
    set_rng_state(state)


def draw() -> list[Any]:
    # The odd number of normals leaves a spare one in Python's and NumPy's generators: part of their state.
    numbers: list[Any] = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]  # noqa: NPY002
    numbers += torch.randn(17).tolist()
    if torch.cuda.is_available():
        numbers += torch.randn(5, device="cuda").tolist()
    return numbers


def test_state_comes_back_through_a_checkpoint(tmp_path: Path) -> None:
    seed_everything(3)
    draw()
    save_checkpoint(tmp_path, {"rng": rng_state()}, 1)
    expected = [draw(), draw()]
    seed_everything(99)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    set_rng_state(loaded[0]["rng"])
    assert [draw(), draw()] == expected


def test_a_seed_fixes_every_generator() -> None:
    seed_everything(5)
    first = draw()
    seed_everything(5)
    assert draw() == first
    seed_everything(6)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed={seed} must be in"):
        seed_everything(seed)


def test_deterministic_on_and_off() -> None:
    try:
        set_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
    finally:
        set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
