"""Pages that lead to the tables: ``results/README.md`` and the overview in the project's README."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from engine import tables
from engine.comparisons import Comparison
from engine.grid import Experiment
from engine.results import Cell
from engine.settings import Setting, comparable, network_title, row_names
from engine.tables import markdown_rows


def results_page(
    experiments: Sequence[Experiment],
    compared: Mapping[str, Sequence[Comparison]],
    figures: Mapping[str, Sequence[str]],
    benchmark: str | None = None,
    findings: str | None = None,
    operator_figure: str | None = None,
    deployment_figure: str | None = None,
) -> str:
    """``results/README.md``: what was found, every experiment with its summary and figures, and what was not run.

    Args:
        experiments: with evidence or without.
        compared: with Feather, by experiment.
        figures: names of the figure files by experiment, below ``figures/``.
        benchmark: the page that ``scripts/bench.py`` wrote.
        findings: hand-written Markdown, taken as it is.
        operator_figure: name of the picture of the operator family, below ``figures/``.
        deployment_figure: name of the picture of accuracy against latency and size, where that was measured.
    """
    parts = [
        tables.marker("results/runs, results/benchmarks and results/FINDINGS.md"),
        "# Results",
        "Every number comes from a run whose evidence (configuration, metrics of each epoch, hardware, seed, commit) "
        "lies in `runs/`. Top-1 accuracy in percent after the last epoch, mean ± sample standard deviation (number of "
        "seeds). `python scripts/report.py` makes this page and `--check` tells whether it is up to date.",
        "[index.html](index.html) shows all of it with curves, filters and a table that sorts: one file that needs no "
        "network, to be opened in a browser.",
    ]
    if findings:
        parts.append(findings.strip())
    if operator_figure:
        parts += ["## The operator", f"![The operator family and its gradient rule](figures/{operator_figure})"]
    for experiment in experiments:
        if experiment.cells:
            parts += _section(experiment, compared.get(experiment.name, []), figures.get(experiment.name, []))
    waiting = [experiment for experiment in experiments if not experiment.cells]
    if waiting:
        rows = [[f"[{e.name}](tables/{e.name}.md)", str(e.declared), _networks(e), f"`{e.command}`"] for e in waiting]
        header = ["experiment", "cells", "network, data", "command"]
        parts += ["## Declared, not run", markdown_rows(header, rows)]
    if benchmark is not None:
        parts += ["## Speed", _benchmark(benchmark)]
    if deployment_figure:
        parts += [
            "## What sparsity brings where it is deployed",
            f"![Accuracy against latency and library size](figures/{deployment_figure})",
            "Networks compiled to C by `feather compile`: [latency, memory, size and accuracy beside dense runtimes]"
            "(tables/deployment.md).",
        ]
    return "\n\n".join(parts) + "\n"


def _section(experiment: Experiment, compared: Sequence[Comparison], figures: Sequence[str]) -> list[str]:
    parts = [f"## {tables.title(experiment)}", tables.proxy_note(experiment)]
    for group in comparable(tables.all_cells(experiment)):
        first = group[0].setting
        hardware = sorted({device for cell in group if isinstance(cell, Cell) for device in cell.values("device")})
        described = f"**{network_title(first)}**" + (f" ({first.label})" if first.label else "")
        names = row_names(cell.setting for cell in group)
        parts += [", ".join([described, *hardware]), tables.summary(group, names)]
    parts += [tables.reconstruction_note(experiment), _told(compared), tables.progress_note(experiment)]
    parts.append(
        f"[Beside the published figures, compared seed by seed, settings, FLOPs and evidence]"
        f"(tables/{experiment.name}.md); as CSV: [cells](tables/{experiment.name}.csv), "
        f"[comparisons](tables/{experiment.name}_paired.csv)."
    )
    parts += [f"![{figure}](figures/{figure})" for figure in figures]
    return [part for part in parts if part]


def _told(compared: Sequence[Comparison]) -> str:
    """How the comparisons with Feather came out, "" without any."""
    counts = Counter(comparison.verdict for comparison in compared)
    if not counts:
        return ""
    listed = "; ".join(f"{verdict}: {count}" for verdict, count in sorted(counts.items()))
    return f"Compared with Feather seed by seed, cells by what the 95 % interval tells: {listed}."


def _networks(experiment: Experiment) -> str:
    return "; ".join(dict.fromkeys(f"{s.model}, {s.dataset}" for s in experiment.settings()))


def overview(experiments: Sequence[Experiment]) -> str:
    """The README's tables: what was run of each network where methods are compared, and links to everything else.

    A network that an experiment trained under several conditions is shown with the longest training.
    """
    parts, elsewhere = [], []
    for experiment in experiments:
        link = f"[{experiment.name}](results/tables/{experiment.name}.md)"
        shown = _longest([cell for cell in tables.all_cells(experiment) if isinstance(cell, Cell)])
        compared = [cells for cells in shown if len({_approach(cell.setting) for cell in cells}) > 1]
        for cells in compared:
            first = cells[0].setting
            described = f" ({first.label})" if first.label else ""
            names = row_names(cell.setting for cell in cells)
            parts += [f"**{network_title(first)}**{described}, {link}:", tables.summary(cells, names)]
        if shown and not compared:
            elsewhere.append(link)
    if elsewhere:
        parts.append(f"One method alone: {', '.join(elsewhere)}.")
    return "\n\n".join(parts)


def _longest(cells: Sequence[Cell]) -> list[list[Cell]]:
    """For each network and data set the comparable cells of the longest training."""
    found: dict[str, list[Cell]] = {}
    for group in comparable(cells):
        title = network_title(group[0].setting)
        found[title] = max(found.get(title, group), group, key=lambda g: (int(g[0].setting.epochs), len(g)))
    return list(found.values())


def _approach(setting: Setting) -> tuple[str, str, str]:
    return setting.method, setting.framework, setting.modifier


def _benchmark(page: str) -> str:
    """The table of ``results/benchmarks/README.md``, with links that work from here."""
    return page[page.index("# Benchmarks") :].split("\n", 1)[1].strip().replace("](", "](benchmarks/")
