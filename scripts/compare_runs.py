"""Say whether two runs are equal, and where they first part.

    python scripts/compare_runs.py RUN_A RUN_B

Compared are the configurations (without where and how they ran), every record of metrics.jsonl (without perf/*) and the
final weights bit by bit. Exit status: 0 equal; 1 they differ; 2 a run cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine import script  # noqa: E402
from engine.config import NOT_HASHED  # noqa: E402
from engine.records import read_metrics  # noqa: E402
from engine.results import CONFIG, METRICS, flatten  # noqa: E402
from engine.yaml_file import read_yaml  # noqa: E402

MODEL = "model.safetensors"


class UnreadableError(Exception):
    """A run directory that is missing or damaged; the message is one sentence."""


def differences(a: Path, b: Path) -> Iterator[str]:
    """One sentence per part in which the runs ``a`` and ``b`` differ: configuration, metrics, weights."""
    left, right = settings(a), settings(b)
    for key in sorted(left.keys() | right.keys()):
        if left.get(key) != right.get(key):
            yield f"configuration: {key} is {left.get(key)} in the first and {right.get(key)} in the second run."
    yield from _metrics(a, b)
    yield from _weights(a, b)


def settings(run: Path) -> dict[str, Any]:
    """The flattened configuration, without where and how the run was executed."""
    try:
        config = read_yaml(run / CONFIG)
    except (OSError, yaml.YAMLError):
        config = None
    if not isinstance(config, dict):
        raise UnreadableError(f"{run / CONFIG} is missing or damaged: {run} is not a run's directory.")
    return {key: value for key, value in flatten(config) if not _is_circumstance(key)}


def _is_circumstance(key: str) -> bool:
    return key in NOT_HASHED or key.partition(".")[0] in NOT_HASHED


def _metrics(a: Path, b: Path) -> Iterator[str]:
    try:
        pairs = zip_longest(read_metrics(a / METRICS), read_metrics(b / METRICS))
    except ValueError as error:
        raise UnreadableError(str(error)) from None
    for left, right in pairs:
        if left is None or right is None:
            which = "first" if right is None else "second"
            yield f"metrics: only the {which} run has step {(left or right)['step']}."
            return
        for key in sorted(left.keys() | right.keys()):
            if not key.startswith("perf/") and left.get(key) != right.get(key):
                yield f"metrics: they part at step {left['step']}: {key} is {left.get(key)} and {right.get(key)}."
                return


def _weights(a: Path, b: Path) -> Iterator[str]:
    present = [(run / MODEL).exists() for run in (a, b)]
    if not any(present):
        return
    if not all(present):
        yield f"weights: only the {'first' if present[0] else 'second'} run has finished."
        return
    try:
        left, right = (load_file(run / MODEL) for run in (a, b))
    except Exception as error:
        raise UnreadableError(f"The final weights cannot be read: {str(error).rstrip('.')}.") from None
    if left.keys() != right.keys():
        yield f"weights: only one run has {sorted(left.keys() ^ right.keys())[0]}."
        return
    for name, weight in left.items():
        other = right[name]
        if (weight.shape, weight.dtype) != (other.shape, other.dtype):
            yield f"weights: {name} differs in shape or dtype."
            return
        if differ := int((_bits(weight) != _bits(other)).any(dim=1).sum()):
            yield f"weights: {name} differs in {differ} of {weight.numel()} values."
            return


def _bits(weight: torch.Tensor) -> torch.Tensor:
    """(values, bytes of one): 0 and -0 differ, and a NaN equals itself."""
    return weight.contiguous().reshape(-1).view(torch.uint8).reshape(-1, weight.element_size())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="run directory")
    options = parser.parse_args(arguments)
    try:
        found = list(differences(*options.runs))
    except UnreadableError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(found) if found else "The runs are equal.")
    return 1 if found else 0


if __name__ == "__main__":
    script.run(main)
