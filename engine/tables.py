"""Tables of results as Markdown, CSV and aligned text: pure functions of the cells, without clock or machine."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from engine import published
from engine.comparisons import Comparison
from engine.grid import Experiment, NotRun
from engine.results import Cell, Statistic
from engine.settings import Setting, comparable, method_name, network_title, order, row_names

Link = Callable[[Path], str]

NOT_RUN = "not run"
_UNKNOWN = "The paper's figures for this network on this data are unknown: they could not be read, so none is shown."
_NONE = "There are no published figures for this network on this data."
_PROXY = (
    "**Proxy scale**: the experiment shrunk to a CPU{labels}. Its accuracies tell methods apart from each other; "
    "none of them is the paper's, and none is compared with a published figure."
)


def marker(source: str) -> str:
    """First line of a generated Markdown table."""
    return f"<!-- Made by scripts/report.py from {source}: do not edit. -->"


def percent(fraction: float) -> str:
    """0.98 as "98 %", 0.995 as "99.5 %"."""
    return f"{100 * fraction:.6g} %"


def mean_std(statistic: Statistic) -> str:
    """ "61.20 ± 0.30 (3)", or "61.20 (1)" where one seed has no deviation."""
    deviation = "" if statistic.std is None else f" ± {statistic.std:.2f}"
    return f"{statistic.mean:.2f}{deviation} ({statistic.n})"


def accuracy(cell: Cell) -> str:
    """After the last epoch, and at which sparsity where that is not the one asked for: "38.74 (1) at 92.15 %"."""
    reached = round(cell.statistic("achieved_sparsity").mean, 4)
    return mean_std(cell.statistic("final_top1")) + (f" at {percent(reached)}" if cell.off_target else "")


def span(values: Sequence[int]) -> str:
    """Smallest to largest of some counts, or the one that they share."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def millions(count: float) -> str:
    return f"{count / 1e6:.1f} M"


def points(difference: float) -> str:
    """A difference of two accuracies in percentage points, with its sign."""
    return f"{difference:+.2f}"


def title(experiment: Experiment) -> str:
    """The experiment's name, with "(proxy)" where it is one."""
    return f"{experiment.name} (proxy)" if experiment.scale == "proxy" else experiment.name


def reconstruction_note(experiment: Experiment) -> str:
    """Which of the thresholds' sources has no public code or paper, "" where it is not used."""
    used = any(s.framework == "asl_plus" for s in experiment.settings())
    return (
        "asl_plus is our **reconstruction** of ASL+ from its public abstract: no code of it is public." if used else ""
    )


def proxy_note(experiment: Experiment) -> str:
    """What a proxy is not, "" at full scale."""
    labels = "; ".join(label.removeprefix("proxy:").strip() for label in experiment.labels())
    return _PROXY.format(labels=f" ({labels})" if labels else "") if experiment.scale == "proxy" else ""


def progress_note(experiment: Experiment) -> str:
    """How much of what is declared has been run, and what runs the rest."""
    if experiment.command is None:
        return ""
    if not experiment.not_run:
        return f"Everything that this experiment declares has been run: `{experiment.command}`."
    return (
        f"Not run: {len(experiment.not_run)} of {experiment.declared} cells. "
        f"`{experiment.command}` runs what is missing; the CSV has one command per cell."
    )


def markdown_rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def text_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned right, for a terminal."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def csv_rows(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


def all_cells(experiment: Experiment) -> list[Cell | NotRun]:
    """With evidence and without, in the order of a table."""
    return sorted([*experiment.cells, *experiment.not_run], key=lambda cell: order(cell.setting, cell.sparsity))


def _theta(cell: Cell) -> str:
    if cell.setting.theta != "auto":
        return cell.setting.theta
    return f"{', '.join(f'{v:g}' for v in cell.values('theta'))} (auto)"


def _note(setting: Setting) -> str:
    return "; ".join(filter(None, [setting.label, setting.options]))


def evidence(cell: Cell, link: Link) -> str:
    """The seeds, each a link to its result."""
    return " ".join(f"[{run.result['seed']}]({link(run.directory)}/result.json)" for run in cell.runs)


