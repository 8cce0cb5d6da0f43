"""Pages that lead to the tables: ``results/README.md`` and the overview in the project's README."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from engine import tables
from engine.comparisons import Comparison, is_reference
from engine.grid import Experiment, NotRun
from engine.plan import framework_defaults
from engine.results import Cell
from engine.settings import Setting, comparable, method_name, network_title, row_names, text_of
from engine.tables import markdown_rows, percent


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
    """The README's table: a line per experiment with evidence, network and method, a column per sparsity.

    Of a method with several settings the one nearest to its paper stands for all.
    """
    experiments = [experiment for experiment in experiments if experiment.cells]
    columns = sorted({cell.sparsity for experiment in experiments for cell in tables.all_cells(experiment)})
    header = ["experiment", "network, data", "method", *("dense" if s == 0 else percent(s) for s in columns), "note"]
    rows = []
    for experiment in experiments:
        link = f"[{experiment.name}](results/tables/{experiment.name}.md)"
        for group in comparable(tables.all_cells(experiment)):
            network = f"{group[0].setting.model}, {group[0].setting.dataset}"
            methods: dict[str, list[Cell]] = {}
            for cell in group:
                if isinstance(cell, Cell):  # what has not been run stands in the experiment's own table
                    methods.setdefault(_short_name(cell.setting), []).append(cell)
            for name, cells in methods.items():
                chosen = min(cells, key=_departures).setting
                more = len({cell.setting for cell in cells}) - 1
                shown = f"{name} (and {more} more setting{'s' if more > 1 else ''})" if more else name
                found = {c.sparsity: c for c in group if c.setting == chosen}
                values = (_value(found.get(s)) for s in columns)
                rows.append([link, network, shown, *values, chosen.label])
    return markdown_rows(header, rows)


def _short_name(setting: Setting) -> str:
    name = method_name(setting)
    # Frameworks are columns of the paper's tables, not variations of one row.
    return name if setting.framework in ("", "global") else f"{name}, {setting.framework}"


def _departures(cell: Cell) -> tuple[bool, int]:
    """How far a setting is from what a user gets who asks for no other."""
    chosen = is_reference(cell.setting, cell.sparsity) or cell.setting.theta == "auto"
    options = framework_defaults(cell.setting.framework)
    config = cell.runs[0].config
    return not chosen, sum(text_of(config.get(f"framework.options.{key}")) != value for key, value in options.items())


def _value(cell: Cell | NotRun | None) -> str:
    if cell is None:
        return ""
    return tables.accuracy(cell) if isinstance(cell, Cell) else tables.NOT_RUN


def _benchmark(page: str) -> str:
    """The table of ``results/benchmarks/README.md``, with links that work from here."""
    return page[page.index("# Benchmarks") :].split("\n", 1)[1].strip().replace("](", "](benchmarks/")
