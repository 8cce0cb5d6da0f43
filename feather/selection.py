"""Which weights are prunable, and the exact quantile of their magnitudes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn

from feather.operator import compute_dtype

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


def zeros_at(sparsity: float, size: int) -> int:
    """How many of ``size`` distinct magnitudes the interpolated quantile prunes: ``floor((size - 1) S) + 1``."""
    return 0 if sparsity == 0 else math.floor((size - 1) * sparsity) + 1


def magnitude_quantile(weights: Sequence[Tensor], sparsity: float) -> Tensor:
    """The linearly interpolated quantile of ``|w|`` over all tensors: Feather-Global's threshold T.

    T interpolates the sorted magnitudes at position ``(n - 1) * sparsity``. It stays below the upper neighbour, so that
    rounding never prunes one weight more: among distinct magnitudes exactly ``zeros_at(sparsity, n)`` are <= T.

    Args:
        weights: tensors of any shape and floating type on one device, n elements together.
        sparsity: in [0, 1).

    Returns:
        0-dim tensor on the weights' device, fp64 where a weight is fp64 and fp32 elsewhere.
    """
    size = sum(w.numel() for w in weights)
    position = (size - 1) * sparsity
    rank = math.floor(position)
    ranks = (rank, min(rank + 1, size - 1))
    order_statistics = _order_statistics if weights[0].device.type == "cpu" else _order_statistics_by_sort
    lower, upper = order_statistics(weights, ranks)
    threshold = torch.lerp(lower, upper, position - rank)
    below_upper = torch.nextafter(upper, torch.zeros_like(upper))
    return torch.where(lower < upper, torch.minimum(threshold, below_upper), threshold)


_CHUNK = 1 << 19  # elements; two fp32 chunks stay in a core's cache
_BUCKET_BITS = 17


def _order_statistics(weights: Sequence[Tensor], ranks: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The magnitudes at the sorted positions ``ranks`` (successive), without sorting everything.

    Non-negative floats sort as their bit patterns do: a histogram over the leading bits finds the bucket of each rank,
    and only the few magnitudes inside are sorted.
    """
    dtype = _common_dtype(weights)
    integer, shift = (torch.int64, 63 - _BUCKET_BITS) if dtype == torch.float64 else (torch.int32, 31 - _BUCKET_BITS)
    counts = torch.zeros(1 << _BUCKET_BITS, dtype=torch.int64)
    for magnitudes in _magnitude_chunks(weights, dtype):
        counts += torch.bincount(magnitudes.view(integer) >> shift, minlength=1 << _BUCKET_BITS)
    cumulative = counts.cumsum(0)
    first, last = (int(b) for b in torch.searchsorted(cumulative, torch.tensor(ranks), right=True))
    below = int(cumulative[first - 1]) if first else 0
    inside = []
    for magnitudes in _magnitude_chunks(weights, dtype):
        bucket = magnitudes.view(integer) >> shift
        keep = bucket == first if first == last else (bucket == first) | (bucket == last)
        inside.append(magnitudes[keep])
    ordered = torch.cat(inside).sort().values
    return ordered[ranks[0] - below], ordered[ranks[1] - below]


def _order_statistics_by_sort(weights: Sequence[Tensor], ranks: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The same by one sort: of fixed shape and without a host sync, as CUDA streams and graphs need it."""
    dtype = _common_dtype(weights)
    ordered = torch.cat([w.detach().reshape(-1).to(dtype) for w in weights]).abs_().sort().values
    return ordered[ranks[0]], ordered[ranks[1]]


def _common_dtype(weights: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(compute_dtype(w.dtype) == torch.float64 for w in weights) else torch.float32


def _magnitude_chunks(weights: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """All magnitudes once, as 1-D tensors of about ``_CHUNK`` elements: large weights cut, small ones joined."""
    waiting: list[Tensor] = []
    for weight in weights:
        for piece in torch.split(_flat(weight.detach()), _CHUNK):
            waiting.append(piece)
            if sum(w.numel() for w in waiting) >= _CHUNK:
                yield _magnitudes(waiting, dtype)
                waiting = []
    if waiting:
        yield _magnitudes(waiting, dtype)


def _magnitudes(pieces: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([piece.to(dtype) for piece in pieces]).abs_()


def _flat(weight: Tensor) -> Tensor:
    """All elements in memory order: a view where the memory is dense (contiguous, channels_last), else a copy."""
    order = sorted(range(weight.ndim), key=weight.stride, reverse=True)
    return weight.permute(order).reshape(-1)
