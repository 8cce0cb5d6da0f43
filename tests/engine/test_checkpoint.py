import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import checkpoint
from engine.checkpoint import CheckpointError, atomic_write, list_checkpoints, load_checkpoint, save_checkpoint


def state(value: int) -> dict[str, Any]:
    return {
        "step": value,
        "weight": torch.full((64,), float(value)),
        "nested": {"list": [1, 2.5, None, "a"], "pair": (1, 2)},
    }


def loaded_step(directory: Path) -> int:
    loaded = load_checkpoint(directory)
    assert loaded is not None
    return int(loaded[0]["step"])


def test_round_trip_and_retention(tmp_path: Path) -> None:
    paths = [save_checkpoint(tmp_path, state(step), step) for step in (10, 20, 30)]
    assert list_checkpoints(tmp_path) == [paths[2], paths[1]]
    assert sorted(tmp_path.iterdir()) == sorted(paths[1:])
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    content, path = loaded
    assert path == paths[2]
    assert torch.equal(content["weight"], state(30)["weight"])
    assert content["nested"] == state(30)["nested"]


def test_nothing_to_load(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "missing") is None


@pytest.mark.parametrize("position", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
def test_any_flipped_bit_is_found_and_the_previous_one_used(
    tmp_path: Path, position: float, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, state(1), 1)
    newest = save_checkpoint(tmp_path, state(2), 2)
    data = bytearray(newest.read_bytes())
    data[int(position * (len(data) - 1))] ^= 1
    newest.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert loaded_step(tmp_path) == 1
    assert newest.name in caplog.text


@pytest.mark.parametrize("size", [0, 1, 0.5, -1])
def test_a_cut_file_is_found_and_the_previous_one_used(tmp_path: Path, size: float) -> None:
    save_checkpoint(tmp_path, state(1), 1)
    newest = save_checkpoint(tmp_path, state(2), 2)
    data = newest.read_bytes()
    newest.write_bytes(data[: int(size * len(data)) if size == 0.5 else int(size)])
    assert loaded_step(tmp_path) == 1


def test_all_damaged_is_an_error_and_not_a_silent_restart(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1), 1).write_bytes(b"")
    with pytest.raises(CheckpointError, match="None of the 1 checkpoints"):
        load_checkpoint(tmp_path)


def test_a_crash_while_writing_leaves_the_old_checkpoint_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, state(1), 1)
    (tmp_path / ".tmp-left-by-kill-9").write_bytes(b"half a checkpoint")

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, state(2), 2, keep=1)
    assert loaded_step(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == [list_checkpoints(tmp_path)[0].name]


def test_the_older_one_goes_only_after_the_new_one_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, state(1), 1)
    seen = []
    unlink = Path.unlink
    monkeypatch.setattr(
        Path, "unlink", lambda path, **options: (seen.append(list_checkpoints(tmp_path)), unlink(path, **options))
    )
    new = save_checkpoint(tmp_path, state(2), 2, keep=1)
    assert seen
    assert all(new in present for present in seen)


def test_saving_after_a_fallback_replaces_the_damaged_future(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(10), 10)
    save_checkpoint(tmp_path, state(20), 20).write_bytes(b"damaged")
    assert loaded_step(tmp_path) == 10
    save_checkpoint(tmp_path, state(15), 15)
    assert loaded_step(tmp_path) == 15
    save_checkpoint(tmp_path, state(15) | {"again": True}, 15)
    assert [checkpoint._step(path) for path in list_checkpoints(tmp_path)] == [15, 10]


def test_an_unknown_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save_checkpoint(tmp_path, state(1), 1)
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    with pytest.raises(CheckpointError, match=r"has checkpoint format 2, this version reads format 1"):
        load_checkpoint(tmp_path)


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def test_a_hostile_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    written = tmp_path / "written"
    torch.save({"format": 1, "state": Hostile(tmp_path / "owned")}, written)
    name = f"checkpoint_00000001-{checkpoint._digest(written)[:16]}.pt"
    shutil.move(written, tmp_path / name)
    with pytest.raises(CheckpointError, match="more than plain data"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("value", [np.float64(1.0), np.zeros(2), object(), Path("a")])
def test_what_could_not_be_loaded_is_refused_when_saved(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"state\['deep'\]\[1\] is a"):
        save_checkpoint(tmp_path, {"deep": [0, value]}, 1)
    assert not list(tmp_path.iterdir())


def test_optimizer_and_scaler_states_are_plain_data(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    model(torch.ones(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": torch.amp.GradScaler("cpu")}
    save_checkpoint(tmp_path, {name: part.state_dict() for name, part in parts.items()}, 1)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    optimizer.load_state_dict(loaded[0]["optimizer"])
    model.load_state_dict(loaded[0]["model"])


def test_atomic_write_keeps_the_old_file_when_the_writer_fails(tmp_path: Path) -> None:
    path = atomic_write(tmp_path / "sub" / "file", b"old")

    def fail(file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, fail)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]
    atomic_write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=0 must be at least 1"):
        save_checkpoint(tmp_path, {}, 1, keep=0)
    with pytest.raises(ValueError, match="step=-1"):
        save_checkpoint(tmp_path, {}, -1)
