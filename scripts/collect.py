"""Copy the evidence of finished runs into results/runs/<experiment>/<run>/.

    python scripts/collect.py RUN_DIR_OR_PATTERN ... [--out DIR]

Kept are result.json, config.yaml and the evaluation of each epoch from metrics.jsonl. Copying again changes nothing.
"""

from __future__ import annotations

import argparse
import glob
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine import script  # noqa: E402
from engine.results import CONFIG, METRICS, RESULT, ResultError, epoch_records, find_runs, read_run  # noqa: E402


def without_machine_paths(text: str) -> str:
    """Shorten this checkout to "." and the home directory to "~": evidence is published."""
    for path, short in ((str(ROOT), "."), (str(Path.home()), "~")):
        if path != "/":
            text = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w-])", short, text)
    return text


def evidence(directory: Path) -> tuple[str, dict[str, str]]:
    """The experiment of the finished run in ``directory``, and its evidence as file name to content.

    Raises:
        ResultError: not finished, or damaged.
    """
    run = read_run(directory)
    lines = [json.dumps(record) for record in epoch_records(directory / METRICS)]
    files = {
        RESULT: (directory / RESULT).read_text(),
        CONFIG: (directory / CONFIG).read_text(),
        METRICS: "".join(f"{line}\n" for line in lines),
    }
    data = run.config.get("dataset.root")
    if data and Path(data).is_absolute():  # where somebody keeps the data set says nothing about the run
        files = {name: text.replace(data, "data") for name, text in files.items()}
    return run.result["experiment"], {name: without_machine_paths(text) for name, text in files.items()}


def collect(directory: Path, out: Path) -> str:
    """Copy one run's evidence below ``out``; returns one sentence about what was done.

    Raises:
        ResultError: not finished, damaged, or another run's evidence lies under the same name.
    """
    experiment, files = evidence(directory)
    name = directory.resolve().name
    target = out / experiment / name
    if (target / RESULT).exists():
        old = json.loads((target / RESULT).read_text()).get("config_hash")
        new = json.loads(files[RESULT])["config_hash"]
        if old != new:
            raise ResultError(
                f"{target} holds a run with other settings (config hash {old}, not {new}): move it first."
            )
    changed = [n for n, text in files.items() if not (target / n).exists() or (target / n).read_text() != text]
    if not changed:
        return f"{experiment}/{name}: up to date."
    target.mkdir(parents=True, exist_ok=True)
    for file in changed:
        temporary = target / f".{file}.tmp"
        temporary.write_text(files[file])
        temporary.replace(target / file)
    return f"{experiment}/{name}: copied {', '.join(changed)}."


def expand(pattern: str) -> list[Path]:
    """Run directories that ``pattern`` names: itself, or those below it.

    Raises:
        ResultError: there is none.
    """
    found = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    runs = [run for path in found if path.is_dir() for run in find_runs(path)]
    if not runs:
        raise ResultError(f"{pattern} matches no run directory; expected one like runs/<experiment>/<run>.")
    return runs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run directory, directory of runs, or quoted pattern")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "runs", help="default: results/runs")
    options = parser.parse_args(arguments)
    status = 0
    seen: set[Path] = set()
    for pattern in options.runs:
        try:
            directories = expand(pattern)
        except ResultError as error:
            print(error, file=sys.stderr)
            status = 1
            continue
        for directory in directories:
            if directory.resolve() in seen:
                continue
            seen.add(directory.resolve())
            try:
                print(collect(directory, options.out))
            except (ResultError, OSError, ValueError) as error:
                print(error, file=sys.stderr)
                status = 1
    return status


if __name__ == "__main__":
    script.run(main)
