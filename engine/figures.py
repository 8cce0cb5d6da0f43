"""Figures of results: each is a pure function from cells to plotted data, and one from that data to a picture.

A PNG carries the hash of its data, so that a stale picture is found without comparing pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.results import Cell, Setting, row_names
from engine.tables import by_network, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Data = dict[str, Any]

HASH_KEY = "feather-data-sha256"
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "figure.dpi": 120,
}
_LINES = ["-", "--", "-.", ":", (0, (1, 2))]
_MARKERS = "osD^vP*X<>"


def data_hash(data: Data) -> str:
    """SHA-256 of the plotted numbers and names."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def stored_hash(path: Path) -> str | None:
    """The hash that a PNG carries; None where there is none, or no readable PNG."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    position = 8
    while position + 8 <= len(content):
        (length,), kind = struct.unpack(">I", content[position : position + 4]), content[position + 4 : position + 8]
        if kind == b"tEXt":
            key, _, value = content[position + 8 : position + 8 + length].partition(b"\0")
            if key.decode("latin-1") == HASH_KEY:
                return value.decode("latin-1")
        position += length + 12
    return None


def save(figure: Figure, path: Path, data: Data) -> None:
    """Write ``figure`` as PNG with its data's hash and without date or version."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    artists = [*figure.get_children(), *figure.legends]
    metadata = {"Software": None, HASH_KEY: data_hash(data)}
    figure.savefig(
        path, format="png", metadata=metadata, bbox_inches="tight", bbox_extra_artists=artists, facecolor="white"
    )


def _density_axis(sparsity: float) -> float:
    """Equal steps for equal factors of the weights that are left: dense 0, 90 % 1, 99 % 2."""
    return -math.log10(max(1 - sparsity, 1e-6))


def _panels(cells: list[Cell], panel: Callable[[list[Cell], dict[Setting, str]], Data]) -> list[Data]:
    names = row_names(cell.setting for cell in cells)
    return [
        {"title": f"{model} on {dataset}", **panel(group, names)}
        for (dataset, model), group in by_network(cells).items()
    ]


def _subplots(count: int, width: float, height: float, rows: int = 1) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, figure.subplots(rows, count, squeeze=False, sharex="col" if rows > 1 else False)


