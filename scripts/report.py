"""Tables and figures from results.

    python scripts/report.py [NAME ...]     tables and figures of all (or the named) experiments in results/runs
    python scripts/report.py --check        fail when the committed tables or figures do not match results/runs
    python scripts/report.py quickstart     the same for the first run, directly from runs/quickstart

Exit status: 0 all made; 1 something was damaged, missing or stale (each named in one sentence, the rest is made);
2 wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine import (  # noqa: E402
    comparisons,
    deployment,
    drawing,
    figures,
    grid,
    index,
    page,
    picture,
    plan,
    script,
    tables,
)
from engine.config import ConfigError  # noqa: E402
from engine.grid import Experiment  # noqa: E402
from engine.results import Cell, find_runs, group_cells, read_runs  # noqa: E402

QUICKSTART = "quickstart"
PROXY = "_proxy"
OPERATOR = "operator_family"
DEPLOYMENT = "deployment"
BEGIN, END = "<!-- results: made by scripts/report.py -->", "<!-- end of results -->"


@dataclass(frozen=True)
class Products:
    """Everything that is made from one set of runs: texts and plotted data by their path."""

    texts: dict[Path, str]
    plots: dict[Path, picture.Data]

    def write(self) -> list[Path]:
        """Write the files; returns their paths."""
        for path in [*self.texts, *self.plots]:
            path.parent.mkdir(parents=True, exist_ok=True)
        for path, text in self.texts.items():
            path.write_text(text)
        for path, data in self.plots.items():
            picture.save(drawing.draw(data), path, data)
        return [*self.texts, *self.plots]

    def stale(self) -> list[str]:
        """One sentence for each file that is missing or does not show these results."""
        problems = []
        for path, text in self.texts.items():
            if not path.exists():
                problems.append(f"{shown(path)} is missing: run scripts/report.py.")
            elif path.read_text() != text:
                problems.append(f"{shown(path)} is stale: run scripts/report.py.")
        for path, data in self.plots.items():
            if not path.exists():
                problems.append(f"{shown(path)} is missing: run scripts/report.py.")
            elif picture.stored_hash(path) != picture.data_hash(data):
                problems.append(f"{shown(path)} is stale: run scripts/report.py.")
        return problems


def shown(path: Path) -> str:
    """A path relative to the working directory where it lies below it."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def link_from(table: Path) -> tables.Link:
    """Links relative to the directory of ``table``, so that they work in any checkout."""
    return lambda directory: Path(os.path.relpath(directory, table.parent)).as_posix()


def read_cells(directory: Path) -> tuple[list[Cell], list[str]]:
    """Cells of all runs below ``directory``, and what is wrong with the others."""
    runs, unreadable = read_runs(find_runs(directory))
    cells, repeated = group_cells(runs)
    return cells, unreadable + repeated


@cache
def declared(name: str) -> tuple[list[plan.Job], str]:
    """The cells that conf/experiment declares for an experiment, with one seed, and the command that runs them.

    No cells and "" where it declares no such experiment.

    Raises:
        ConfigError: its files contradict each other.
    """
    stem = name.removesuffix(PROXY)
    if stem not in plan.experiments():
        return [], ""
    scale = ["scale=proxy"] if name.endswith(PROXY) else []
    return plan.plan([stem], [*scale, "seed=0"]), " ".join(["python scripts/reproduce.py", stem, *scale])


def assemble(name: str, cells: list[Cell]) -> tuple[Experiment, list[str]]:
    """What was run of an experiment beside what it declares, and what is wrong with the declaration."""
    from feather import default_framework

    try:
        jobs, command = declared(name)
    except ConfigError as error:
        return grid.experiment(name, cells), [f"What {name} declares cannot be told, only what was run: {error}"]
    planned = [(job.overrides, job.config) for job in jobs]
    return grid.experiment(name, cells, planned, command=command or None, framework_of=default_framework), []


def compare(experiments: list[Experiment]) -> dict[str, list[comparisons.Comparison]]:
    """Every experiment's cells with Feather's, which another experiment may hold."""
    cells = [cell for experiment in experiments for cell in experiment.cells]
    return {experiment.name: comparisons.with_feather(experiment.cells, cells) for experiment in experiments}


