"""``create``: sparse training by name, in two lines."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from feather.baselines import ACDC, SET, SRSTE, ST3, STR, PowerProp, RigL, Spartan, ST3Sigma, TopKAST
from feather.frameworks import BY_MAGNITUDE, FRAMEWORKS, Framework
from feather.method import FixedMask, Method, Thresholding
from feather.modifiers import MODIFIERS, Modifier
from feather.operator import auto_theta
from feather.quantile import zeros_at
from feather.schedule import Schedule, create_schedule
from feather.selection import prunable_parameters
from feather.sparsifier import Sparsifier


@dataclass(frozen=True)
class Preset:
    """A named method.

    Attributes:
        p, theta: its point of the grid of thresholding methods; None where it has no such choice.
        fixed: which of them define the method and cannot be set.
        framework: what "auto" means, the choice of its paper; None for a method that learns thresholds of its own.
        frameworks: those it can use.
        build: makes it from schedule, framework and total steps; None: ``Thresholding`` with p and theta.
    """

    p: float | None = None
    theta: float | str | None = None
    fixed: tuple[str, ...] = ("p", "theta")
    framework: str | None = "global"
    frameworks: tuple[str, ...] = tuple(BY_MAGNITUDE)
    build: Callable[[Schedule, Any, int], Method] | None = None


PRESETS: dict[str, Preset] = {
    "feather": Preset(p=3.0, theta="auto", fixed=(), frameworks=tuple(FRAMEWORKS)),
    "gmp": Preset(p=math.inf, theta=0.0, frameworks=tuple(FRAMEWORKS)),
    "ste": Preset(p=math.inf, theta=1.0, frameworks=tuple(FRAMEWORKS)),
    "soft_ste": Preset(p=1.0, theta=1.0, frameworks=tuple(FRAMEWORKS)),
    "st3": Preset(p=1.0, theta=1.0, build=ST3),
    "st3_sigma": Preset(p=1.0, theta=1.0, build=ST3Sigma, frameworks=("global",)),
    "sr_ste": Preset(p=math.inf, theta=1.0, build=SRSTE),
    "rigl": Preset(build=RigL, framework="erk", frameworks=("erk", "uniform")),
    "acdc": Preset(build=ACDC),
    "topkast": Preset(p=math.inf, build=TopKAST, framework="uniform"),
    "set": Preset(build=SET, framework="erk", frameworks=("erk", "uniform")),
    "spartan": Preset(build=Spartan, frameworks=("global",)),
    "str": Preset(p=1.0, build=STR, framework=None, frameworks=()),
    "powerprop": Preset(p=math.inf, theta=0.0, build=PowerProp),
}


def methods() -> list[str]:
    """Names that ``create`` takes."""
    return ["dense", *PRESETS]


def default_framework(method: str) -> str | None:
    """What ``framework="auto"`` means for ``method``: the choice of its paper; None for the dense run."""
    return PRESETS[method].framework if method in PRESETS else None


def create(
    method: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    sparsity: float,
    total_steps: int,
    p: float | None = None,
    theta: float | str | None = None,
    framework: str = "auto",
    framework_options: Mapping[str, Any] | None = None,
    schedule: str | Schedule = "cubic",
    start_step: int | None = None,
    end_step: int | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    modifier: str | Modifier = "none",
    modifier_options: Mapping[str, Any] | None = None,
) -> Sparsifier:
    """Start sparse training: from here on every ``optimizer.step()`` prunes ``model`` along the schedule.

        sparsifier = feather.create("feather", model, optimizer, sparsity=0.98, total_steps=epochs * len(loader))
        ...                      # the usual loop
        sparsifier.finalize()

    Args:
        method: one of ``methods()``; "dense" (or ``sparsity=0``) prunes nothing.
        model: any module; DistributedDataParallel and torch.compile may come before or after.
        optimizer: the optimizer that trains the prunable weights.
        sparsity: final fraction of zero weights, in [0, 1).
        total_steps: optimizer steps of the whole run.
        p: order of the operator, in [1, inf]; default 3 for Feather.
        theta: scale of pruned weights' gradients, in [0, 1], or "auto" (0.5 above 95 % sparsity, else 1).
        framework: where thresholds come from: "global", layer by layer with "uniform" or "erk" densities, learned layer
            by layer with "asl" or "asl_plus", or "auto" for the choice of the method's paper.
        framework_options: choices that the framework leaves open (its ``options``); default its own.
        schedule: how the sparsity grows, for methods that prune gradually: "cubic", "linear", "one_shot", or a
            ``Schedule`` (which then holds its own steps and target).
        start_step: optimizer step at which pruning starts; default 0.
        end_step: optimizer step from which the target holds; default half of ``total_steps``.
        include: patterns of weights to prune; default all of Conv, Linear and MultiheadAttention.
        exclude: patterns of weights to leave dense.
        modifier: what else each step does to the weights, with any method, "dense" included: "none", "ham", or an
            instance such as ``feather.HAM(beta=16e-3)``.
        modifier_options: arguments of a modifier given by name, such as ``{"beta": 16e-3}``.

    Returns:
        The running ``Sparsifier``.

    Raises:
        ValueError: an argument is out of range, a pattern matches nothing, nothing is prunable, or the optimizer does
            not hold a prunable weight.
    """
    if method not in methods():
        raise ValueError(f"method={method!r} is unknown: choose one of {', '.join(methods())}.")
    _require_common(model, optimizer, total_steps)
    _require(_is_number(sparsity) and 0 <= sparsity < 1, "sparsity", sparsity, "in [0, 1), the fraction of zeros")
    for name, step in (("start_step", start_step), ("end_step", end_step)):
        _require(step is None or (_is_integer(step) and 0 <= step <= total_steps), name, step, f"in [0, {total_steps}]")
    if method == "dense":
        _require(sparsity == 0, "sparsity", sparsity, "0 with method='dense'")
    preset = PRESETS.get(method, PRESETS["feather"])
    for name, value in (("p", p), ("theta", theta)):
        own = getattr(preset, name)
        if value is not None and name in preset.fixed and value != own:
            has = f"is {name}={own}" if own is not None else f"has no {name}"
            raise ValueError(f"{name}={value!r} does not go with method={method!r}, which {has}.")
    _require(framework in ("auto", *FRAMEWORKS), "framework", framework, f"one of auto, {', '.join(FRAMEWORKS)}")
    if framework not in ("auto", *preset.frameworks):
        usable = " or ".join(preset.frameworks) or "thresholds of its own"
        raise ValueError(f"framework={framework!r} does not go with method={method!r}, which uses {usable}.")
    framework = preset.framework or "global" if framework == "auto" else framework
    if isinstance(schedule, Schedule):
        for name, step in (("start_step", start_step), ("end_step", end_step)):
            _require(step is None, name, step, "left out where schedule is a Schedule, which holds its own")
        _require(schedule.target == sparsity, "schedule.target", schedule.target, f"sparsity={sparsity}")
        _require(schedule.end_step <= total_steps, "schedule.end_step", schedule.end_step, f"in [0, {total_steps}]")
    else:
        schedule = create_schedule(schedule, sparsity, total_steps, start_step=start_step, end_step=end_step)
    source = _framework(framework, framework_options or {})
    schedule = source.start(schedule, int(total_steps))
    built: Method
    if preset.build is not None:
        built = preset.build(schedule, source, int(total_steps))
    else:
        order, scale = _order(preset.p if p is None else p), _theta(preset.theta if theta is None else theta, sparsity)
        built = Thresholding(schedule, source, p=order, theta=scale)
    changes = _modifier(modifier, modifier_options or {})
    parameters = prunable_parameters(model, include, exclude)
    _require_trainable(model, parameters, optimizer)
    if changes is not None and any(other.modifier is not None for other in Sparsifier.of(model)):
        raise ValueError("Another sparsifier of this model has a modifier, which acts on all weights: give it to one.")
    return Sparsifier(model, optimizer, built, parameters, int(total_steps), changes)


def fine_tune(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    total_steps: int,
    mask: str = "fixed",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> Sparsifier:
    """Go on training a model that is already sparse, at the sparsity that its weights have.

    Args:
        mask: "fixed" keeps today's zeros; "free" lets Feather choose them anew at every step, as many as today.
        model, optimizer, total_steps, include, exclude: as in ``create``.

    Raises:
        ValueError: as in ``create``, or no prunable weight is zero.
    """
    _require(mask in ("fixed", "free"), "mask", mask, "'fixed' or 'free'")
    _require_common(model, optimizer, total_steps)
    parameters = prunable_parameters(model, include, exclude)
    size = sum(parameter.numel() for parameter in parameters.values())
    zeros = sum(int((parameter.detach() == 0).sum()) for parameter in parameters.values())
    if zeros in (0, size):
        which = "No" if zeros == 0 else "Every"
        raise ValueError(
            f"{which} prunable weight of the model is zero: load a sparse checkpoint first, or use feather.create."
        )
    if mask == "free":
        # the rank of the largest zero, so that T starts at zero and leaves the weights as they are
        sparsity = (zeros - 1) / (size - 1)
        while zeros_at(sparsity, size) < zeros:
            sparsity = math.nextafter(sparsity, 1)
        return create(
            "feather", model, optimizer, sparsity=sparsity, total_steps=total_steps, schedule="one_shot",
            include=include, exclude=exclude,
        )  # fmt: skip
    _require_trainable(model, parameters, optimizer)
    method: Method = FixedMask([parameter.detach() for parameter in parameters.values()])
    return Sparsifier(model, optimizer, method, parameters, int(total_steps))


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r} is out of range: it must be {allowed}.")


def _order(p: float | None) -> float:
    if p is None or not _is_number(p) or p < 1:
        raise ValueError(f"p={p!r} is out of range: it must be a number in [1, inf].")
    return float(p)


def _framework(name: str, options: Mapping[str, Any]) -> Framework:
    choices = FRAMEWORKS[name].options
    for option, value in options.items():
        known = ", ".join(choices) or "none"
        _require(option in choices, "framework_options", option, f"one of those of framework={name!r}: {known}")
        allowed = ", ".join(choices[option])
        _require(value in choices[option], f"framework_options[{option!r}]", value, f"one of {allowed}")
    return FRAMEWORKS[name](**options)


def _theta(theta: float | str | None, sparsity: float) -> float:
    if theta == "auto":
        return auto_theta(sparsity)
    if not isinstance(theta, Real) or not _is_number(theta) or not 0 <= theta <= 1:
        raise ValueError(f"theta={theta!r} is out of range: it must be a number in [0, 1] or 'auto'.")
    return float(theta)


def _modifier(modifier: str | Modifier, options: Mapping[str, Any]) -> Modifier | None:
    if isinstance(modifier, Modifier):
        _require(not options, "modifier_options", options, "left out where modifier is an instance, which has its own")
        return modifier
    choices = ("none", *MODIFIERS)
    _require(modifier in choices, "modifier", modifier, f"one of {', '.join(choices)}, or an instance such as HAM()")
    if modifier == "none":
        return None
    known = list(inspect.signature(MODIFIERS[modifier]).parameters)
    for option in options:
        _require(option in known, "modifier_options", option, f"one of those of {modifier}: {', '.join(known)}")
    return MODIFIERS[modifier](**options)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _require_common(model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
    _require(isinstance(model, nn.Module), "model", model, "a torch.nn.Module")
    _require(isinstance(optimizer, torch.optim.Optimizer), "optimizer", optimizer, "a torch.optim.Optimizer")
    _require(_is_integer(total_steps) and total_steps >= 1, "total_steps", total_steps, "an integer of at least 1")


def _require_trainable(model: nn.Module, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in held]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"The optimizer does not hold the prunable weight {missing[0]!r}{more}: give it to the optimizer, "
            "or leave the weight dense with exclude=[...]."
        )
    for name, parameter in parameters.items():
        if hasattr(parameter, "device_mesh"):  # a DTensor
            raise ValueError(
                f"The weight {name!r} is sharded over processes (FSDP, tensor parallelism), so that no process could "
                "see all magnitudes: use DistributedDataParallel."
            )
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"The weight {name!r} is not initialised yet: run the lazy model once before.")
    devices = {str(parameter.device) for parameter in parameters.values()}
    if len(devices) > 1:
        raise ValueError(f"The prunable weights lie on {', '.join(sorted(devices))}: they must share one device.")
    if any(sparsifier.holds(parameters.values()) for sparsifier in Sparsifier.of(model)):
        raise ValueError("Another sparsifier holds weights of this model: call its finalize() or remove() first.")