def summary(cells: Iterable[Cell | NotRun], names: dict[Setting, str]) -> str:
    """Rows of settings by columns of sparsities; "-" where a combination is neither run nor declared."""
    cells = list(cells)
    sparsities = sorted({cell.sparsity for cell in cells})
    found = {(c.setting, c.sparsity): accuracy(c) if isinstance(c, Cell) else NOT_RUN for c in cells}
    header = ["", *("dense" if s == 0 else percent(s) for s in sparsities)]
    settings = dict.fromkeys(cell.setting for cell in cells)
    return markdown_rows(header, ([names[s], *(found.get((s, x), "-") for x in sparsities)] for s in settings))


def published_rows(cells: Iterable[Cell | NotRun]) -> list[tuple[Cell | NotRun | None, published.Figure | None]]:
    """Each cell of one network with each published figure of its kind, then the published figures without a cell."""
    rows: list[tuple[Cell | NotRun | None, published.Figure | None]] = []
    networks = {}
    for cell in cells:
        networks[cell.setting.dataset, cell.setting.model] = cell.setting
        found = published.beside(cell.setting, cell.sparsity)
        rows += [(cell, figure) for figure in found] or [(cell, None)]
    shown = {figure for _, figure in rows}
    for (dataset, model), setting in networks.items():
        if setting.scale == "full":
            rows += [(None, figure) for figure in published.figures_for(dataset, model) if figure not in shown]
    return rows


def difference(cell: Cell | NotRun | None, figure: published.Figure | None) -> float | None:
    """Our mean minus the published figure, in percentage points."""
    return cell.statistic("final_top1").mean - figure.top1 if isinstance(cell, Cell) and figure else None


def _published_top1(figure: published.Figure) -> str:
    at = f" at {percent(figure.reported_sparsity)}" if figure.reported_sparsity is not None else ""
    return f"{figure.top1:.2f}{at}"


def _beside_published(cells: list[Cell | NotRun], names: dict[Setting, str], link: Link) -> str:
    first = cells[0].setting
    known = published.exists(first.dataset, first.model)
    absent = "unknown" if known == "unknown" and first.scale == "full" else "none"
    header = ["method", "sparsity", "ours (%)", "published (%)", "difference", "source", "evidence (seeds)"]
    rows = []
    for cell, figure in published_rows(cells):
        gap = difference(cell, figure)
        shown = cell or figure
        assert shown is not None
        rows.append(
            [
                names[cell.setting] if cell else figure.name if figure else "",
                "dense" if shown.sparsity == 0 else percent(shown.sparsity),
                accuracy(cell) if isinstance(cell, Cell) else NOT_RUN,
                _published_top1(figure) if figure else absent,
                "-" if gap is None else points(gap),
                figure.source if figure else "-",
                evidence(cell, link) if isinstance(cell, Cell) else "-",
            ]
        )
    parts = []
    if first.scale == "full":
        parts = {"unknown": [_UNKNOWN], "none": [_NONE], "known": []}[known]
    parts.append(markdown_rows(header, rows))
    neighbours = published.neighbours_of(first.dataset) if first.scale == "full" else []
    if neighbours:
        parts.append("For orientation only, **another network**, never subtracted from ours:")
        parts.append(
            markdown_rows(
                ["network", "method", "sparsity", "published (%)", "source"],
                (
                    [f.model, f.name, "dense" if f.sparsity == 0 else percent(f.sparsity), f"{f.top1:.2f}", f.source]
                    for f in neighbours
                ),
            )
        )
    return "\n\n".join(parts)


def _paired(comparisons: list[Comparison], names: dict[Setting, str]) -> str:
    header = ["method", "sparsity", "n", "its mean", "Feather's mean", "difference", "95 % interval", "told"]
    rows = []
    for c in comparisons:
        means = [f"{c.mean(cell):.2f}" for cell in (c.cell, c.reference)] if c.n else ["-", "-"]
        rows.append(
            [
                *(names[c.cell.setting], percent(c.cell.sparsity), str(c.n), *means),
                points(c.difference.mean) if c.difference else "-",
                " to ".join(map(points, c.interval)) if c.interval else "-",
                c.verdict,
            ]
        )
    return (
        "Paired by seed with Feather (p = 3, the theta rule, one global threshold), means over the common seeds alone; "
        "Student's t interval of the mean difference, given from three seeds on, each for itself: of twenty such "
        f"intervals one misses by chance.\n\n{markdown_rows(header, rows)}"
    )


def _mask_change(cell: Cell) -> str:
    change = cell.settled_mask_change
    if change is None:
        return ""
    return f"{change.mean:.2g}" + ("" if change.std is None else f" ± {change.std:.1g}")


