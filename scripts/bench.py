"""Measure how fast everything is, against the plain way of doing it: `make bench`.

    python scripts/bench.py [PART ...]      measure, write results/benchmarks/*.json and their table
    python scripts/bench.py --check         measure briefly, fail where a ratio is worse than the committed one
    python scripts/bench.py --table         make the table anew from the committed measurements; measure nothing
    python scripts/bench.py --tag NAME      the same on another kind of machine, in files of its own: PART.NAME.json

Parts: selection, overhead, memory, choices, throughput, accuracy, data, start, scaling, reliability. Ratios are the
result: of pairs that alternate, mostly in one process. Exit status: 0 done; 1 a regression, told in one sentence; 2
wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine import script  # noqa: E402

PARTS = (
    "selection", "overhead", "memory", "choices", "throughput", "accuracy", "data", "start", "scaling", "reliability",
)  # fmt: skip
OUT = ROOT / "results" / "benchmarks"


def measure(part: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one part."""
    import torch

    from engine.benchmarks import (
        accuracy,
        choices,
        data,
        memory,
        overhead,
        reliability,
        scaling,
        selection,
        start,
        throughput,
    )  # fmt: skip

    device = torch.device(options.device)
    quick = options.check
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "selection": lambda: selection.measure(quick, device),
        "overhead": lambda: overhead.measure(quick, device, options.models, options.pairs),
        "memory": lambda: memory.measure(quick, device, options.models),
        "choices": lambda: choices.measure(quick, device, options.models),
        "throughput": lambda: throughput.measure(quick, device, options.models),
        "accuracy": lambda: accuracy.measure(quick, device, options.data),
        "data": lambda: data.measure(quick, device, options.photos),
        "start": lambda: start.measure(quick),
        "scaling": lambda: scaling.measure(quick, device),
        "reliability": lambda: reliability.measure(quick, device),
    }
    return parts[part]()


def table(directory: Path) -> str:
    """All committed measurements as a page of Markdown."""
    from engine.benchmarks.base import reaches

    lines = ["<!-- Made by scripts/bench.py --table from the files beside it: do not edit. -->", "", "# Benchmarks", "",
             "Ratios of what alternated in one process: `python scripts/bench.py` measures, `--check` compares.", "",
             "| what | ratio | target | reached | machine | evidence |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    words = {True: "yes", False: "no", None: ""}
    for part in PARTS:
        paths = [*directory.glob(f"{part}.json"), *sorted(directory.glob(f"{part}.*.json"))]
        if not paths:
            lines.append(f"| {part} | not measured | | | | `python scripts/bench.py {part}` |")
        for path in paths:
            content = json.loads(path.read_text())
            for row in content["rows"]:
                sign = {"lower": "<=", "higher": ">="}[row["better"]]
                target = "" if row["target"] is None else f"{sign} {row['target']:g}"
                cells = (row["name"], f"{row['ratio']:.3g}", target, words[reaches(row)], machine(content))
                lines.append(f"| {' | '.join(cells)} | [{path.stem}]({path.name}) |")
    return "\n".join(lines) + "\n"


def machine(content: dict[str, Any]) -> str:
    """Where a part was measured."""
    hardware = content["hardware"]
    name = (
        hardware["gpu"]
        if content["device"].startswith("cuda")
        else f"{hardware['cpu']}, {hardware['cpu_instructions']}"
    )
    return f"{name}, {hardware['threads']} threads, {content['clock']} seconds"


def regressions(path: Path, rows: list[dict[str, Any]]) -> list[str]:
    """One sentence for each row that is worse than the committed one in ``path``."""
    from engine.benchmarks.base import is_worse

    if not path.exists():
        return []
    committed = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    return [
        f"{row['name']}: ratio {row['ratio']:.3g}, where {path.name} has {committed[row['name']]['ratio']:.3g}."
        for row in rows
        if row["name"] in committed and is_worse(row, committed[row["name"]])
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--check", action="store_true", help="compare with the committed ratios, write nothing")
    parser.add_argument("--table", action="store_true", help="only make the table")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"],
                        help="cpu: CPU seconds of one thread, for a machine that others use as well")  # fmt: skip
    parser.add_argument("--device", help="cpu or cuda; default: a GPU where there is one")
    parser.add_argument("--models", nargs="+", default=[], help="networks; default all")
    parser.add_argument("--pairs", type=int, default=3, help="of steps in each stage of overhead (default 3)")
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="folder of CIFAR-100, of accuracy (default data)"
    )
    parser.add_argument("--photos", type=Path, help="folder of JPEGs for the photograph pipeline")
    parser.add_argument("--out", type=Path, default=OUT, help="default: results/benchmarks")
    parser.add_argument("--tag", default="", help="of the machine, such as avx2, in the names of its files")
    options = parser.parse_args(arguments)
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"unknown part {part}: choose of {', '.join(PARTS)}")
    problems: list[str] = []
    if not options.table:
        import torch

        from engine.benchmarks.base import use_clock
        from engine.records import environment, write_json

        options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if options.clock == "cpu" and options.device != "cpu":
            parser.error("--clock cpu tells nothing about a GPU: leave it out or add --device cpu")
        use_clock(options.clock)
        surroundings = environment()
        for part in options.parts or PARTS:
            path = options.out / ".".join(filter(None, (part, options.tag, "json")))
            rows = measure(part, options)
            for row in rows:
                print(f"{row['name']:44} {row['ratio']:.3f}", flush=True)
            if options.check:
                problems += regressions(path, rows)
            else:
                head = {"format": 1, "device": options.device, "clock": options.clock}
                command = f"python scripts/bench.py {part} --clock {options.clock} --device {options.device}"
                command += f" --pairs {options.pairs}" if part == "overhead" else ""
                command += f" --tag {options.tag}" if options.tag else ""
                write_json(path, {**head, **surroundings, "command": command, "rows": rows})
    if not options.check:
        (options.out / "README.md").write_text(table(options.out))
        print(f"Written: {options.out}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    script.run(main)
