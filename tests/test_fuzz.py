"""Whatever is typed, or stands in a YAML file, ends as a valid run or as one sentence; nothing else is touched.

The cases run in this process, as `python train.py` would. A case is drawn from its number alone:
`python -m pytest tests/test_fuzz.py -k "[17]"` repeats a block of them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import runpy
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from engine import cli
from engine.seeding import set_deterministic
from tests.train_helpers import TRAIN

SMALL = (
    "model.options.width=8", "dataset.image_size=8", "debug=few_steps", "trainer.max_steps=1", "trainer.device=cpu",
    "logger=none", "trainer.progress=false", "dataset.download=false",
)  # fmt: skip
NUMBERS = (
    "0",
    "1",
    "2",
    "3",
    "0.5",
    "0.9",
    "-1",
    "1e-3",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "99999999999999999999",
    "0x10",
)
WORDS = (
    "", "null", "true", "no", "a", "ä", "''", '"', "[", "]", "{}", "[]", "[a,b]", "{a:1}", "{a: {b: [1]}}", "auto", "~",
    "${seed}", "${nothing}", "${oc.env:HOME}", "${", "$", "../..", "/", "a/../../b", "a b", "a\\,b", "*", "conv1.*",
    "fc.*", "choice(1,2)", "range(0,0)", "1,2", "x" * 300, "!!python/object/apply:os.system [true]", "&a [*a]", "\t",
)  # fmt: skip
CHOICES = {
    "dataset": ("digits", "cifar10", "imagenet", "nothing"),
    "model": ("resnet20", "resnet2O", "mobilenet_v1", ""),
    "method": ("feather", "dense", "gmp", "rigl", "str", "acdc", "spartan", "topkast", "st3", "set", "fether"),
    "framework": ("auto", "global", "uniform", "erk", "asl", "asl_plus", "gobal"),
    "modifier": ("none", "ham"),
    "sparsity_schedule": ("cubic", "linear", "one_shot"),
    "optimizer": ("sgd", "adamw"),
    "trainer": ("default", "deterministic"),
    "experiment": ("quickstart", "first_three", "cifar", "fuzz"),
    "scale": ("full", "proxy"),
    "trainer.precision": ("fp32", "bf16", "fp16", "fp8"),
    "trainer.nonfinite": ("raise", "skip", "rollback", "ignore"),
}
KEYS = (
    "sparsity", "seed", "label", "experiment_name", "time_limit_minutes", "method.p", "method.theta",
    "method.include", "method.exclude", "optimizer.lr", "optimizer.momentum", "optimizer.nesterov",
    "optimizer.weight_decay", "lr_schedule.name", "lr_schedule.warmup_epochs", "trainer.accumulate",
    "trainer.batch_size", "trainer.clip_grad_norm", "trainer.label_smoothing", "trainer.log_every",
    "trainer.checkpoint_every", "trainer.eval_batch_size", "trainer.channels_last",
    "sparsity_schedule.start_fraction", "sparsity_schedule.end_fraction", "dataset.validation", "dataset.workers",
    "dataset.augment", "dataset.root", "dataset.image_size", "model.options.depth", "model.name", "model.weights",
    "model.options", "framework.options", "framework.options.a", "modifier_options.beta", "hydra.verbose", "run_dir",
    "overwrite", "hydra.callbacks.a._target_", "hydra.run.dir", "nothing", "trainer.nothing", "hydra", "dataset.name",
    "method.name", "hydra.launcher", "_target_", "method._target_", "hydra.job.name", "trainer",
)  # fmt: skip
FLAGS = ("-m", "--cfg=job", "--nothing", "-h", "--resolve", "--info", "--", "-", "=", "==", "+", "~sparsity", "+a=1")
ALLOWED = {"runs", "yaml"}  # what a case may make in its folder, or the folder that its run_dir= names


def case(number: int) -> tuple[list[str], str | None]:
    """Arguments, and the text of an experiment file `fuzz`, if any."""
    chance = random.Random(number)

    def value() -> str:
        return chance.choice(chance.choice((NUMBERS, WORDS)))

    def override() -> str:
        if chance.random() < 0.4:
            group = chance.choice(list(CHOICES))
            return f"{group}={chance.choice(CHOICES[group])}"
        key = chance.choice(KEYS)
        return f"{chance.choice(('', '', '', '', '+', '++', '~'))}{key}={value()}"

    arguments = [override() for _ in range(chance.randint(1, 4))]
    if chance.random() < 0.15:
        arguments.insert(chance.randint(0, len(arguments)), chance.choice(FLAGS))
    if chance.random() < 0.3:
        arguments[-1] = mutated(arguments[-1], chance)
    text = None
    if chance.random() < 0.3:
        lines = ["# @package _global_"]
        for _ in range(chance.randint(1, 3)):
            *parents, last = chance.choice(KEYS).split(".")
            lines += [f"{'  ' * depth}{parent}:" for depth, parent in enumerate(parents)]
            lines.append(f"{'  ' * len(parents)}{last}: {value()}")
        text = "\n".join(lines) + "\n"
        if chance.random() < 0.3:
            text = mutated(text, chance)
        arguments = ["experiment=fuzz", *arguments, "--config-dir=yaml"]
    return arguments, text


def mutated(text: str, chance: random.Random) -> str:
    for _ in range(chance.randint(1, 3)):
        at = chance.randint(0, len(text))
        change = chance.choice(("delete", "insert", "double"))
        if change == "delete":
            text = text[:at] + text[at + 1 :]
        elif change == "insert":
            text = text[:at] + chance.choice("=.,:[]{}()$\"'\\ \n\t#&*!%@~+-0aé\x00\x7f") + text[at:]
        else:
            text = text[:at] + text[max(at - 5, 0) : at] + text[at:]
    return text.replace("\x00", "") if "\x00" in text and chance.random() < 0.5 else text


LAST: list[object] = []


class Hang(BaseException):
    pass


@contextlib.contextmanager
def as_a_command(arguments: list[str], seconds: int) -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """Streams, arguments and the state that one process has for one command."""

    def hang(*_: object) -> None:
        raise Hang

    out, err = io.StringIO(), io.StringIO()
    saved = argparse.ArgumentParser.error, dict(os.environ), signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    cli._failed.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(TRAIN), *arguments])
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                yield out, err
        finally:
            signal.alarm(0)
            argparse.ArgumentParser.error = saved[0]  # type: ignore[method-assign]
            os.environ.clear()
            os.environ.update(saved[1])
            signal.signal(signal.SIGALRM, saved[2])
            set_deterministic(False)


def as_hydra_reads(value: str) -> str:
    with contextlib.suppress(HydraException):
        return str(OverridesParser.create().parse_override(f"run_dir={value}").value()).split("/")[0]
    return value


def examine(number: int, folder: Path) -> str | None:
    """What is wrong with the outcome of a case, or None."""
    arguments, text = case(number)
    if text is not None:
        (folder / "yaml" / "experiment").mkdir(parents=True)
        (folder / "yaml" / "experiment" / "fuzz.yaml").write_text(text)
    typed = [*SMALL, *arguments]
    status: object = 0
    with as_a_command(typed, 120) as (out, err):
        try:
            runpy.run_path(str(TRAIN), run_name="__main__")
        except SystemExit as end:
            status = end.code
        except Hang:
            return "hangs"
        except BaseException as error:
            return f"{type(error).__name__}: {str(error)[:300]}"
    told = err.getvalue() + (f"{status}\n" if isinstance(status, str) else "")
    LAST[:] = [status, told]
    if "Traceback" in told + out.getvalue():
        return told[-500:]
    if status not in (0, None, 75):
        lines = [line for line in told.splitlines() if line.strip() and "WARNING" not in line]
        jobs = "-m" in typed or "--multirun" in typed
        if not lines or (len(lines) > 1 and not jobs):
            return f"status {status}, but said: {told[-600:]!r}"
    given = [argument.partition("=")[2] for argument in typed if "run_dir" in argument]
    # 1e-3 is a number to Hydra, which writes it as 0.001
    run_dirs = {value.strip("'\"").split("/")[0] for value in given} | {as_hydra_reads(value) for value in given}
    strange = {path.name for path in folder.iterdir()} - ALLOWED
    if any(name not in run_dirs for name in strange) and not (text and "run_dir" in text):
        return f"left {strange}"
    return None


def test_case_by_case_nothing_but_a_run_or_a_sentence(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = []
    above = tmp_path / "above"
    for number in range(50 * block, 50 * block + 50):
        folder = above / "folder"
        folder.mkdir(parents=True)
        monkeypatch.chdir(folder)
        if found := examine(number, folder):
            wrong.append(f"{number}: {case(number)}: {found}")
        if {path.name for path in above.iterdir()} != {"folder"}:
            wrong.append(f"{number}: {case(number)}: wrote outside of its folder")
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(above)
    assert not wrong, "\n".join([f"{len(wrong)} cases", *wrong])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "block" in metafunc.fixturenames:
        metafunc.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.long) for block in range(1, 40))])
