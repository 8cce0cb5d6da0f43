"""Write the workspace in which W&B compares runs: accuracy against sparsity and FLOPs, curves, layers.

    python scripts/wandb_workspace.py ENTITY/PROJECT                            saves a view and prints its address
    python scripts/wandb_workspace.py ENTITY/PROJECT --experiment cifar100_table quickstart
    python scripts/wandb_workspace.py ENTITY/PROJECT --dry-run                  prints the view as JSON, offline

Runs are grouped by method and sparsity: seeds become one line with its spread. Every call saves a new view. Needs
`pip install wandb-workspaces`. Exit status: 0 saved or printed; 1 W&B refuses; 2 the arguments or the login.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine import script  # noqa: E402
from engine.charts import BAR, CURVE, LAYER_NONZEROS, LAYER_SPARSITY, table_key  # noqa: E402
from engine.wandb_login import logged_in  # noqa: E402

METHOD, SPARSITY = "method.name", "sparsity"
COLUMNS = ("summary:final_top1", "summary:best_top1", "summary:achieved_sparsity", "summary:nonzeros", "summary:flops")


def build(entity: str, project: str, *, name: str, experiments: Sequence[str] = ()) -> Any:
    """The workspace, not saved yet; without ``experiments`` it shows all runs of the project."""
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=_sections(),
        settings=ws.WorkspaceSettings(x_axis="epoch", max_runs=50),
        runset_settings=ws.RunsetSettings(
            filters=expr.And(expr.Metric("Group").isin(list(experiments))) if experiments else "",
            groupby=[expr.Config(METHOD), expr.Config(SPARSITY)],
            order=[expr.Ordering(expr.Summary("achieved_sparsity"))],
            pinned_columns=list(COLUMNS),
        ),
    )


def _sections() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    legend = "${config:method.name} ${config:sparsity} ${run:displayName}"

    def against(summary: str, title: str, log: bool = False) -> Any:
        return wr.ScatterPlot(
            title=title,
            x=wr.SummaryMetric(summary),
            y=wr.SummaryMetric("final_top1"),
            z=wr.Config(SPARSITY),
            log_x=log,
            legend_template=legend,
        )

    def curve(*metrics: str, x: str = "epoch", title: str, by_method: bool = False, **how: Any) -> Any:
        if by_method:
            how |= {"groupby": wr.Config(METHOD), "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
        return wr.LinePlot(title=title, x=x, y=list(metrics), **how)

    def bars(metric: str, title: str, by: str) -> Any:
        return wr.BarPlot(
            title=title, metrics=[wr.SummaryMetric(metric)], groupby=wr.Config(by), groupby_aggfunc="mean",
            groupby_rangefunc="stddev", orientation="v",
        )  # fmt: skip

    def layers(chart: str, value: str, title: str) -> Any:
        return wr.CustomChart(
            query={"summaryTable": {"tableKey": table_key(chart)}},
            chart_name=BAR,
            chart_fields={"label": "layer", "value": value},
            chart_strings={"title": title},
        )

    def section(title: str, *panels: Any, is_open: bool = False) -> Any:
        return ws.Section(name=title, panels=list(panels), is_open=is_open)

    return [
        section(
            "Accuracy against sparsity",
            against("achieved_sparsity", "Final top-1 (%) against achieved sparsity"),
            against("nonzeros", "Final top-1 (%) against non-zero weights", log=True),
            bars("final_top1", "Final top-1 (%) by method", METHOD),
            bars("final_top1", "Final top-1 (%) by sparsity", SPARSITY),
            is_open=True,
        ),
        section(
            "Accuracy against FLOPs",
            against("flops", "Final top-1 (%) against FLOPs that count zeros", log=True),
            bars("flops", "FLOPs by sparsity", SPARSITY),
            is_open=True,
        ),
        section(
            "Training",
            curve("val/top1", title="Top-1 (%) by epoch", by_method=True),
            curve("val/top1", title="Top-1 (%) by epoch, every group of runs"),
            curve(CURVE, x="sparsity/global", title="Top-1 (%) on the way to the target"),
            curve("train/loss", "val/loss", title="Loss"),
            curve("train/lr", title="Learning rate"),
            is_open=True,
        ),
        section(
            "Sparsity",
            curve("sparsity/global", "sparsity/target", title="Sparsity and its target"),
            curve("sparsity/mask_change", title="Mask change", by_method=True),
            curve(title="Thresholds", metric_regex="threshold/.*"),
        ),
        section(
            "Layers",
            layers(LAYER_SPARSITY, "sparsity", "Sparsity per layer"),
            layers(LAYER_NONZEROS, "nonzeros", "Non-zero weights per layer"),
            curve(title="Sparsity of each layer by epoch", metric_regex="sparsity/layer/.*"),
        ),
        section(
            "Speed",
            curve("perf/images_per_second", title="Images per second"),
            bars("images_per_second", "Images per second by method", METHOD),
            bars("wall_seconds", "Wall-clock seconds by method", METHOD),
        ),
    ]


def specification(workspace: Any) -> dict[str, Any]:
    """The view as it is sent to W&B."""
    return workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)


def _fail(sentence: str, status: int) -> int:
    print(sentence, file=sys.stderr)
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="where the runs are, such as my-team/feather")
    parser.add_argument("--experiment", nargs="+", default=[], metavar="NAME", help="show these experiments only")
    parser.add_argument("--name", default="Sparsity comparison", help="of the saved view (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the view as JSON and send nothing")
    options = parser.parse_args(arguments)
    entity, slash, project = options.project.partition("/")
    if not (entity and slash and project) or "/" in project:
        return _fail(f"{options.project} names no project: write ENTITY/PROJECT, such as my-team/feather.", 2)
    try:
        workspace = build(entity, project, name=options.name, experiments=options.experiment)
    except ImportError:
        return _fail("wandb-workspaces is missing: pip install wandb-workspaces.", 2)
    except ValueError:  # pydantic's
        return _fail(f"--name={options.name} is no name that W&B takes: use letters and digits.", 2)
    if options.dry_run:
        print(json.dumps(specification(workspace), indent=2))
        return 0
    if not logged_in():
        return _fail("Nobody is logged in to W&B: run `wandb login` first, or add --dry-run to see the workspace.", 2)
    try:
        print(workspace.save().url)
    except Exception as error:  # whatever the network and W&B's server say, it is theirs to say
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return _fail(f"W&B does not save the workspace of {entity}/{project}: {told}", 1)
    return 0


if __name__ == "__main__":
    script.run(main)