def _legend(figure: Figure, axes: Iterable[Axes]) -> None:
    entries = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if entries:
        labels = [textwrap.fill(label, 36) for label in entries]
        legend = figure.legend(list(entries.values()), labels, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        # Beside the figure, which grows on saving: long names take no room from the panels.
        legend.set_in_layout(False)


def _colours(names: Iterable[str], ordered: bool) -> dict[str, Any]:
    """A colour per name; along one scale where the names have an order (sparsities)."""
    import matplotlib

    names = list(names)
    if ordered:
        scale = matplotlib.colormaps["viridis"]
        return {name: scale(0.9 - 0.9 * i / max(len(names) - 1, 1)) for i, name in enumerate(names)}
    wheel = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
    return {name: wheel(i % wheel.N) for i, name in enumerate(names)}


def curve_data(cells: list[Cell]) -> Data | None:
    """Accuracy against sparsity; None without a sparse run."""

    def point(cell: Cell) -> Data:
        top1 = cell.statistic("final_top1")
        return {"sparsity": cell.statistic("achieved_sparsity").mean, "mean": top1.mean, "std": top1.std, "n": top1.n}

    def panel(group: list[Cell], names: dict[Setting, str]) -> Data:
        lines: dict[str, list[Data]] = {}
        for cell in group:
            if cell.sparsity:
                lines.setdefault(names[cell.setting], []).append(point(cell))
        dense = {names[cell.setting]: point(cell) for cell in group if not cell.sparsity}
        return {"lines": lines, "dense": dense, "ticks": sorted({cell.sparsity for cell in group if cell.sparsity})}

    if not any(cell.sparsity for cell in cells):
        return None
    return {"figure": "curve", "panels": _panels(cells, panel)}


def _draw_curve(data: Data) -> Figure:
    panels = [panel for panel in data["panels"] if panel["lines"]]
    figure, axes = _subplots(len(panels), 5.2, 3.8)
    names = list(dict.fromkeys(name for panel in panels for name in panel["lines"]))
    colours = _colours(names, ordered=False)
    for ax, panel in zip(axes[0], panels, strict=True):
        for i, (name, dense) in enumerate(panel["dense"].items()):
            ax.axhline(dense["mean"], color="0.35", linestyle=_LINES[1 + i % 4], linewidth=1.2, label=name)
            if dense["std"]:
                ax.axhspan(dense["mean"] - dense["std"], dense["mean"] + dense["std"], color="0.35", alpha=0.12, lw=0)
        for name, points in panel["lines"].items():
            ax.errorbar(
                [_density_axis(p["sparsity"]) for p in points],
                [p["mean"] for p in points],
                yerr=[p["std"] or 0 for p in points] if any(p["std"] for p in points) else None,
                color=colours[name],
                marker=_MARKERS[names.index(name) % len(_MARKERS)],
                markersize=5,
                capsize=3,
                label=name,
            )
        _sparsity_ticks(ax, panel["ticks"])
        ax.set_title(panel["title"])
        ax.set_xlabel("sparsity (log scale of the weights left)")
    axes[0][0].set_ylabel("top-1, last epoch (%)")
    _legend(figure, axes[0])
    return figure


def _sparsity_ticks(ax: Axes, sparsities: list[float]) -> None:
    positions = [_density_axis(s) for s in sparsities]
    gap = max(0.04 * (positions[-1] - positions[0]), 1e-9)
    kept: list[float] = []
    for s in reversed(sparsities):
        if not kept or _density_axis(kept[-1]) - _density_axis(s) >= gap:
            kept.append(s)
    ax.set_xticks([_density_axis(s) for s in kept], [percent(s) for s in kept])
    margin = 0.08 * (positions[-1] - positions[0]) or 0.2
    ax.set_xlim(positions[0] - margin, positions[-1] + margin)


def training_data(cells: list[Cell]) -> Data | None:
    """Accuracy and sparsity by epoch, mean over the seeds; None where no run has a history."""

    def panel(group: list[Cell], names: dict[Setting, str]) -> Data:
        lines = []
        for cell in group:
            histories = [run.history for run in cell.runs]
            length = min(map(len, histories))
            if not length:
                continue
            epochs = list(zip(*(history[:length] for history in histories), strict=True))
            lines.append(
                {
                    "name": names[cell.setting],
                    "sparsity": cell.sparsity,
                    "epoch": [records[0].epoch for records in epochs],
                    "top1": [math.fsum(r.top1 for r in records) / len(records) for records in epochs],
                    "zeros": [math.fsum(r.sparsity or 0.0 for r in records) / len(records) for records in epochs],
                }
            )
        return {"lines": lines}

    panels = [panel for panel in _panels(cells, panel) if panel["lines"]]
    return {"figure": "training", "panels": panels} if panels else None


def _line_styles(lines: list[Data]) -> Callable[[Data], Data]:
    """Colour by sparsity where there is one method, else by method with the sparsity in the line's pattern."""
    methods = list(dict.fromkeys(line["name"] for line in lines if line["sparsity"]))
    sparsities = sorted({line["sparsity"] for line in lines if line["sparsity"]})
    by_sparsity = len(methods) <= 1
    colours = _colours([str(s) for s in sparsities] if by_sparsity else methods, ordered=by_sparsity)

    def style(line: Data) -> Data:
        if not line["sparsity"]:
            return {"color": "0.35", "linestyle": "--", "label": line["name"]}
        name = percent(line["sparsity"])
        if by_sparsity:
            return {"color": colours[str(line["sparsity"])], "label": f"{line['name']} {name}"}
        pattern = _LINES[sparsities.index(line["sparsity"]) % len(_LINES)]
        return {"color": colours[line["name"]], "linestyle": pattern, "label": f"{line['name']} {name}"}

    return style


def _draw_training(data: Data) -> Figure:
    panels = data["panels"]
    figure, axes = _subplots(len(panels), 5.2, 5.6, rows=2)
    style = _line_styles([line for panel in panels for line in panel["lines"]])
    for (top, bottom), panel in zip(axes.T, panels, strict=True):
        for line in panel["lines"]:
            marker = {"marker": "o", "markersize": 3} if len(line["epoch"]) <= 20 else {}
            top.plot(line["epoch"], line["top1"], **style(line), **marker)
            bottom.plot(line["epoch"], [100 * zeros for zeros in line["zeros"]], **style(line), **marker)
        top.set_title(panel["title"])
        bottom.set_xlabel("epoch")
        bottom.set_ylim(-3, 103)
        bottom.xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("top-1 (%)")
    axes[1][0].set_ylabel("zeros (%)")
    _legend(figure, axes[0])
    return figure


def layers_data(cells: list[Cell]) -> Data | None:
    """Fraction of weights left in each layer, mean over the seeds; None without a sparse run."""

    def panel(group: list[Cell], names: dict[Setting, str]) -> Data:
        lines = []
        for cell in group:
            if not cell.sparsity:
                continue
            layers = [run.result["layers"] for run in cell.runs]
            left = [
                math.fsum(1 - layer["zeros"] / layer["size"] for layer in same) / len(same)
                for same in zip(*layers, strict=True)
            ]
            lines.append({"name": names[cell.setting], "sparsity": cell.sparsity, "left": left})
        layer_names = [layer["name"].removesuffix(".weight") for layer in group[0].runs[0].result["layers"]]
        return {"lines": lines, "layers": layer_names}

    panels = _panels([cell for cell in cells if cell.sparsity], panel)
    return {"figure": "layers", "panels": panels} if panels else None


_EMPTY = 1e-4  # where a layer without any weight left is drawn, on an axis that has no zero


def _draw_layers(data: Data) -> Figure:
    from matplotlib.figure import Figure

    panels = data["panels"]
    longest = max(len(panel["layers"]) for panel in panels)
    figure = Figure(figsize=(min(max(6.0, 0.26 * longest + 3), 20), 4.4 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    style = _line_styles([line for panel in panels for line in panel["lines"]])
    for ax, panel in zip(axes, panels, strict=True):
        positions = range(len(panel["layers"]))
        lowest = _EMPTY if any(0 in line["left"] for line in panel["lines"]) else 1.0
        for line in panel["lines"]:
            left = [max(x, _EMPTY) for x in line["left"]]
            lowest = min(lowest, *left)
            ax.plot(positions, left, marker="o", markersize=3, **{"linewidth": 1.1, **style(line)})
            empty = [i for i, x in enumerate(line["left"]) if x == 0]
            ax.plot(empty, [_EMPTY] * len(empty), "x", color=style(line)["color"], markersize=7)
        ax.set_yscale("log")
        ticks = [t for t in (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 5e-3, 2e-3, 1e-3, _EMPTY) if t >= 0.5 * lowest]
        ax.set_yticks(ticks, ["100 %" if t == _EMPTY else percent(1 - t) for t in ticks], minor=False)
        ax.minorticks_off()
        ax.set_ylim(1.3, 0.7 * lowest)
        ax.set_xticks(positions, panel["layers"], rotation=90, fontsize=7)
        ax.set_xlim(-0.7, len(panel["layers"]) - 0.3)
        ax.set_title(panel["title"])
        ax.set_ylabel("sparsity (log scale of the weights left)")
    _legend(figure, axes)
    return figure


FIGURES: dict[str, tuple[Callable[[list[Cell]], Data | None], Callable[[Data], Figure]]] = {
    "curve": (curve_data, _draw_curve),
    "training": (training_data, _draw_training),
    "layers": (layers_data, _draw_layers),
}


def draw(data: Data) -> Figure:
    """The picture of one of the data sets made above."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        return FIGURES[data["figure"]][1](data)
