"""Nobody's configuration runs code, sets variables or writes elsewhere."""

from pathlib import Path

import pytest

from engine.config import ConfigError
from engine.trust import check
from tests.train_helpers import command

EVIL = """# @package _global_
hydra:
  callbacks:
    mine:
      _target_: os.mkdir
      path: owned
"""


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("+hydra.callbacks.a._target_=os.getcwd", "hydra.callbacks.a._target_=os.getcwd is refused"),
        ("hydra.launcher._target_=os.system", "hydra.launcher._target_=os.system is refused"),
        ("hydra.sweeper._target_=os.system", "hydra.sweeper._target_=os.system is refused"),
        ("+model.options._target_=os.system", "model.options._target_=os.system is refused"),
        ("+hydra.job_logging.handlers.a.class=os.system", "hydra.job_logging.handlers cannot be changed"),
        ("+hydra.job.env_set.LD_PRELOAD=a.so", "hydra.job.env_set cannot be changed"),
        ("hydra.run.dir=elsewhere", "hydra.run.dir cannot be changed: use run_dir="),
        ("hydra.output_subdir=elsewhere", "hydra.output_subdir cannot be changed"),
        ("experiment_name=../elsewhere", "experiment_name=../elsewhere is out of range"),
        ("experiment_name=/elsewhere", "experiment_name=/elsewhere is out of range"),
        ("hydra.searchpath=[pkg://this]", "pkg://this is refused: a search path cannot name a package"),
        ("--config-path=pkg://this", "pkg://this is refused: a search path cannot name a package"),
        ("label=${oc.env:HOME}", "Unsupported interpolation type oc.env"),
    ],
)
def test_what_is_typed_starts_nothing(typed: str, told: str, tmp_path: Path) -> None:
    ended = command(typed, "logger=none", "trainer.max_steps=1", cwd=tmp_path)
    assert ended.status == 1
    assert told in ended.err
    assert "Traceback" not in ended.err
    assert "Zen of Python" not in ended.out  # what importing `this` prints
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".process")]


def test_a_file_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "evil.yaml").write_text(EVIL)
    ended = command("experiment=evil", "--config-dir=conf", cwd=tmp_path)
    assert ended.status == 1
    assert ended.err == (
        "hydra.callbacks.mine._target_=os.mkdir is refused: a configuration cannot make objects; leave it out.\n"
    )
    assert not (tmp_path / "owned").exists()


def test_the_plugins_of_hydra_are_let_through() -> None:
    check({"hydra": {"verbose": False, "launcher": {"_target_": "hydra_plugins.some.Launcher"}, "run": {"dir": "."},
                     "sweep": {"dir": "runs", "subdir": "."}}})  # fmt: skip
    with pytest.raises(ConfigError, match=r"a\.0\._target_=x is refused"):
        check({"a": [{"_target_": "x"}], "hydra": {}})
