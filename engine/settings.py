"""What tells runs apart: the settings that make a row, the rows' names and order, and which rows share a table."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol, TypeVar

from engine.config import NOT_HASHED

# What a table shows in columns of its own, or what names a run rather than how it trains.
_SHOWN = {
    *("seed", "sparsity", "experiment_name", "label", "scale", "modifier"),
    *("model.name", "dataset.name", "method.name", "framework.name", "method.p", "method.theta"),
    *("trainer.epochs", "trainer.batch_size", "trainer.precision"),
}
# Where and how a run works, without influence on what it computes.
_WHERE = {*NOT_HASHED, "hydra", "config_hash"}


@dataclass(frozen=True)
class Setting:
    """Everything but sparsity and seed that tells two runs apart; one row of a table, one line of a figure."""

    model: str
    dataset: str
    method: str
    framework: str
    p: str
    theta: str
    epochs: str
    batch_size: str
    precision: str
    label: str
    modifier: str = ""
    scale: str = "full"
    options: str = ""


class HasSetting(Protocol):
    """A cell, with evidence or without."""

    @property
    def setting(self) -> Setting: ...


Placed = TypeVar("Placed", bound=HasSetting)


def comparable(cells: Iterable[Placed]) -> list[list[Placed]]:
    """Cells that one table may show beside each other: of one network, data set and label, in the given order.

    The label says how training departs from the full recipe, such as a proxy's precision and epochs.
    """
    groups: dict[tuple[str, str, str], list[Placed]] = {}
    for cell in cells:
        s = cell.setting
        groups.setdefault((s.dataset, s.model, s.label), []).append(cell)
    return list(groups.values())


def network_title(setting: Setting) -> str:
    return f"{setting.model} on {setting.dataset}"


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings as ("a.b.c", value)."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, config


def text_of(value: Any) -> str:
    """A setting as a table shows it: None is empty, 3.0 is 3."""
    if value is None:
        return ""
    if isinstance(value, float):
        return "inf" if math.isinf(value) else f"{value:g}"
    return str(value)


def modifier_name(config: dict[str, Any]) -> str:
    """The modifier that is combined with the method, "" for none."""
    modifier = config.get("modifier")
    return "" if modifier in (None, "none") else str(modifier)


def scale_name(config: dict[str, Any], label: str) -> str:
    """ "full" or "proxy"."""
    return "proxy" if config.get("scale") == "proxy" or label.startswith("proxy") else "full"


def asked(config: dict[str, Any], framework: str | None) -> frozenset[tuple[str, str]]:
    """What a flattened configuration asks to compute, but for seed and names: equal for the seeds of one cell.

    ``framework`` is the one that "auto" stands for.
    """
    config = config | {"framework.name": framework}
    names = {"seed", "experiment_name", "label"}
    tops = {key for key in _WHERE if "." not in key}
    return frozenset(
        (key, text_of(value))
        for key, value in config.items()
        if key not in names and key not in _WHERE and key.split(".")[0] not in tops
    )


def _other_options(config: dict[str, Any], dense: bool) -> dict[str, str]:
    """Settings without a column of their own."""
    unused = ("method", "framework", "sparsity_schedule") if dense else ()

    def counts(key: str) -> bool:
        top = key.split(".")[0]
        return key not in _SHOWN and key not in _WHERE and top not in _WHERE and top not in unused

    return {key: text_of(value) for key, value in config.items() if counts(key)}


def option_texts(members: Sequence[tuple[Setting, float, dict[str, Any]]]) -> list[str]:
    """What tells members of one setting apart that its columns do not show, such as "optimizer.lr=0.2".

    Args:
        members: setting, target sparsity and flattened configuration of each. Named are the options in which members
            of the same setting *and* sparsity differ: a row may have other options at another sparsity.
    """
    options = [_other_options(config, setting.method == "dense") for setting, _, config in members]
    places: dict[tuple[Setting, float], list[dict[str, str]]] = defaultdict(list)
    for (setting, sparsity, _), option in zip(members, options, strict=True):
        places[setting, sparsity].append(option)
    differing: dict[Setting, set[str]] = defaultdict(set)
    for (setting, _), group in places.items():
        keys = {key for option in group for key in option}
        differing[setting] |= {key for key in keys if len({option.get(key, "") for option in group}) > 1}
    return [
        ", ".join(f"{_short(key, differing[setting])}={option.get(key, '')}" for key in sorted(differing[setting]))
        for (setting, _, _), option in zip(members, options, strict=True)
    ]


def _short(key: str, keys: set[str]) -> str:
    """ "a.name" as "a" and "a.x" as "x" where a group's choice differs as well; other keys in full."""
    group, _, leaf = key.rpartition(".")
    if not group or f"{group}.name" not in keys:
        return key
    return group if leaf == "name" else leaf


def order(setting: Setting, sparsity: float) -> tuple[Any, ...]:
    """Sort key of a table: by network, dense first, then by method and sparsity."""
    s = setting
    return (s.dataset, s.model, s.method != "dense", *_row_order(s), sparsity)


def _row_order(s: Setting) -> tuple[Any, ...]:
    def number(text: str) -> tuple[float, str]:
        try:
            return float(text), ""
        except ValueError:
            return math.inf, text

    # Full-length runs come before shortened ones.
    return (
        s.method,
        s.framework,
        number(s.p),
        number(s.theta),
        -number(s.epochs)[0],
        number(s.batch_size),
        *astuple(s),
    )


def method_name(setting: Setting) -> str:
    """The method, and the modifier that it is combined with: "acdc + ham"."""
    return f"{setting.method} + {setting.modifier}" if setting.modifier else setting.method


def row_names(settings: Iterable[Setting], *, panels: bool = False) -> dict[Setting, str]:
    """Short names: the method, and of the rest only what the method's own rows differ in.

    Args:
        panels: each network and label has a table of its own and all share one legend, where one setting of a method
            has one name whatever it was trained on.
    """
    settings = list(dict.fromkeys(settings))
    names = {}
    for setting in settings:
        same_method = [s for s in settings if (s.method, s.modifier) == (setting.method, setting.modifier)]
        same_table = [s for s in same_method if (s.dataset, s.model) == (setting.dataset, setting.model)]
        if panels:
            same_table = [s for s in same_table if s.label == setting.label]
        peers = same_method if panels else same_table
        parts = [method_name(setting)]
        for field, form, others in (
            ("framework", "{}", peers),
            ("p", "p = {}", peers),
            ("theta", "theta = {}", peers),
            ("epochs", "{} epochs", same_table),
            ("batch_size", "batch {}", same_table),
            ("precision", "{}", same_table),
            ("options", "{}", peers),
            ("label", "{}", same_table),
        ):
            if len({getattr(s, field) for s in others}) > 1 and getattr(setting, field):
                parts.append(form.format(getattr(setting, field)))
        names[setting] = ", ".join(parts)
    return names