def experiment_products(experiment: Experiment, compared: list[comparisons.Comparison], out: Path) -> Products:
    table = out / "tables" / f"{experiment.name}.md"
    texts = {
        table: tables.experiment_markdown(experiment, compared, link_from(table)),
        table.with_suffix(".csv"): tables.experiment_csv(experiment, link_from(table)),
    }
    if experiment.cells:
        texts[table.with_name(f"{table.stem}_paired.csv")] = tables.paired_csv(compared)
    return Products(texts, pictures(figures.plots(experiment.name, experiment.cells), out))


def pictures(plots: dict[str, picture.Data], out: Path) -> dict[Path, picture.Data]:
    """Each figure in every format."""
    return {out / "figures" / f"{stem}{suffix}": data for stem, data in plots.items() for suffix in picture.FORMATS}


def index_products(
    experiments: list[Experiment], compared: dict[str, list[comparisons.Comparison]], out: Path
) -> Products:
    measured, findings = out / "benchmarks" / "README.md", out / "FINDINGS.md"
    deployed = out / "benchmarks" / "deploy.json"
    evidence = json.loads(deployed.read_text()) if deployed.exists() else None
    deployed_picture = deployment.picture_data(evidence) if evidence else None
    shown_figures = {e.name: [f"{stem}.png" for stem in figures.plots(e.name, e.cells)] for e in experiments}
    texts = {
        out / "README.md": index.results_page(
            experiments,
            compared,
            shown_figures,
            measured.read_text() if measured.exists() else None,
            findings.read_text() if findings.exists() else None,
            f"{OPERATOR}.png",
            f"{DEPLOYMENT}.png" if deployed_picture else None,
        ),
        out / "index.html": page.html(experiments, compared, link_from(out / "index.html")),
    }
    front = out.parent / "README.md"
    if front.exists() and BEGIN in (text := front.read_text()):  # the project's README shows an overview
        before, rest = text.split(BEGIN, 1)
        texts[front] = f"{before}{BEGIN}\n\n{index.overview(experiments)}\n\n{END}{rest.split(END, 1)[1]}"
    if evidence:
        texts[out / "tables" / f"{DEPLOYMENT}.md"] = deployment.markdown(evidence)
    plots = {OPERATOR: figures.operator_data()} | ({DEPLOYMENT: deployed_picture} if deployed_picture else {})
    return Products(texts, pictures(plots, out))


def quickstart_products(cells: list[Cell], out: Path) -> Products:
    header, rows = tables.short_rows(cells)
    text = (
        f"{tables.marker('runs/quickstart')}\n\n# Quickstart\n\n"
        "Top-1 accuracy on the evaluation set after the last epoch; compression is prunable weights over non-zeros; "
        "FLOPs are multiply-accumulates per image, of non-zero weights alone.\n\n"
        f"{tables.markdown_rows(header, rows)}\n"
    )
    csv = tables.experiment_csv(grid.experiment(QUICKSTART, cells), link_from(out / "table.csv"))
    texts = {out / "table.md": text, out / "table.csv": csv}
    plots = {out / "curve.png": data} if (data := figures.curve_data(cells)) else {}
    return Products(texts, plots)


def wandb_hint(runs: Path) -> str:
    """Where W&B's files of these runs lie, and what shows them with and without a network."""
    offline = sorted(p for p in runs.glob("*/**/offline-run-*") if p.is_dir())
    online = sorted(p for p in runs.glob("*/**/run-*") if p.is_dir() and p.parent.name == "wandb")
    if not offline and not online:
        return (
            f"W&B: no W&B run lies below {shown(runs)} (W&B was off; metrics.jsonl of each run has the same numbers)."
        )
    example = (offline or online)[-1]
    command = Path(sys.executable).parent / "wandb"
    wandb = shown(command) if command.exists() else "wandb"
    lines = [
        f"W&B: {len(offline)} offline and {len(online)} online runs below {shown(runs)}/*/",
        "  in the terminal, works offline:",
        f"    {wandb} leet {shown(example)}",
        f"    {wandb} leet inspect --summary {shown(example)}",
    ]
    if offline:
        folder = Path(*offline[-1].relative_to(runs).parts[1:-1])
        lines += [
            "  upload, with a network and an account:",
            f"    {wandb} sync {shown(runs)}/*/{folder}/offline-run-*",
        ]
    return "\n".join(lines)


def print_quickstart(cells: list[Cell], runs: Path) -> None:
    print(tables.text_rows(*tables.short_rows(cells)))
    print(f"\n{tables.terminal_curve(cells)}\n")
    print(wandb_hint(runs))