def _details(cells: list[Cell], link: Link) -> str:
    header = [
        *("method", "framework", "p", "theta", "sparsity", "top-1 last epoch (%)", "top-1 best epoch (%)"),
        *("achieved", "non-zeros", "FLOPs", "mask change", "epochs", "batch", "precision", "hardware"),
        *("seeds (evidence)", "note"),
    ]
    rows = []
    for cell in cells:
        s = cell.setting
        rows.append(
            [
                *(method_name(s), s.framework, s.p, _theta(cell), percent(cell.sparsity)),
                *(mean_std(cell.statistic("final_top1")), mean_std(cell.statistic("best_top1"))),
                percent(cell.statistic("achieved_sparsity").mean),
                span(cell.values("nonzeros")),
                *(millions(cell.statistic("flops").mean), _mask_change(cell)),
                *(s.epochs, s.batch_size, s.precision, ", ".join(cell.values("device"))),
                *(evidence(cell, link), _note(s)),
            ]
        )
    return markdown_rows(header, rows)


def experiment_markdown(experiment: Experiment, comparisons: list[Comparison], link: Link) -> str:
    """One experiment: per network a summary, the published figures, paired comparisons, settings and evidence.

    Args:
        experiment: its cells, run and not.
        comparisons: of its cells with Feather.
        link: from a run's directory to where the table's reader finds it.
    """
    parts = [
        marker(source_of(experiment)),
        f"# {title(experiment)}",
        proxy_note(experiment),
        "Top-1 accuracy in percent on the evaluation set after the last epoch: mean ± sample standard deviation "
        '(number of seeds); "not run" where the experiment declares a cell and there is no evidence, - where it '
        "declares none. FLOPs are multiply-accumulates per image, of non-zero weights alone; mask change is the "
        "fraction of the weights that enter or leave the mask in one step, mean over the ends of the epochs after "
        "the target is reached.",
        reconstruction_note(experiment),
        progress_note(experiment),
    ]
    for group in comparable(all_cells(experiment)):
        first = group[0].setting
        names = row_names(cell.setting for cell in group)
        ran = [cell for cell in group if isinstance(cell, Cell)]
        parts += [
            f"## {network_title(first)}" + (f" ({first.label})" if first.label else ""),
            summary(group, names),
            "### Beside the published figures",
            _beside_published(group, names, link),
        ]
        own = [c for c in comparisons if c.cell in ran]
        if own:
            parts += ["### Compared seed by seed", _paired(own, names)]
        if ran:
            dense_flops = ", ".join(sorted({millions(r.result["dense_flops"]) for c in ran for r in c.runs}))
            prunable = ", ".join(sorted({f"{r.result['prunable']:,}" for c in ran for r in c.runs}))
            parts += [
                "### Settings and evidence",
                f"Prunable weights: {prunable}. Dense FLOPs: {dense_flops}.",
                _details(ran, link),
            ]
    return "\n\n".join(filter(None, parts)) + "\n"


def source_of(experiment: Experiment) -> str:
    """Where a generated table comes from, for its first line."""
    return f"results/runs/{experiment.name}"


def experiment_csv(experiment: Experiment, link: Link) -> str:
    """One line per cell, numbers unrounded; fractions in [0, 1], accuracies in percent, empty where not run.

    A cell with several published figures has them separated by " + ".
    """
    header = [
        *("dataset", "model", "scale", "method", "modifier", "framework", "p", "theta", "status", "target_sparsity"),
        *("n", "final_top1_mean", "final_top1_std", "best_top1_mean", "best_top1_std"),
        *("achieved_sparsity_mean", "nonzeros_min", "nonzeros_max", "prunable", "flops_mean", "dense_flops_mean"),
        *("mask_change_mean", "epochs", "batch_size", "precision", "device", "seeds", "wall_seconds_mean", "note"),
        *("published_top1", "difference", "published_source", "evidence", "command"),
    ]
    rows: list[list[Any]] = []
    for cell in all_cells(experiment):
        s = cell.setting
        figures = published.beside(s, cell.sparsity)
        names = [s.dataset, s.model, s.scale, s.method, s.modifier, s.framework, s.p]
        quoted = [" + ".join(f"{f.top1:g}" for f in figures), " + ".join(f.source for f in figures)]
        if isinstance(cell, NotRun):
            rows.append([*names, s.theta, NOT_RUN, cell.sparsity, 0, *[""] * 11])
            rows[-1] += [s.epochs, s.batch_size, s.precision, "", "", "", _note(s)]
            rows[-1] += [quoted[0], "", quoted[1], "", cell.command]
            continue
        final, best = cell.statistic("final_top1"), cell.statistic("best_top1")
        nonzeros, change = cell.values("nonzeros"), cell.settled_mask_change
        gaps = [difference(cell, figure) for figure in figures]
        rows.append(
            [
                *(*names, _theta(cell), "run", cell.sparsity, final.n),
                *(final.mean, final.std, best.mean, best.std, cell.statistic("achieved_sparsity").mean),
                *(nonzeros[0], nonzeros[-1], " ".join(map(str, cell.values("prunable")))),
                *(cell.statistic("flops").mean, cell.statistic("dense_flops").mean, change.mean if change else ""),
                *(s.epochs, s.batch_size, s.precision, " + ".join(cell.values("device"))),
                " ".join(str(run.result["seed"]) for run in cell.runs),
                *(cell.statistic("wall_seconds").mean, _note(s)),
                *(quoted[0], " + ".join(points(gap) for gap in gaps if gap is not None), quoted[1]),
                *(" ".join(link(run.directory) for run in cell.runs), ""),
            ]
        )
    return csv_rows(header, rows)


