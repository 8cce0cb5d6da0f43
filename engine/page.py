"""``results/index.html``: every result in one file that needs no network; its parts lie in ``engine/page_parts``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from engine import palette, published, tables
from engine.comparisons import Comparison
from engine.figures import layer_names, layers_left
from engine.grid import Experiment, NotRun
from engine.results import Cell, Statistic
from engine.settings import Setting, comparable, method_name, network_title, row_names

PARTS = Path(__file__).with_name("page_parts")
MOST_EPOCHS = 40
"""Points of a curve over training; longer histories are thinned evenly, their last epoch kept."""

Link = Callable[[Path], str]


def html(experiments: Sequence[Experiment], comparisons: dict[str, list[Comparison]], link: Link) -> str:
    """The page.

    Args:
        experiments: with evidence or without.
        comparisons: with Feather, by experiment.
        link: from a run's directory to where the page's reader finds it.
    """
    data = page_data(experiments, comparisons, link)
    embedded = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    parts = {
        "STYLE": f"{_colours()}\n{(PARTS / 'page.css').read_text()}",
        "DATA": embedded.replace("<", "\\u003c"),  # nothing in the data can end its element
        "SCRIPT": (PARTS / "page.js").read_text(),
    }
    return re.sub(r"/\*([A-Z]+)\*/", lambda found: parts[found[1]], (PARTS / "page.html").read_text())


def page_data(
    experiments: Sequence[Experiment], comparisons: dict[str, list[Comparison]], link: Link
) -> dict[str, Any]:
    """What the page shows, as JSON types; see ``page_parts/page.js`` for its reader."""
    data: dict[str, Any] = {"experiments": [], "cells": [], "comparisons": [], "layers": {}, "published": []}
    networks: dict[tuple[str, str], None] = {}
    for experiment in experiments:
        data["experiments"].append(_experiment(experiment))
        places: dict[tuple[Setting, float], int] = {}
        names = row_names((cell.setting for cell in tables.all_cells(experiment)), panels=True)
        for group in comparable(tables.all_cells(experiment)):
            for cell in group:
                places[cell.setting, cell.sparsity] = len(data["cells"])
                described = _cell(experiment, cell, names[cell.setting], link)
                data["cells"].append(described)
                if isinstance(cell, Cell):
                    data["layers"].setdefault(described["group"], layer_names(cell))
                if cell.setting.scale == "full":
                    networks[cell.setting.dataset, cell.setting.model] = None
        data["cells"] += [
            _published_alone(experiment, figure)
            for cell, figure in tables.published_rows(tables.all_cells(experiment))
            if cell is None and figure
        ]
        for comparison in comparisons.get(experiment.name, []):
            place = places[comparison.cell.setting, comparison.cell.sparsity]
            data["comparisons"].append({"cell": place, **_comparison(comparison)})
    for dataset, model in networks:
        data["published"] += [_published(figure) for figure in published.figures_for(dataset, model)]
    return data


def _experiment(experiment: Experiment) -> dict[str, Any]:
    return {
        "name": experiment.name,
        "title": tables.title(experiment),
        "scale": experiment.scale,
        "notes": [
            note.replace("**", "").replace("`", "")
            for note in (
                tables.proxy_note(experiment),
                tables.reconstruction_note(experiment),
                tables.progress_note(experiment),
            )
            if note
        ],
        "run": len(experiment.cells),
    }


def _cell(experiment: Experiment, cell: Cell | NotRun, row: str, link: Link) -> dict[str, Any]:
    s = cell.setting
    described: dict[str, Any] = {
        "experiment": experiment.name,
        "group": "/".join([experiment.name, s.dataset, s.model, s.label]),
        "title": ", ".join(filter(None, [network_title(s), s.label])),
        "model": s.model,
        "dataset": s.dataset,
        "scale": s.scale,
        "method": method_name(s),
        "row": row,
        "framework": s.framework,
        "p": s.p,
        "theta": s.theta,
        "sparsity": cell.sparsity,
        "epochs": s.epochs,
        "precision": s.precision,
        "note": "; ".join(filter(None, [s.label, s.options])),
        "published": [_published(figure) for figure in published.beside(s, cell.sparsity)],
        "unknown": s.scale == "full" and published.exists(s.dataset, s.model) == "unknown",
    }
    if isinstance(cell, NotRun):
        return described | {"n": 0, "command": cell.command}
    top1, best, change = cell.statistic("final_top1"), cell.statistic("best_top1"), cell.settled_mask_change
    return described | {
        "n": top1.n,
        "mean": _hundredths(top1.mean),
        "std": _hundredths(top1.std),
        "best": _hundredths(best.mean),
        "bestStd": _hundredths(best.std),
        "achieved": cell.statistic("achieved_sparsity").mean,
        "offTarget": cell.off_target,
        "nonzeros": cell.values("nonzeros"),
        "flops": _round(cell.statistic("flops").mean),
        "denseFlops": _round(cell.statistic("dense_flops").mean),
        "maskChange": _round(change.mean) if change else None,
        "device": ", ".join(cell.values("device")),
        "evidence": [[run.result["seed"], f"{link(run.directory)}/result.json"] for run in cell.runs],
        "history": _history(cell),
        "left": [_round(value) for value in layers_left(cell)],
    }


def _published_alone(experiment: Experiment, figure: published.Figure) -> dict[str, Any]:
    """A published figure that no cell of the experiment stands beside, as a row of its own."""
    group = f"{experiment.name}/{figure.dataset}/{figure.model}/"
    empty = dict.fromkeys(("framework", "p", "theta", "epochs", "precision", "note", "command"), "")
    names = {"model": figure.model, "dataset": figure.dataset, "method": figure.name, "row": figure.name}
    place = {"experiment": experiment.name, "group": group, "scale": "full", "sparsity": figure.sparsity}
    return {**place, **names, **empty, "n": 0, "published": [_published(figure)], "unknown": False}


def _history(cell: Cell) -> dict[str, list[float | None]]:
    histories = [run.history for run in cell.runs]
    length = min(map(len, histories))
    kept = sorted({round(i * (length - 1) / (MOST_EPOCHS - 1)) for i in range(MOST_EPOCHS)}) if length else []
    epochs = [[history[i] for history in histories] for i in kept]

    def means(values: Iterable[Sequence[float | None]]) -> list[float | None]:
        known = ([v for v in group if v is not None] for group in values)
        return [_round(Statistic.of(group).mean) if group else None for group in known]

    return {
        "epoch": [_round(records[0].epoch) for records in epochs],
        "top1": means([r.top1 for r in records] for records in epochs),
        "mask": means([r.mask_change for r in records] for records in epochs),
    }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    low, high = comparison.interval or (None, None)
    return {
        "n": comparison.n,
        "difference": _hundredths(comparison.difference.mean) if comparison.difference else None,
        "low": _hundredths(low),
        "high": _hundredths(high),
        "told": comparison.verdict,
    }


def _published(figure: published.Figure) -> dict[str, Any]:
    return {
        "dataset": figure.dataset,
        "model": figure.model,
        "name": figure.name,
        "sparsity": figure.sparsity,
        "top1": figure.top1,
        "source": figure.source,
        "at": figure.reported_sparsity,
        "flops": figure.flops,
    }


def _round(value: float | None) -> float | None:
    """Six significant digits: more than any reader or axis resolves."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def _hundredths(percentage: float | None) -> float | None:
    """As the tables print it: a browser rounds halves its own way."""
    return None if percentage is None or not math.isfinite(percentage) else float(f"{percentage:.2f}")


def _colours() -> str:
    def block(paper: str, colours: Sequence[str]) -> str:
        return "".join([f"--paper:{paper};", *(f"--c{i}:{colour};" for i, colour in enumerate(colours))])

    light, dark = block(palette.LIGHT_PAPER, palette.LIGHT), block(palette.DARK_PAPER, palette.DARK)
    return (
        f":root{{{light}}}\n"
        f"@media (prefers-color-scheme: dark) {{:root:not([data-theme=light]){{{dark}}}}}\n"
        f":root[data-theme=dark]{{{dark}}}"
    )