def orphans(out: Path, experiments: list[Experiment], made: Products) -> list[str]:
    """Generated tables and pictures that belong to nothing any more."""
    names = {experiment.name for experiment in experiments}
    left = [table for table in sorted((out / "tables").glob("*.md")) if table.stem not in names]
    problems = [
        f"{shown(table)} has no runs in results/runs: delete it and its figures."
        for table in left
        if table.read_text().startswith(tables.marker(f"results/runs/{table.stem}"))
    ]
    pictures = [path for path in sorted((out / "figures").glob("*")) if path not in made.plots]
    return problems + [
        f"{shown(path)} shows nothing that results/runs holds: delete it."
        for path in pictures
        if picture.stored_hash(path)
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiment below results/runs, or quickstart")
    parser.add_argument("--runs", type=Path, help="default: results/runs (quickstart: runs/quickstart)")
    parser.add_argument("--out", type=Path, help="default: results (quickstart: results/quickstart)")
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a written file is stale")
    options = parser.parse_args(arguments)

    problems: list[str] = []
    names = list(dict.fromkeys(options.names))
    if QUICKSTART in names:
        if len(names) > 1 and (options.runs or options.out):
            parser.error("quickstart reads and writes elsewhere: give it alone with --runs or --out")
        names.remove(QUICKSTART)
        problems += _quickstart(options)
        if not names:
            return _end(problems)

    runs, out = options.runs or ROOT / "results" / "runs", options.out or ROOT / "results"
    available = {path.name for path in runs.iterdir() if path.is_dir()} if runs.is_dir() else set()
    for name in names:
        if name not in available:
            problems.append(
                f"{name} has no runs in {shown(runs)}; there are: {', '.join(sorted(available)) or 'none'}."
            )
    experiments, unreadable = read_experiments(runs, available, names)
    problems += unreadable
    compared = compare(experiments)
    products = {e.name: experiment_products(e, compared[e.name], out) for e in experiments}
    if not experiments and not names:
        print(f"No runs in {shown(runs)}: nothing to report.")
    elif not names:
        products[""] = index_products(experiments, compared, out)
    for name, made in products.items():
        if not names or name in names:
            problems += _finish(made, options.check)
    if options.check and not names:
        everything = Products({}, {path: data for made in products.values() for path, data in made.plots.items()})
        problems += orphans(out, experiments, everything)
    return _end(problems)


def read_experiments(runs: Path, available: set[str], names: Sequence[str] = ()) -> tuple[list[Experiment], list[str]]:
    """Every experiment that has runs or is declared, and what is wrong with their files.

    Args:
        runs: where they lie.
        available: those with a directory there.
        names: where given, only of these it is told what is declared; the others are read to compare with.
    """
    experiments, problems = [], []
    for name in sorted(available | (set() if names else set(plan.experiments()))):
        cells: list[Cell] = []
        if name in available:
            cells, damaged = read_cells(runs / name)
            problems += damaged if not names or name in names else []
            misplaced = sorted({c.runs[0].result["experiment"] for c in cells} - {name})
            if misplaced:
                problems.append(
                    f"{shown(runs / name)} also holds runs of {', '.join(misplaced)}: one directory per experiment."
                )
        experiment, contradictions = (
            (grid.experiment(name, cells), []) if names and name not in names else assemble(name, cells)
        )
        problems += contradictions
        if experiment.declared:
            experiments.append(experiment)
    return experiments, problems


def _quickstart(options: argparse.Namespace) -> list[str]:
    runs, out = options.runs or ROOT / "runs" / QUICKSTART, options.out or ROOT / "results" / QUICKSTART
    cells, problems = read_cells(runs)
    if not cells:
        return [*problems, f"{shown(runs)} holds no finished run: start them with 'make quickstart'."]
    problems += _finish(quickstart_products(cells, out), options.check, quiet=True)
    if not options.check:
        print_quickstart(cells, runs)
        print(f"Written: {shown(out)}/curve.png, table.md, table.csv")
    return problems


def _finish(products: Products, check: bool, quiet: bool = False) -> list[str]:
    if check:
        return products.stale()
    for path in products.write():
        if not quiet:
            print(shown(path))
    return []


def _end(problems: list[str]) -> int:
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    script.run(main)