def paired_csv(comparisons: list[Comparison]) -> str:
    """One line per comparison with Feather, numbers unrounded, in percentage points."""
    header = [
        *("dataset", "model", "scale", "epochs", "batch_size", "precision", "method", "modifier", "framework"),
        *("p", "theta", "options", "target_sparsity"),
        *("n", "seeds", "difference_mean", "difference_std", "interval_low", "interval_high", "told"),
    ]
    rows = []
    for c in comparisons:
        s = c.cell.setting
        rows.append(
            [
                *(s.dataset, s.model, s.scale, s.epochs, s.batch_size, s.precision, s.method, s.modifier, s.framework),
                *(s.p, s.theta, s.options),
                *(c.cell.sparsity, c.n, " ".join(map(str, c.seeds))),
                *((c.difference.mean, c.difference.std) if c.difference else ("", "")),
                *(c.interval or ("", "")),
                c.verdict,
            ]
        )
    return csv_rows(header, rows)


def short_rows(cells: list[Cell]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the short table that a first run ends with."""
    header = ["sparsity", "top-1 (%)", "non-zeros", "compression", "FLOPs", "wall time"]
    names = row_names(cell.setting for cell in cells)
    # The dense run is the table's own reference: only further rows need their names.
    sparse_settings = {cell.setting for cell in cells if cell.sparsity}
    several = len(sparse_settings) > 1 or len({cell.sparsity for cell in cells}) < len(cells)
    rows = []
    for cell in cells:
        final = cell.statistic("final_top1")
        top1 = mean_std(final) if final.n > 1 else f"{final.mean:.2f}"
        compression = cell.statistic("prunable").mean / max(cell.statistic("nonzeros").mean, 1)
        rows.append(
            [
                "dense" if cell.sparsity == 0 else percent(cell.sparsity),
                *(top1, span(cell.values("nonzeros")), f"{compression:.1f} x"),
                *(millions(cell.statistic("flops").mean), f"{cell.statistic('wall_seconds').mean:.0f} s"),
            ]
        )
    if several:
        header.insert(0, "run")
        rows = [[names[cell.setting], *row] for cell, row in zip(cells, rows, strict=True)]
    return header, rows


def terminal_curve(cells: list[Cell], width: int = 40) -> str:
    """Accuracy against sparsity as bars of text, on an axis that starts below the lowest value."""
    values = [cell.statistic("final_top1").mean for cell in cells]
    low = 5 * int((min(values) - 2.5) // 5) if min(values) > 2.5 else 0
    low, high = max(low, 0), max(max(values), low + 1)
    names = ["dense" if cell.sparsity == 0 else percent(cell.sparsity) for cell in cells]
    if len(set(names)) < len(names):
        rows = row_names(cell.setting for cell in cells)
        names = [f"{rows[cell.setting]} {name}" for cell, name in zip(cells, names, strict=True)]
    left = max(map(len, names))
    lines = [
        f"{name.rjust(left)} |{'#' * round(width * (value - low) / (high - low))} {value:.2f}"
        for name, value in zip(names, values, strict=True)
    ]
    axis = f"{' ' * left} {low} %{'top-1'.center(width - len(str(low)) - 2 - 7)}{high:.2f} %"
    return "\n".join([*lines, axis])
