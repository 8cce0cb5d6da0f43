"""Tables of results as Markdown, CSV and aligned text: pure functions of the cells, without clock or machine."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from engine.results import Cell, Setting, Statistic, row_names

Link = Callable[[Path], str]

_UNKNOWN = "Published figures: unknown (the paper's CIFAR-100 tables could not be read; none is shown)."
_IMAGENET = (
    "Published: Feather reaches 76.93 % at 90 % sparsity with ResNet-50 "
    "(paperswithcode board of the paper); other published figures are not compared here."
)
_NONE = "Published figures: none for this network and data set."


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


def span(values: Sequence[int]) -> str:
    """Smallest to largest of some counts, or the one that they share."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def millions(count: float) -> str:
    return f"{count / 1e6:.1f} M"


def published_note(dataset: str, model: str) -> str:
    """What the paper says about this pair, with its source, or that it is unknown."""
    if dataset == "cifar100":
        return _UNKNOWN
    return _IMAGENET if (dataset, model) == ("imagenet", "resnet50") else _NONE


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


def by_network(cells: Iterable[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """Cells by (dataset, model), in the given order."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.setting.dataset, cell.setting.model), []).append(cell)
    return groups


def _theta(cell: Cell) -> str:
    if cell.setting.theta != "auto":
        return cell.setting.theta
    return f"{', '.join(f'{v:g}' for v in cell.values('theta'))} (auto)"


def _note(setting: Setting) -> str:
    return "; ".join(filter(None, [setting.label, setting.options]))


def _summary(cells: list[Cell], names: dict[Setting, str]) -> str:
    """Rows of settings by columns of sparsities."""
    sparsities = sorted({cell.sparsity for cell in cells})
    found = {(cell.setting, cell.sparsity): mean_std(cell.statistic("final_top1")) for cell in cells}
    header = ["", *("dense" if s == 0 else percent(s) for s in sparsities)]
    settings = dict.fromkeys(cell.setting for cell in cells)
    return markdown_rows(header, ([names[s], *(found.get((s, x), "-") for x in sparsities)] for s in settings))


def _details(cells: list[Cell], link: Link) -> str:
    header = [
        *("method", "framework", "p", "theta", "sparsity", "top-1 last epoch (%)", "top-1 best epoch (%)"),
        *("achieved", "non-zeros", "FLOPs", "epochs", "batch", "precision", "hardware", "seeds (evidence)", "note"),
    ]
    rows = []
    for cell in cells:
        s = cell.setting
        seeds = " ".join(f"[{run.result['seed']}]({link(run.directory)}/result.json)" for run in cell.runs)
        rows.append(
            [
                *(s.method, s.framework, s.p, _theta(cell), percent(cell.sparsity)),
                *(mean_std(cell.statistic("final_top1")), mean_std(cell.statistic("best_top1"))),
                percent(cell.statistic("achieved_sparsity").mean),
                span(cell.values("nonzeros")),
                millions(cell.statistic("flops").mean),
                *(s.epochs, s.batch_size, s.precision, ", ".join(cell.values("device")), seeds, _note(s)),
            ]
        )
    return markdown_rows(header, rows)


def experiment_markdown(name: str, cells: list[Cell], link: Link) -> str:
    """One experiment: per network a summary by sparsity, then every cell with its settings and evidence.

    Args:
        name: the experiment.
        cells: all of its cells.
        link: from a run's directory to where the table's reader finds it.
    """
    names = row_names(cell.setting for cell in cells)
    parts = [
        marker(f"results/runs/{name}"),
        f"# {name}",
        "Top-1 accuracy in percent on the evaluation set after the last epoch: mean ± sample standard deviation "
        "(number of seeds); - where there is no run. "
        "FLOPs are multiply-accumulates per image, of non-zero weights alone.",
    ]
    for (dataset, model), group in by_network(cells).items():
        dense_flops = ", ".join(sorted({millions(r.result["dense_flops"]) for c in group for r in c.runs}))
        prunable = ", ".join(sorted({f"{r.result['prunable']:,}" for c in group for r in c.runs}))
        parts += [
            f"## {model} on {dataset}",
            _summary(group, names),
            f"Prunable weights: {prunable}. Dense FLOPs: {dense_flops}. {published_note(dataset, model)}",
            _details(group, link),
        ]
    return "\n\n".join(parts) + "\n"


def experiment_csv(cells: list[Cell], link: Link) -> str:
    """One line per cell, numbers unrounded; fractions in [0, 1], accuracies in percent."""
    header = [
        *("dataset", "model", "method", "framework", "p", "theta", "target_sparsity", "n"),
        *("final_top1_mean", "final_top1_std", "best_top1_mean", "best_top1_std"),
        *("achieved_sparsity_mean", "nonzeros_min", "nonzeros_max", "prunable", "flops_mean", "dense_flops_mean"),
        *("epochs", "batch_size", "precision", "device", "seeds", "wall_seconds_mean", "note", "evidence"),
    ]
    rows = []
    for cell in cells:
        s = cell.setting
        final, best = cell.statistic("final_top1"), cell.statistic("best_top1")
        nonzeros = cell.values("nonzeros")
        rows.append(
            [
                *(s.dataset, s.model, s.method, s.framework, s.p, _theta(cell), cell.sparsity, final.n),
                *(final.mean, final.std, best.mean, best.std, cell.statistic("achieved_sparsity").mean),
                *(nonzeros[0], nonzeros[-1], " ".join(map(str, cell.values("prunable")))),
                *(cell.statistic("flops").mean, cell.statistic("dense_flops").mean),
                *(s.epochs, s.batch_size, s.precision, " + ".join(cell.values("device"))),
                " ".join(str(run.result["seed"]) for run in cell.runs),
                *(cell.statistic("wall_seconds").mean, _note(s)),
                " ".join(link(run.directory) for run in cell.runs),
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


def index_markdown(
    experiments: dict[str, list[Cell]], benchmark: dict[str, Any] | None, figures: dict[str, list[str]]
) -> str:
    """``results/README.md``: every experiment with its summary, figures and table, and the cost of sparsification.

    Args:
        experiments: cells by name.
        benchmark: what ``scripts/bench_training.py`` wrote, or None.
        figures: names of the figure files by experiment, below ``figures/``.
    """
    parts = [
        marker("results/runs and results/benchmarks"),
        "# Results",
        "Every number comes from a run whose evidence (configuration, metrics of each epoch, hardware, seed, commit) "
        "lies in `runs/`. Top-1 accuracy in percent after the last epoch, mean ± sample standard deviation (number of "
        "seeds); what is not listed has not been run. `python scripts/report.py` makes this page and `--check` tells "
        "whether it is up to date.",
    ]
    for name, cells in experiments.items():
        parts.append(f"## {name}")
        names = row_names(cell.setting for cell in cells)
        for (dataset, model), group in by_network(cells).items():
            notes = sorted({cell.setting.label for cell in group if cell.setting.label})
            hardware = sorted({device for cell in group for device in cell.values("device")})
            parts += [
                f"**{model} on {dataset}**" + (f" ({'; '.join(notes)})" if notes else "") + f", {', '.join(hardware)}",
                _summary(group, names),
            ]
        parts.append(f"[All settings, non-zeros, FLOPs and evidence](tables/{name}.md)")
        parts += [f"![{figure}](figures/{figure})" for figure in figures.get(name, [])]
    if benchmark is not None:
        parts += ["## What sparsification costs", _benchmark(benchmark)]
    return "\n\n".join(parts) + "\n"


def overview(experiments: dict[str, list[Cell]]) -> str:
    """The README's table: a line per experiment, network and method, a column per sparsity."""
    columns = [0.0, 0.9, 0.95, 0.98, 0.99, 0.995]
    header = ["experiment", "network, data", "method", *("dense" if s == 0 else percent(s) for s in columns), "note"]
    rows = []
    for experiment, cells in experiments.items():
        for (dataset, model), group in by_network(cells).items():
            found: dict[Setting, dict[float, str]] = {}
            for cell in group:
                found.setdefault(cell.setting, {})[cell.sparsity] = mean_std(cell.statistic("final_top1"))
            names = row_names(found)
            for setting, values in found.items():
                link = f"[{experiment}](results/tables/{experiment}.md)"
                dense = 0.0 in values
                accuracies = (values.get(s, "" if (s == 0) != dense else "not run") for s in columns)
                rows.append([link, f"{model}, {dataset}", names[setting], *accuracies, setting.label])
    return markdown_rows(header, rows)


def _benchmark(benchmark: dict[str, Any]) -> str:
    hardware = benchmark["hardware"]
    device = hardware["gpu"] if benchmark["device"].startswith("cuda") else hardware["cpu"]
    header = ["network", "precision", "dense step", "sparse step", "sparse / dense (quartiles)", "images/s sparse"]
    rows = [
        [
            *(row["model"], row["precision"]),
            *(f"{1e3 * row[key]:.0f} ms" for key in ("dense_step_seconds", "sparse_step_seconds")),
            f"{row['ratio']:.3f} ({row['ratio_quartiles'][0]:.3f} to {row['ratio_quartiles'][1]:.3f})",
            f"{row['sparse_images_per_second']:.0f}",
        ]
        for row in benchmark["rows"]
    ]
    first = benchmark["rows"][0]
    return (
        f"Training steps of Feather at {percent(first['sparsity'])} over a whole schedule against dense ones, batch "
        f"{first['batch_size']}, 32x32 images, median of {first['pairs']} interleaved pairs, {device}, "
        f"{hardware['threads']} threads; [evidence](benchmarks/training.json).\n\n{markdown_rows(header, rows)}"
    )
