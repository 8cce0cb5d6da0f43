"""The exact quantile of magnitudes without sorting them all: where thresholds come from, at every step.

Non-negative floats sort as their bit patterns do, so order statistics are found among integers. On the CPU NumPy's
partition finds them, vectorised where the processor has AVX2 or AVX-512. On other devices, where the host may not wait
for a value, and where NumPy is not installed, torch alone does: a sort, or for large networks a binary search over the
bit patterns, which only counts; both are of fixed shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from feather.flat import flatten, joined
from feather.operator import compute_dtype, numpy_reads_tensors

ALGORITHMS = ("auto", "sort", "counting")

_Ranks = tuple[int, int] | tuple[Tensor, Tensor]

_CHUNK = 1 << 19  # elements on a CPU; what is worked on stays in the cache
_SORT_BELOW = 1 << 22  # elements on a GPU: a sort of few needs fewer kernels, of many too much memory


def zeros_at(sparsity: float, size: int) -> int:
    """How many of ``size`` distinct magnitudes the interpolated quantile prunes: ``floor((size - 1) S) + 1``."""
    return 0 if sparsity == 0 else math.floor((size - 1) * sparsity) + 1


def magnitude_quantile(weights: Sequence[Tensor], sparsity: float | Tensor, *, algorithm: str = "auto") -> Tensor:
    """The linearly interpolated quantile of ``|w|`` over all tensors: Feather-Global's threshold T.

    T interpolates the sorted magnitudes at position ``(n - 1) * sparsity``. It stays below the upper neighbour, so that
    rounding never prunes one weight more: among distinct magnitudes exactly ``zeros_at(sparsity, n)`` are <= T.

    Args:
        weights: tensors of any shape and floating type on one device, n elements together.
        sparsity: in [0, 1), a number or a 0-dim fp64 tensor on the weights' device, which the host does not read.
        algorithm: one of ``ALGORITHMS``; all give the same bits. ``sort`` is the plain one, ``counting`` needs no host,
            ``auto`` is the fastest.

    Returns:
        0-dim tensor on the weights' device, fp64 where a weight is fp64 and fp32 elsewhere.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r} is unknown: choose one of {', '.join(ALGORITHMS)}.")
    size = sum(w.numel() for w in weights)
    position = (size - 1) * sparsity
    ranks, fraction = _ranks(position, size)
    weights = [weight.detach() for weight in weights]
    dtype = torch.float64 if any(compute_dtype(w.dtype) == torch.float64 for w in weights) else torch.float32
    if (
        algorithm == "auto"
        and weights[0].device.type == "cpu"
        and not isinstance(sparsity, Tensor)
        and numpy_reads_tensors()
    ):
        whole = joined(weights)
        flat = [whole] if whole is not None else [flatten(weight) for weight in weights]
        lower, upper = _by_partition(flat, dtype, ranks)
    elif algorithm == "sort" or (algorithm == "auto" and size < _SORT_BELOW):
        lower, upper = _by_sorting([flatten(weight) for weight in weights], dtype, ranks)
    else:
        lower, upper = _by_counting([flatten(weight) for weight in weights], dtype, ranks)
    threshold = torch.lerp(lower, upper, fraction if isinstance(fraction, float) else fraction.to(dtype))
    below_upper = torch.nextafter(upper, torch.zeros_like(upper))
    return torch.where(lower < upper, torch.minimum(threshold, below_upper), threshold)


def _ranks(position: float | Tensor, size: int) -> tuple[_Ranks, float | Tensor]:
    """The sorted positions beside ``position``, equal or successive, and how far it lies from the lower one."""
    if isinstance(position, Tensor):
        below = position.floor()
        lower = below.long()
        return (lower, (lower + 1).clamp_max(size - 1)), position - below
    rank = math.floor(position)
    return (rank, min(rank + 1, size - 1)), position - rank


def _by_sorting(flat: Sequence[Tensor], dtype: torch.dtype, ranks: _Ranks) -> tuple[Tensor, Tensor]:
    """The magnitudes at the sorted positions ``ranks``: the definition."""
    ordered = torch.cat([w.to(dtype) for w in flat]).abs_().sort().values
    lower, upper = (ordered.take(rank) if isinstance(rank, Tensor) else ordered[rank] for rank in ranks)
    return lower, upper


def _by_partition(flat: Sequence[Tensor], dtype: torch.dtype, ranks: _Ranks) -> tuple[Tensor, Tensor]:
    """The same on the CPU. Extra memory: one copy of the weights."""
    magnitudes = torch.empty(sum(w.numel() for w in flat), dtype=dtype)
    start = 0
    for weight in flat:
        torch.abs(weight.to(dtype), out=magnitudes[start : start + weight.numel()])
        start += weight.numel()
    bits = magnitudes.view(_integer(dtype))
    bits.numpy().partition(ranks[0])  # in place: what is not smaller lies behind
    return magnitudes[ranks[0]], bits[ranks[1] :].amin().view(dtype)


def _by_counting(flat: Sequence[Tensor], dtype: torch.dtype, ranks: _Ranks) -> tuple[Tensor, Tensor]:
    """The same bit by bit, from the highest: the largest pattern that has at most ``ranks[0]`` smaller ones.

    Of fixed shape and without a host sync, as CUDA graphs need it. Extra memory: one copy of the weights and a chunk.
    """
    integer = _integer(dtype)
    chunk = _CHUNK if flat[0].device.type == "cpu" else _SORT_BELOW
    chunks = torch.split(torch.cat([w.to(dtype) for w in flat]).abs_().view(integer), chunk)

    def total(counts: list[Tensor]) -> Tensor:
        return counts[0] if len(counts) == 1 else torch.stack(counts).sum()

    found = torch.zeros((), dtype=integer, device=flat[0].device)
    for bit in reversed(range(torch.iinfo(integer).bits - 1)):
        candidate = found | (1 << bit)
        smaller = total([(c < candidate).sum() for c in chunks])
        found = torch.where(smaller <= ranks[0], candidate, found)
    not_larger = total([(c <= found).sum() for c in chunks])
    largest = torch.iinfo(integer).max
    following = torch.stack([torch.where(c > found, c, largest).amin() for c in chunks]).amin()
    return found.view(dtype), torch.where(not_larger > ranks[1], found, following).view(dtype)


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32
