"""W&B charts of a finished run: made once, at its end, from figures that are known anyway."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

CURVE = "val/top1_vs_sparsity"
"""Accuracy against sparsity as it is logged: ``val/top1`` over ``sparsity/global``."""

CURVE_CHART = "charts/top1_over_sparsity"
LAYER_SPARSITY = "charts/layer_sparsity"
LAYER_NONZEROS = "charts/layer_nonzeros"

BAR, LINE = "wandb/bar/v0", "wandb/line/v0"
"""W&B's own chart definitions, by which a workspace shows the tables again."""


def table_key(chart: str) -> str:
    """Where W&B keeps the table behind a chart that was logged as ``chart``."""
    return f"{chart}_table"


def final_charts(
    wandb: Any, layers: Sequence[Mapping[str, Any]], curve: Iterable[tuple[float, float]]
) -> dict[str, Any]:
    """What to log at the end: bars of sparsity and of non-zero weights per layer, and accuracy over sparsity.

    Args:
        wandb: the imported package.
        layers: ``result.json``'s, each with ``name``, ``size`` and ``zeros``; empty for a dense run.
        curve: (``sparsity/global``, ``val/top1``) of each epoch; left out where it is fewer than two points.
    """
    charts = {}
    for key, value, title in (
        (LAYER_SPARSITY, "sparsity", "Sparsity per layer"),
        (LAYER_NONZEROS, "nonzeros", "Non-zero weights per layer"),
    ):
        if layers:  # a table belongs to one chart
            charts[key] = wandb.plot.bar(_layer_table(wandb, layers), "layer", value, title=title)
    points = [list(point) for point in curve]
    if len(points) > 1:
        table = wandb.Table(columns=["sparsity", "top1"], data=points)
        charts[CURVE_CHART] = wandb.plot.line(table, "sparsity", "top1", title="Top-1 over sparsity, epoch by epoch")
    return charts


def _layer_table(wandb: Any, layers: Sequence[Mapping[str, Any]]) -> Any:
    rows = [
        [layer["name"], layer["zeros"] / layer["size"], layer["size"] - layer["zeros"], layer["size"]]
        for layer in layers
    ]
    return wandb.Table(columns=["layer", "sparsity", "nonzeros", "size"], data=rows)
