"""What is found in a run directory, and what a crash in between may leave there."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import rundir
from engine.config import Config, ConfigError, config_hash, prepare
from engine.lock import release
from engine.rundir import open_run_directory
from tests.train_helpers import compose


@pytest.fixture
def cfg(tmp_path: Path) -> Iterator[Config]:
    yield prepare(compose(f"run_dir={tmp_path / 'run'}"))
    release()


def test_looking_writes_nothing_and_creating_marks_the_folder(cfg: Config, tmp_path: Path) -> None:
    new = open_run_directory(cfg)
    assert new.is_new
    assert not new.path.exists()
    new.create(cfg)
    again = open_run_directory(cfg)
    assert (again.is_new, again.result, again.run_id) == (False, None, new.run_id)
    assert again.config_hash == config_hash(cfg)
    assert {path.name for path in new.path.iterdir()} == {"config.yaml", "run.json", ".lock"}
    release()
    assert {path.name for path in new.path.iterdir()} == {"config.yaml", "run.json"}


def test_a_finished_run_shows_its_result(cfg: Config) -> None:
    run = open_run_directory(cfg)
    run.create(cfg)
    (run.path / "result.json").write_text('{"final_top1": 50}')
    assert open_run_directory(cfg).result == {"final_top1": 50}
    cfg.overwrite = True
    assert open_run_directory(cfg).result is None


@pytest.mark.parametrize("writes", [0, 1])
def test_a_crash_while_the_folder_is_made_leaves_one_that_can_be_used(
    cfg: Config, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crash(BaseException):
        pass

    left = writes

    def crash(path: Path, *_: object) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            path.parent.joinpath(".tmp-half").write_bytes(b"{")
            raise Crash
        path.write_text(json.dumps({"format": 1, "config_hash": config_hash(cfg), "run_id": "first"}))
        return path

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "atomic_write", crash)
        patch.setattr(rundir, "write_json", crash)
        with pytest.raises(Crash):
            open_run_directory(cfg).create(cfg)
    again = open_run_directory(cfg)
    again.create(cfg)
    assert (again.path / "config.yaml").read_text().startswith("dataset:")
    assert open_run_directory(cfg).run_id == again.run_id


def test_a_crash_while_an_old_run_is_removed_leaves_no_half_of_it_as_finished(
    cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run_directory(cfg)
    run.create(cfg)
    for name in ("result.json", "checkpoint_00000001-0.pt", "model.safetensors", "metrics.jsonl"):
        (run.path / name).write_text("{}")
    (run.path / "notes.txt").write_text("mine")
    cfg.overwrite = True
    removed = []
    unlink = Path.unlink

    def crash(path: Path, **options: bool) -> None:
        if len(removed) == 2:
            raise OSError("the machine stopped")
        removed.append(path.name)
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", crash)
        with pytest.raises(ConfigError):
            open_run_directory(cfg).create(cfg)
    assert removed[0] == "result.json"
    cfg.overwrite = False
    assert open_run_directory(cfg).result is None
    cfg.overwrite = True
    open_run_directory(cfg).create(cfg)
    assert {path.name for path in run.path.iterdir()} == {"config.yaml", "run.json", "notes.txt", ".lock"}


@pytest.mark.parametrize(
    ("content", "told"),
    [("{", "is damaged"), ("[]", "is damaged"), ('{"format": 99}', "has format 99, this version reads 1")],
)
def test_a_damaged_marker_is_named(cfg: Config, content: str, told: str) -> None:
    path = Path(cfg.run_dir)
    path.mkdir()
    (path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match=told) as error:
        open_run_directory(cfg)
    assert "overwrite=true" in str(error.value)


def test_a_file_in_the_way_is_refused(cfg: Config) -> None:
    Path(cfg.run_dir).write_text("a file")
    with pytest.raises(ConfigError, match="is a file: name a folder"):
        open_run_directory(cfg)
