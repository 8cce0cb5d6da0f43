"""Pictures of the data that ``engine.figures`` makes."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from engine.palette import LIGHT
from engine.picture import Data
from engine.tables import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
_DENSE: Any = {"color": "0.35", "linestyle": "--", "linewidth": 1.2}
_EMPTY = 1e-4  # where a layer without any weight left is drawn, on an axis that has no zero


def draw(data: Data) -> Figure:
    """The picture of one of the data sets of ``engine.figures``."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        return _DRAW[data["figure"]](data)


def _density_axis(sparsity: float) -> float:
    """Equal steps for equal factors of the weights that are left: dense 0, 90 % 1, 99 % 2."""
    return -math.log10(max(1 - sparsity, 1e-6))


def _subplots(columns: int, width: float, height: float, rows: int = 1) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharex="col" if rows > 1 else False)


def _legend(figure: Figure, axes: Iterable[Axes]) -> None:
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        labels = [textwrap.fill(label, 36) for label in entries]
        legend = figure.legend(list(entries.values()), labels, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        # Beside the figure, which grows on saving: long names take no room from the panels.
        legend.set_in_layout(False)


def _title(figure: Figure, data: Data, text: str = "") -> None:
    parts = [text, "proxy scale" if data.get("proxy") and "proxy" not in text else ""]
    if any(parts):
        figure.suptitle(", ".join(filter(None, parts)), fontsize=11)


def _row_styles(names: Iterable[str]) -> dict[str, Data]:
    """Colour, marker and line by name: no two of the first forty look alike."""
    return {
        name: {
            "color": LIGHT[i % len(LIGHT)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": _LINES[i // len(LIGHT) % len(_LINES)],
        }
        for i, name in enumerate(dict.fromkeys(names))
    }


def _line_styles(data: Data) -> Callable[[Data], Data]:
    """Style by row; where there is only one row, colour along a scale by sparsity."""
    import matplotlib

    rows, alone = _row_styles(data["rows"]), len(data["rows"]) <= 1
    sparsities = sorted({line["sparsity"] for p in data["panels"] for line in p["lines"] if line["sparsity"]})
    scale = matplotlib.colormaps["viridis"]

    def style(line: Data) -> Data:
        if not line["sparsity"]:
            return {**_DENSE, "label": line["name"]}
        if alone:
            i = sparsities.index(line["sparsity"])
            return {
                "color": LIGHT[0] if len(sparsities) == 1 else scale(0.75 - 0.75 * i / (len(sparsities) - 1)),
                "marker": _MARKERS[i % len(_MARKERS)],
                "label": f"{line['name']} {percent(line['sparsity'])}",
            }
        return {**rows[line["name"]], "label": line["name"]}

    return style


def _draw_curve(data: Data) -> Figure:
    panels = data["panels"]
    figure, axes = _subplots(len(panels), 5.2, 4.0)
    styles = _row_styles(name for panel in panels for name in panel["lines"])
    for ax, panel in zip(axes[0], panels, strict=True):
        for i, (name, dense) in enumerate(panel["dense"].items()):
            ax.axhline(dense["mean"], **_DENSE | {"linestyle": _LINES[1 + i % 4]}, label=name)
            if dense["std"]:
                ax.axhspan(dense["mean"] - dense["std"], dense["mean"] + dense["std"], color="0.35", alpha=0.12, lw=0)
        breadth = _density_axis(panel["ticks"][-1]) - _density_axis(panel["ticks"][0])
        # side by side where there is one target, error bars beside each other where lines lead through several
        shift = min(0.006, 0.03 / len(panel["lines"])) * breadth or 0.8 * _NARROWEST / len(panel["lines"])
        for i, (name, points) in enumerate(panel["lines"].items()):
            aside = (i - (len(panel["lines"]) - 1) / 2) * shift
            ax.errorbar(
                [_density_axis(p["sparsity"]) + aside for p in points],
                [p["mean"] for p in points],
                yerr=[p["std"] or 0 for p in points] if any(p["std"] for p in points) else None,
                **styles[name],
                markersize=5,
                capsize=3,
                label=name,
            )
        _sparsity_ticks(ax, panel["ticks"], [p["sparsity"] for points in panel["lines"].values() for p in points])
        ax.set_title(panel["title"])
        ax.set_xlabel("sparsity (log scale of the weights left)")
    axes[0][0].set_ylabel("top-1, last epoch (%)")
    _title(figure, data)
    _legend(figure, axes[0])
    return figure


_NARROWEST = 0.3  # breadth of the axis where all runs have one target, so that what they missed it by looks small


def _sparsity_ticks(ax: Axes, sparsities: list[float], reached: list[float]) -> None:
    """Ticks at the targets, as far as their texts have room; limits around them and around what was reached."""
    positions = sorted(_density_axis(s) for s in [*sparsities, *reached])
    gap = max(0.06 * (positions[-1] - positions[0]), 1e-9)
    kept: list[float] = []
    for s in reversed(sparsities):
        if not kept or _density_axis(kept[-1]) - _density_axis(s) >= gap:
            kept.append(s)
    ax.set_xticks([_density_axis(s) for s in kept], [percent(s) for s in kept])
    breadth = positions[-1] - positions[0]
    margin = max(0.08 * breadth, (_NARROWEST - breadth) / 2)
    ax.set_xlim(positions[0] - margin, positions[-1] + margin)


def _panel_title(panel: Data) -> str:
    return "" if panel["sparsity"] is None else percent(panel["sparsity"])


def _few_markers(line: Data) -> Data:
    return {"markersize": 4, "markevery": max(1, len(line["epoch"]) // 10)}


def _draw_training(data: Data) -> Figure:
    panels = data["panels"]
    figure, axes = _subplots(len(panels), 5.2 if len(panels) == 1 else 3.6, 5.8, rows=2)
    style = _line_styles(data)
    for (top, bottom), panel in zip(axes.T, panels, strict=True):
        for line in panel["lines"]:
            top.plot(line["epoch"], line["top1"], **style(line), **_few_markers(line))
            bottom.plot(line["epoch"], [100 * zeros for zeros in line["zeros"]], **style(line), **_few_markers(line))
        top.set_title(_panel_title(panel))
        bottom.set_xlabel("epoch")
        bottom.set_ylim(-3, 103)
        bottom.xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("top-1 (%)")
    axes[1][0].set_ylabel("zeros (%)")
    _title(figure, data, data["title"])
    _legend(figure, axes[0])
    return figure


def _draw_mask(data: Data) -> Figure:
    panels = data["panels"]
    figure, axes = _subplots(len(panels), 5.2 if len(panels) == 1 else 3.6, 4.0)
    style = _line_styles(data)
    for ax, panel in zip(axes[0], panels, strict=True):
        for line in panel["lines"]:
            # A logarithmic axis has no zero: an epoch whose last step left the mask alone shows no point.
            mean = [value if value > 0 else math.nan for value in line["mean"]]
            bars = [
                0 if std is None or math.isnan(m) else min(std, 0.9 * m)
                for m, std in zip(mean, line["std"], strict=True)
            ]
            ax.errorbar(
                line["epoch"], mean, yerr=bars if any(bars) else None, capsize=2, elinewidth=0.8,
                **style(line), **_few_markers(line),
            )  # fmt: skip
        ax.set_yscale("log")
        ax.set_title(_panel_title(panel))
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("weights entering or leaving the mask\nin the epoch's last step (fraction)")
    _title(figure, data, data["title"])
    _legend(figure, axes[0])
    return figure


def _draw_layers(data: Data) -> Figure:
    from matplotlib.figure import Figure

    panels, layers = data["panels"], data["layers"]
    width = min(max(6.0, 0.26 * len(layers) + 3), 20)
    figure = Figure(figsize=(width, 1.6 + 3.0 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    style = _line_styles(data)
    positions = range(len(layers))
    for ax, panel in zip(axes, panels, strict=True):
        lowest = _EMPTY if any(0 in line["left"] for line in panel["lines"]) else 1.0
        for line in panel["lines"]:
            left = [max(x, _EMPTY) for x in line["left"]]
            lowest = min(lowest, *left)
            ax.plot(positions, left, markersize=4, **{**style(line), "linewidth": 1.1})
            empty = [i for i, x in enumerate(line["left"]) if x == 0]
            ax.plot(empty, [_EMPTY] * len(empty), "x", color=style(line)["color"], markersize=7)
        _left_axis(ax, lowest)
        ax.set_title(_panel_title(panel))
        ax.set_ylabel("sparsity\n(log scale of the weights left)")
    axes[-1].set_xticks(positions, layers, rotation=90, fontsize=7)
    axes[-1].set_xlim(-0.7, len(layers) - 0.3)
    _title(figure, data, data["title"])
    _legend(figure, axes)
    return figure


def _left_axis(ax: Axes, lowest: float) -> None:
    ax.set_yscale("log")
    ticks = [t for t in (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 5e-3, 2e-3, 1e-3, _EMPTY) if t >= 0.5 * lowest]
    ax.set_yticks(ticks, ["100 %" if t == _EMPTY else percent(1 - t) for t in ticks], minor=False)
    ax.minorticks_off()
    ax.set_ylim(1.3, 0.7 * lowest)


def _draw_operator(data: Data) -> Figure:
    figure, axes = _subplots(2, 4.8, 4.2)
    left, right = axes[0]
    weight = data["weight"]
    names = {"1": "p = 1, soft", "3": "p = 3, Feather", "inf": "p = ∞, hard"}
    for i, (p, values) in enumerate(data["operators"].items()):
        line = {"color": LIGHT[i], "linewidth": 2.6 if p == "3" else 1.4}
        for j, (x, y) in enumerate(_continuous(weight, values)):
            left.plot(x, y, **line, label=None if j else names.get(p, f"p = {p}"))
    left.plot(weight, weight, color="0.6", linestyle=":", linewidth=1, zorder=0)
    left.set_xlabel("dense weight w / T")
    left.set_ylabel("sparse weight P(w) / T")
    left.set_title("forward: the operator of order p, T = 1")
    left.set_aspect("equal")
    left.legend(loc="upper left")
    for i, (theta, values) in enumerate(data["gradients"].items()):
        shift = 0.012 * (1 - i)  # lines that coincide outside the threshold stay visible
        colour = {"color": LIGHT[i], "linestyle": _LINES[i]}
        right.plot(weight, [v + shift for v in values], **colour, linewidth=2, label=f"θ = {theta}")
    right.set_ylim(-0.08, 1.35)
    right.set_xlabel("dense weight w / T")
    right.set_ylabel("gradient of w over gradient of P(w)")
    right.set_title("backward: pruned weights get θ of it")
    right.legend(loc="upper right", ncols=3)
    return figure


def _draw_deployment(data: Data) -> Figure:
    panels = list(data["panels"].items())
    figure, axes = _subplots(2, 4.8, 3.6 * len(panels), rows=len(panels))
    styles = _row_styles(name for _, lines in panels for name in lines)
    for row, (title, lines) in zip(axes, panels, strict=True):
        for ax, key in zip(row, ("microseconds", "kib"), strict=True):
            for i, (name, points) in enumerate(lines.items()):
                ax.plot([p[key] for p in points], [p["top1"] for p in points], **styles[name], markersize=5, label=name)
                for p in points:  # above the first line, below the others: the same networks lie close together
                    label = percent(p["sparsity"]) if p["sparsity"] else "dense"
                    place: Data = {"xytext": (0, -6 if i else 6), "va": "top" if i else "bottom", "ha": "center"}
                    ax.annotate(label, (p[key], p["top1"]), **place, textcoords="offset points", fontsize=7)
            ax.set_xscale("log")
            ax.margins(x=0.12, y=0.2)
            ax.set_title(title)
            low, high = ax.get_ylim()
            if high - low < 1:  # a few images of difference should not look like much
                ax.set_ylim((low + high) / 2 - 0.5, (low + high) / 2 + 0.5)
        row[0].set_ylabel("top-1 of the C code (%)")
    for ax, text in zip(axes[-1], ("us per image, one core", "library, KiB"), strict=True):
        ax.set_xlabel(text)
    _legend(figure, axes[:, 0])
    return figure


def _continuous(x: list[float], y: list[float]) -> list[tuple[list[float], list[float]]]:
    """Split a line where it jumps."""
    jumps = [i for i in range(1, len(y)) if abs(y[i] - y[i - 1]) > 0.6]
    bounds = [0, *jumps, len(y)]
    return [(x[i:j], y[i:j]) for i, j in itertools.pairwise(bounds)]


_DRAW: dict[str, Callable[[Data], Figure]] = {
    "curve": _draw_curve,
    "training": _draw_training,
    "layers": _draw_layers,
    "allocation": _draw_layers,
    "mask": _draw_mask,
    "operator": _draw_operator,
    "deployment": _draw_deployment,
}
