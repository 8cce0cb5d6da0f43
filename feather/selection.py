"""Which weights are prunable, and the exact quantile of their magnitudes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from feather.operator import compute_dtype

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WEIGHT_NAMES: dict[type[nn.Module], tuple[str, ...]] = {
    **{convolution: ("weight",) for convolution in _CONVOLUTIONS},
    nn.Linear: ("weight",),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def prunable_parameters(
    model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """The weights that a method prunes, by name, one entry per Parameter object.

    By default these are the weights of Conv1d-3d, ConvTranspose1d-3d and Linear and the packed projections of
    MultiheadAttention, never biases or normalisation layers. A weight shared with an Embedding counts as the Embedding's.

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
    defaults, others = _candidates(model)
    matched: set[str] = set()

    def matches(name: str, patterns: Sequence[str]) -> bool:
        hits = [p for p in patterns if fnmatchcase(name, p) or fnmatchcase(name.rpartition(".")[0], p)]
        matched.update(hits)
        return bool(hits)

    selected = {}
    for name, parameter in model.named_parameters():
        if name in defaults:
            chosen = include is None or matches(name, include)
        else:
            exact = [p for p in include or () if not _is_wildcard(p)]
            chosen = name in others and matches(name, exact)
        if matches(name, exclude):
            chosen = False
        if chosen:
            selected[name] = parameter

    for argument, patterns in (("include", include or ()), ("exclude", exclude)):
        for pattern in patterns:
            if pattern not in matched:
                known = ", ".join(list(defaults)[:4])
                raise ValueError(f"{argument}: the pattern {pattern!r} matches no weight; names look like {known}.")
    if not selected:
        raise ValueError(
            "Nothing is prunable: the model has no Conv, Linear or MultiheadAttention weight that include and exclude leave."
        )
    for name in selected:
        if defaults.get(name, selected[name]) is None:
            raise ValueError(
                f"The weight of layer {name.rpartition('.')[0]!r} is computed by a parametrization or pruning hook: "
                "remove that first, or leave the layer out with exclude=[...]."
            )
    return selected


def _is_wildcard(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


def _candidates(model: nn.Module) -> tuple[dict[str, nn.Parameter | None], dict[str, nn.Parameter]]:
    """Default weights and other selectable weights by their first name in the model."""
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }
    defaults: dict[str, nn.Parameter | None] = {}
    for module_name, module in model.named_modules():
        for kind, attributes in _WEIGHT_NAMES.items():
            if not isinstance(module, kind):
                continue
            for attribute in attributes:
                parameter = module._parameters.get(attribute)
                if parameter is not None and id(parameter) not in embeddings:
                    defaults[first_name[id(parameter)]] = parameter
                elif parameter is None and attribute == "weight":
                    prefix = f"{module_name}." if module_name else ""
                    for name in first_name.values():  # parametrizations.weight.original0, weight_g, weight_orig, ...
                        if name.startswith(prefix) and "weight" in name[len(prefix) :]:
                            defaults[name] = None
    others = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name not in defaults and parameter.ndim >= 2 and parameter.is_floating_point()
    }
    return defaults, others


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
    lower, upper = _order_statistics_by_sort(weights, ranks) if weights[0].is_cuda else _order_statistics(weights, ranks)
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
        for piece in _flat(weight.detach()).split(_CHUNK):
            waiting.append(piece)
            if sum(w.numel() for w in waiting) >= _CHUNK:
                yield _magnitudes(waiting, dtype)
                waiting = []
    if waiting:
        yield _magnitudes(waiting, dtype)


def _magnitudes(pieces: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([piece.to(dtype) for piece in pieces]).abs_()


def _flat(weight: Tensor) -> Tensor:
    """A 1-D view in memory order where there is one (contiguous, channels_last); else a copy."""
    if weight.is_contiguous() or not torch._prims_common.is_non_overlapping_and_dense(weight):
        return weight.reshape(-1)
    return weight.as_strided((weight.numel(),), (1,))
