import io
import logging
import os
import pickle
import re
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import checkpoint
from engine.checkpoint import (
    CheckpointError,
    atomic_write,
    fitting,
    list_checkpoints,
    load_checkpoint,
    load_parts,
    save_checkpoint,
)


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


def regions(path: Path) -> dict[str, int]:
    """A byte of each region of a checkpoint's file: of every record its header and content, the directory, the end."""
    found = {"first": 0, "last": path.stat().st_size - 1}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            found[f"header of {info.filename}"] = info.header_offset + 10
            if info.file_size:
                found[f"content of {info.filename}"] = (
                    info.header_offset + 30 + len(info.filename) + info.file_size // 2
                )
        found["directory"] = archive.start_dir + 12
    return found


def test_a_flipped_bit_in_any_region_is_found_and_the_previous_one_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, state(1), 1)
    newest = save_checkpoint(tmp_path, state(2), 2)
    content = newest.read_bytes()
    places = regions(newest)
    assert len(places) > 8
    for position in places.values():
        for bit in (0, 7):
            data = bytearray(content)
            data[position] ^= 1 << bit
            newest.write_bytes(data)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                assert loaded_step(tmp_path) == 1
            assert f"CHECKPOINT DAMAGED: {newest}" in caplog.text


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
    with pytest.raises(CheckpointError, match=r"holds posix.mkdir, which is no plain data, so it is not loaded"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()


def named_by_its_checksum(written: Path) -> None:
    written.rename(written.with_name(f"checkpoint_00000001-{checkpoint._digest(written)[:16]}.pt"))


def rewritten(
    path: Path, change: Callable[[str, bytes], tuple[str, bytes]], compression: int = zipfile.ZIP_STORED
) -> None:
    with zipfile.ZipFile(path) as archive:
        records = [change(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records:
            archive.writestr(name, content)


def test_a_record_that_inflates_is_refused_before_it_does(tmp_path: Path) -> None:
    written = tmp_path / "written"
    torch.save({"format": 1, "state": {"weight": torch.zeros(1 << 24)}}, written)
    rewritten(written, lambda name, content: (name, content), zipfile.ZIP_DEFLATED)
    assert written.stat().st_size < 1 << 20
    named_by_its_checksum(written)
    with pytest.raises(CheckpointError, match=r"has the compressed record .* whose size nobody knows"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../../outside", "/etc/outside", "a\\b"])
def test_a_record_with_a_path_for_a_name_is_refused(name: str, tmp_path: Path) -> None:
    written = tmp_path / "written"
    torch.save({"format": 1, "state": {}}, written)
    with zipfile.ZipFile(written, "a") as archive:
        archive.writestr(name, b"content")
    named_by_its_checksum(written)
    with pytest.raises(CheckpointError, match="names a record"):
        load_checkpoint(tmp_path)


def claims(numel: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A pickle of one tensor that claims so much."""

    class Claim:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Stored(), 0, shape, stride, False, OrderedDict())

    class Stored:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(value, Stored) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"format": 1, "state": {"weight": Claim()}})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("numel", "shape", "stride", "told"),
    [
        (1 << 40, (1 << 40,), (1,), "claims 1099511627776 values of torch.float32 where it holds 64 bytes"),
        (-1, (16,), (1,), "claims -1 values"),
        (16, (1 << 40,), (0,), "holds a tensor of shape (1099511627776,) in 16 values"),
        (16, (4,), (1 << 40,), "holds a tensor of shape (4,) in 16 values"),
        (16, (-4,), (1,), "holds a tensor without a storage or a shape"),
    ],
)
def test_sizes_that_the_file_does_not_have_are_refused(
    numel: int, shape: tuple[int, ...], stride: tuple[int, ...], told: str, tmp_path: Path
) -> None:
    written = tmp_path / "written"
    torch.save({"format": 1, "state": {"weight": torch.zeros(16)}}, written)
    pickled = claims(numel, shape, stride)
    rewritten(written, lambda name, content: (name, pickled if name.endswith("data.pkl") else content))
    named_by_its_checksum(written)
    with pytest.raises(CheckpointError, match=re.escape(told)):
        load_checkpoint(tmp_path)


def test_a_pickle_without_an_archive_is_refused(tmp_path: Path) -> None:
    written = tmp_path / "written"
    written.write_bytes(pickle.dumps({"format": 1, "state": {}}))
    named_by_its_checksum(written)
    with pytest.raises(CheckpointError, match="is no file of plain tensors"):
        load_checkpoint(tmp_path)


def test_every_kind_of_tensor_that_is_saved_is_let_through(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    kinds = {
        "transposed": base.t(), "part": base[1:, ::2], "scalar": torch.tensor(1.5), "empty": torch.empty(0, 3),
        "channels_last": torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last), "bool": base > 3,
        "bf16": base.bfloat16(), "half": base.half(), "bytes": b"abc", "parameter": torch.nn.Parameter(base.clone()),
        "expanded": torch.zeros(3).double(), "dtype": torch.float32, "size": base.shape, "set": {1, 2},
    }  # fmt: skip
    save_checkpoint(tmp_path, kinds, 1)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    for name, value in kinds.items():
        assert torch.equal(loaded[0][name], value) if isinstance(value, torch.Tensor) else loaded[0][name] == value


def broken(name: str, change: Callable[[Any], Any]) -> Any:
    return pytest.param(change, id=name)


@pytest.mark.parametrize(
    "change",
    [
        broken("no model", lambda s: s.pop("model")),
        broken("no step", lambda s: s.pop("step")),
        broken("a weight more", lambda s: s["model"].update(extra=torch.zeros(1))),
        broken("a weight less", lambda s: s["model"].pop("weight")),
        broken("a weight of another shape", lambda s: s["model"].update(weight=torch.zeros(2, 2))),
        broken("a weight of another dtype", lambda s: s["model"].update(weight=s["model"]["weight"].double())),
        broken("a number for a weight", lambda s: s["model"].update(weight=1)),
        broken("a list for the model", lambda s: s.update(model=[1])),
        broken(
            "momentum of another shape", lambda s: s["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(7))
        ),
        broken("groups of another optimizer", lambda s: s["optimizer"].update(param_groups=[])),
        broken("a string for the optimizer", lambda s: s.update(optimizer="x")),
        broken("no other part", lambda s: s.pop("other")),
    ],
)
def test_a_state_that_does_not_fit_is_one_sentence(change: Callable[[Any], Any]) -> None:
    def parts() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.Optimizer]:
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return model, optimizer, torch.optim.SGD(model.parameters(), lr=0.1)

    model, optimizer, other = parts()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "other": other.state_dict(), "step": 1}

    def load() -> None:
        with fitting(Path("file")):
            load_parts(content, *parts()[:2], other=parts()[2])
            content["step"]

    load()
    change(content)
    with pytest.raises(CheckpointError, match=r"^file does not fit this run \(.*\): restore"):
        load()


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
