"""Which weights are prunable."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import cast

from torch import nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WEIGHT_NAMES: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys(_CONVOLUTIONS, ("weight",)),
    nn.Linear: ("weight",),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def prunable_parameters(
    model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """The weights that a method prunes, by name, one entry per Parameter object.

    By default these are the weights of Conv1d-3d, ConvTranspose1d-3d and Linear and the packed projections of
    MultiheadAttention, never biases or normalisation layers. A weight shared with an Embedding is the Embedding's, and
    a shared weight answers to each of its names.

    Args:
        model: any module, wrapped or not.
        include: shell-style patterns (``layer1.*``) on the names of parameters or of their modules. None means every
            default weight. A pattern with a wildcard selects among the default weights; any other weight of two or more
            dimensions (an Embedding's, a bare Parameter) is selected by its full name.
        exclude: patterns of weights to leave dense; wins over ``include``.

    Raises:
        ValueError: a pattern matches nothing, nothing is prunable, or a layer's weight is not a plain Parameter.
    """
    model = unwrap(model)
    for argument, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise ValueError(f"{argument}={patterns!r} is a string: give a list of patterns, [{patterns!r}].")
    defaults, others, computed = _candidates(model)
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    matched: set[str] = set()

    def matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
        """Whether a pattern fits the name of a parameter or of its module."""
        hits = [p for p in patterns for n in names if fnmatchcase(n, p) or fnmatchcase(n.rpartition(".")[0], p)]
        matched.update(hits)
        return bool(hits)

    def chosen(names: Sequence[str], default: bool) -> bool:
        patterns = include if default else [p for p in include or () if not _is_wildcard(p)]
        included = patterns is None or matches(names, patterns)
        return not matches(names, exclude) and included

    selected = {}
    for name, parameter in model.named_parameters():
        names = aliases[id(parameter)]
        if name in defaults or name in others:
            if chosen(names, name in defaults):
                selected[name] = parameter
        else:
            matches(names, exclude)  # to leave a bias or a norm dense needs no pattern, but is no mistake
    refused = [name for name in computed if chosen([name], True)]
    for argument, given in (("include", include or ()), ("exclude", exclude)):
        for pattern in given:
            if pattern not in matched:
                known = ", ".join([*defaults, *others][:4])
                raise ValueError(f"{argument}: the pattern {pattern!r} matches no weight; names look like {known}.")
    if refused:
        raise ValueError(
            f"The weight of layer {refused[0].rpartition('.')[0]!r} is computed by a parametrization or pruning hook: "
            "remove that first, or leave the layer out with exclude=[...]."
        )
    if not selected:
        raise ValueError(
            "Nothing is prunable: include and exclude leave no Conv, Linear or MultiheadAttention weight of the model."
        )
    return selected


def _is_wildcard(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


def _candidates(model: nn.Module) -> tuple[list[str], list[str], list[str]]:
    """Default weights, other selectable weights, and default weights that are no Parameters but computed by hooks."""
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }
    defaults: dict[str, None] = {}
    computed: dict[str, None] = {}
    for module_name, module in model.named_modules():
        for kind, attributes in _WEIGHT_NAMES.items():
            for attribute in attributes if isinstance(module, kind) else ():
                parameter = module._parameters.get(attribute)
                if parameter is not None:
                    if id(parameter) not in embeddings:
                        defaults[first_name[id(parameter)]] = None
                elif attribute not in module._parameters:  # parametrize, weight_norm and prune take it out
                    computed[f"{module_name}.{attribute}" if module_name else attribute] = None
    others = [
        name
        for name, parameter in model.named_parameters()
        if name not in defaults and parameter.ndim >= 2 and parameter.is_floating_point()
    ]
    return list(defaults), others, list(computed)
