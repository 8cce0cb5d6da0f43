"""Between Hydra and the person at the command line: a mistake ends with one sentence and a status other than 0."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import os
import re
import string
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from engine import script
from engine.config import Config, ConfigError
from engine.trust import guard

CONF = Path(__file__).parents[1] / "conf"

_failed: list[str] = []
_full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"  # the user's wish for tracebacks


def job(task: Callable[[], float]) -> float:
    """Run one job; a ``ConfigError`` is told at once and the other jobs of a sweep go on."""
    try:
        return task()
    except (ConfigError, OmegaConfBaseException) as error:
        if _full_error:
            raise
        told = str(error) if isinstance(error, ConfigError) else sentence(error)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            told = f"{' '.join(HydraConfig.get().overrides.task)}: {told}"
        _failed.append(told)
        print(told, file=sys.stderr, flush=True)
        return float("nan")


def run(main: Callable[[], Any]) -> NoReturn:
    """Call a ``@hydra.main`` function and exit with what became of it."""
    script.run(functools.partial(_run, main))


def _help() -> str:
    """Hydra's help from the template in conf/; Hydra takes seconds, as it copies all configurations for each group."""
    folders = sorted(path for path in CONF.rglob("*") if path.is_dir() and CONF / "hydra" not in (path, *path.parents))
    options = {folder: ", ".join(sorted(file.stem for file in folder.glob("*.yaml"))) for folder in folders}
    groups = [f"{folder.relative_to(CONF).as_posix()}: {names}" for folder, names in options.items()]
    template: str = yaml.safe_load((CONF / "config.yaml").read_text())["hydra"]["help"]["template"]
    return string.Template(template).substitute(APP_CONFIG_GROUPS="\n".join([*groups, ""]))


def _run(main: Callable[[], Any]) -> None:
    guard()
    if _full_error:
        main()
        return
    sys.argv[1:] = sorted(
        sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun")
    )  # wherever they stand
    for argument in sys.argv[1:]:
        if argument.startswith("="):
            sys.exit(f"{argument} has no option before its equals sign: write KEY=VALUE.")
    argparse.ArgumentParser.error = _wrong_flag  # type: ignore[assignment, method-assign]
    _refuse_empty_sweep(sys.argv[1:])
    if sys.argv[1:] in (["--help"], ["-h"]):  # with anything else Hydra looks at that as well
        print(_help())
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra lets errors through to here instead of printing them its way
    if any(argument.startswith("hydra/launcher=") for argument in sys.argv):
        importable()
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(sentence(error))
    except Exception as error:
        if str(error).startswith("The --resolve flag"):
            sys.exit("--resolve shows the configuration with --cfg job only: add that, or leave it out.")
        if not type(error).__module__.startswith("submitit."):
            raise
        sys.exit("A submitted job ended without a result: its log is in runs/.submitit, the same command goes on.")
    if len(_failed) > 1:
        print(f"{len(_failed)} jobs failed.", file=sys.stderr)
    if _failed:
        sys.exit(1)


def importable() -> None:
    """Let processes that somebody else starts, such as a cluster's jobs, find this package wherever they work."""
    root = str(Path(__file__).resolve().parents[1])
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([root, *filter(None, known)]))


def _refuse_empty_sweep(arguments: list[str]) -> None:
    with suppress(HydraException):  # a mistake that Hydra is about to find itself
        for override in OverridesParser.create().parse_overrides([a for a in arguments if not a.startswith("-")]):
            if override.is_discrete_sweep() and not list(override.sweep_string_iterator()):
                sys.exit(f"{override.input_line} has no runs: give {override.key_or_group} at least one value.")


def _wrong_flag(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    sys.exit(f"{' '.join(message.split())}: see python train.py --help.")


# What Hydra says, and what is said instead.
_KINDS = {"Float": "a number", "Integer": "an integer", "bool": "true or false", "ListConfig": "a list, such as [a,b]"}
_REWRITTEN: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (
        r"Error merging override (.*)\n.*(?:could not be converted to|is not a valid|is not a) (\w+)",
        lambda m: f"{m[1]} is not possible: the value must be {_KINDS.get(m[2], m[2])}.",
    ),
    (r"Error merging override (.*)\n.*is not Optional", lambda m: f"{m[1]} is not possible: it needs a value."),
    (
        r"Ambiguous value for argument '(.*)'",
        lambda m: f"{m[1]} lists several values: add -m to run every one of them.",
    ),
    (r"Error parsing override '(.*)'\nmissing EQUAL", lambda m: f"{m[1]} has no value: write {m[1]}=VALUE."),
    (
        r"(?:LexerNoViableAltException|no viable alternative|mismatched input|extraneous input|token recognition)(.*)",
        lambda m: (
            f"The command line cannot be read{m[1]}: put quotes around special characters, as in 'key=\"value\"'."
        ),
    ),
    (
        r"(?:Error merging override )?(.*): Cannot assign (\w+) to Dict.*",
        lambda m: f"{m[1]} is not possible: the value must be a mapping, such as {{key:value}}.",
    ),
    (r"Multiple values for (\S+)\..*: (\S+)'", lambda m: f"{m[1]} has a choice already: write {m[1]}={m[2]}."),
)


def sentence(error: Exception) -> str:
    """Hydra's paragraph as one sentence that says what would be right."""
    if isinstance(error, MissingConfigException) and "hydra/launcher/submitit" in str(error.missing_cfg_file):
        return "hydra/launcher=slurm needs a package that is not installed: pip install .[slurm]."
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice} is unknown: choose one of {', '.join(error.options)}."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines += [line.strip() for line in str(error.__cause__ or "").splitlines()[:1] if line.strip() not in lines]
    for pattern, told in _REWRITTEN:
        if found := re.match(pattern, "\n".join(lines)):
            return told(found)
    unknown = re.match(r"Could not override '(.+?)'", lines[0])
    if unknown:
        close = difflib.get_close_matches(unknown[1], list(_keys(Config)), n=1)
        return f"{unknown[1]} is not an option: " + (f"did you mean {close[0]}?" if close else "see --cfg job for all.")
    facts = [line for line in lines if not re.match(r"(full_key|reference_type|object_type|See http)", line)]
    return ": ".join(dict.fromkeys(fact.rstrip(".:") for fact in facts)) + "."


def _keys(schema: type, prefix: str = "") -> Iterator[str]:
    types = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield prefix + field.name
        if dataclasses.is_dataclass(types[field.name]):
            yield from _keys(types[field.name], f"{prefix}{field.name}.")
