"""Between Hydra and the person at the command line: a mistake ends with one sentence and a status other than 0."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from engine.config import Config, ConfigError

_failed: list[str] = []
_full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"  # the user's wish for tracebacks


def job(task: Callable[[], float]) -> float:
    """Run one job; a ``ConfigError`` is told at once and the other jobs of a sweep go on."""
    try:
        return task()
    except ConfigError as error:
        if _full_error:
            raise
        sentence = str(error)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            sentence = f"{' '.join(HydraConfig.get().overrides.task)}: {sentence}"
        _failed.append(sentence)
        print(sentence, file=sys.stderr, flush=True)
        return float("nan")


def run(main: Callable[[], Any]) -> None:
    """Call a ``@hydra.main`` function and exit with what became of it."""
    if _full_error:
        main()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra lets errors through to here instead of printing them its way
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(_sentence(error))
    if len(_failed) > 1:
        print(f"{len(_failed)} jobs failed.", file=sys.stderr)
    if _failed:
        sys.exit(1)


def _sentence(error: Exception) -> str:
    """Hydra's paragraph as one sentence that says what would be right."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice} is unknown: choose one of {', '.join(error.options)}."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    unknown = re.match(r"Could not override '(.+?)'", lines[0])
    if unknown:
        close = difflib.get_close_matches(unknown[1], list(_keys(Config)), n=1)
        return f"{unknown[1]} is not an option: " + (f"did you mean {close[0]}?" if close else "see --cfg job for all.")
    cause = str(error.__cause__ or "").splitlines()
    detail = [line.strip() for line in cause[:1] if line.strip() not in lines]
    facts = [line for line in (*lines, *detail) if not re.match(r"(full_key|reference_type|object_type|See http)", line)]
    return ": ".join(dict.fromkeys(fact.rstrip(".:") for fact in facts)) + "."


def _keys(schema: type, prefix: str = "") -> Iterator[str]:
    types = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield prefix + field.name
        if dataclasses.is_dataclass(types[field.name]):
            yield from _keys(types[field.name], f"{prefix}{field.name}.")
