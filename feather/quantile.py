"""The exact quantile of magnitudes without sorting them all: where thresholds come from, at every step.

Non-negative floats sort as their bit patterns do, so order statistics are found among integers. On the CPU the last
step's result, or a sample (Floyd and Rivest, https://doi.org/10.1145/360680.360691), places a narrow window around the
wanted rank; one pass counts what lies below the window and gathers what lies inside. The count proves the answer; where
it refutes the window, a binary search over the bit patterns answers, which only counts. On other devices nothing may
wait for a count: a sort, or for large networks that binary search, both of fixed shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from feather.operator import compute_dtype

ALGORITHMS = ("auto", "sort", "counting")

_CHUNK = 1 << 19  # elements; what is worked on stays in the cache
_DEVIATIONS = 3.5  # of the sample's rank, on each side of the window: 1 in 2000 random samples misses it
_STRIDE = 17  # one in so many weights is in the large sample
_GUESS = 0.005  # relative: further off, the result is looked for anew
_BLOCK = 8  # elements looked at together when those inside the window are gathered
_SORT_BELOW = 1 << 22  # elements on a GPU: a sort of few needs fewer kernels, of many too much memory


def zeros_at(sparsity: float, size: int) -> int:
    """How many of ``size`` distinct magnitudes the interpolated quantile prunes: ``floor((size - 1) S) + 1``."""
    return 0 if sparsity == 0 else math.floor((size - 1) * sparsity) + 1


def magnitude_quantile(
    weights: Sequence[Tensor], sparsity: float, *, algorithm: str = "auto", guess: Tensor | None = None
) -> Tensor:
    """The linearly interpolated quantile of ``|w|`` over all tensors: Feather-Global's threshold T.

    T interpolates the sorted magnitudes at position ``(n - 1) * sparsity``. It stays below the upper neighbour, so that
    rounding never prunes one weight more: among distinct magnitudes exactly ``zeros_at(sparsity, n)`` are <= T.

    Args:
        weights: tensors of any shape and floating type on one device, n elements together.
        sparsity: in [0, 1).
        algorithm: one of ``ALGORITHMS``; all give the same bits. ``sort`` is the plain one, ``counting`` the one that
            needs least memory, ``auto`` the fastest.
        guess: about the result, such as that of the step before. It never changes the result; on the CPU one within
            0.5 % makes it faster.

    Returns:
        0-dim tensor on the weights' device, fp64 where a weight is fp64 and fp32 elsewhere.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r} is unknown: choose one of {', '.join(ALGORITHMS)}.")
    size = sum(w.numel() for w in weights)
    position = (size - 1) * sparsity
    rank = math.floor(position)
    ranks = (rank, min(rank + 1, size - 1))
    flat = [_flat(weight.detach()) for weight in weights]
    dtype = torch.float64 if any(compute_dtype(w.dtype) == torch.float64 for w in weights) else torch.float32
    found = None
    if algorithm == "auto" and flat[0].device.type == "cpu":
        if guess is not None and guess > 0:
            found = _in_window(flat, dtype, ranks, *_around(guess.to(dtype)))
        if found is None:
            found = _in_window(flat, dtype, ranks, *_sampled(flat, dtype, ranks[0] / size))
    elif algorithm == "sort" or (algorithm == "auto" and size < _SORT_BELOW):
        found = _by_sorting(flat, dtype, ranks)
    lower, upper = found if found is not None else _by_counting(flat, dtype, ranks)
    threshold = torch.lerp(lower, upper, position - rank)
    below_upper = torch.nextafter(upper, torch.zeros_like(upper))
    return torch.where(lower < upper, torch.minimum(threshold, below_upper), threshold)


def _by_sorting(flat: Sequence[Tensor], dtype: torch.dtype, ranks: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The magnitudes at the sorted positions ``ranks``, which are equal or successive: the definition."""
    ordered = torch.cat([w.to(dtype) for w in flat]).abs_().sort().values
    return ordered[ranks[0]], ordered[ranks[1]]


def _by_counting(flat: Sequence[Tensor], dtype: torch.dtype, ranks: tuple[int, int]) -> tuple[Tensor, Tensor]:
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


def _in_window(
    flat: Sequence[Tensor], dtype: torch.dtype, ranks: tuple[int, int], lowest: int, highest: int
) -> tuple[Tensor, Tensor] | None:
    """The same in one pass on the CPU, or None where the bit patterns ``lowest`` to ``highest`` do not hold both.

    Extra memory: a few chunks and at most an eighth of the weights.
    """
    size = sum(w.numel() for w in flat)
    buffer, scratch = (torch.empty(min(_CHUNK, size) + _BLOCK, dtype=_integer(dtype)) for _ in range(2))
    below, inside, gathered = 0, [], 0
    for count in _fill(flat, dtype, buffer.view(dtype)[:-_BLOCK]):
        smaller, found = _partition(buffer, count, lowest, highest, scratch)
        below += smaller
        inside.append(found)
        gathered += found.numel()
        if gathered > max(size // 8, _CHUNK):  # many equal magnitudes
            return None
    candidates = torch.cat(inside)
    first, second = (rank - below for rank in ranks)
    if first < 0 or second >= candidates.numel():
        return None
    lower = candidates.kthvalue(first + 1).values
    if int((candidates <= lower).count_nonzero()) > second:
        return lower.view(dtype), lower.view(dtype)
    upper = torch.where(candidates > lower, candidates, torch.iinfo(candidates.dtype).max).amin()
    return lower.view(dtype), upper.view(dtype)


def _partition(bits: Tensor, count: int, lowest: int, highest: int, scratch: Tensor) -> tuple[int, Tensor]:
    """How many of the first ``count`` bit patterns lie below the window, and those inside it.

    Overwrites ``bits``, which is at least ``_BLOCK`` longer, and ``scratch`` of its size.
    """
    used = -(-count // _BLOCK) * _BLOCK
    bits, scratch = bits[:used], scratch[:used]
    bits[count:] = torch.iinfo(bits.dtype).max
    # with a wrap-around: what lies below the window becomes positive, and of the rest the smallest lie inside
    smallest = torch.iinfo(bits.dtype).min
    bits.sub_(lowest + smallest)
    limit = highest - lowest + smallest
    below = used + int(torch.clamp(bits, -1, 0, out=scratch).sum(dtype=bits.dtype))
    rows = bits.view(_BLOCK, -1)
    near = (rows.amin(0) <= limit).nonzero().view(-1)
    blocks = torch.cat([row.index_select(0, near) for row in rows])
    return below, blocks[blocks <= limit].add_(lowest + smallest)


def _around(guess: Tensor) -> tuple[int, int]:
    """Bit patterns that enclose a good guess."""
    low, high = (guess * (1 + side * _GUESS) for side in (-1, 1))
    integer = _integer(guess.dtype)
    return int(low.view(integer)), int(high.view(integer))


def _sampled(flat: Sequence[Tensor], dtype: torch.dtype, fraction: float) -> tuple[int, int]:
    """Bit patterns that most likely enclose the magnitude at the relative rank ``fraction``.

    One in n^(1/3) weights places a window; one in ``_STRIDE``, of which only what lies inside is looked at, narrows it.
    """
    stride = round(sum(w.numel() for w in flat) ** (1 / 3)) | 1  # odd: channels come in even numbers; all are to be met
    small = _every(stride, flat, dtype)
    lowest, highest = _narrowed(0, torch.iinfo(small.dtype).max, small, 0, small.numel(), fraction)
    if stride < 2 * _STRIDE:
        return lowest, highest
    large = _every(_STRIDE, flat, dtype, spare=_BLOCK)
    count = large.numel() - _BLOCK
    below, inside = _partition(large, count, lowest, highest, torch.empty_like(large))
    return _narrowed(lowest, highest, inside, below, count, fraction)


def _every(stride: int, flat: Sequence[Tensor], dtype: torch.dtype, spare: int = 0) -> Tensor:
    """Bit patterns of one in ``stride`` magnitudes, and room for ``spare`` more."""
    pieces = [w[::stride].to(dtype) for w in flat]
    return torch.cat([*pieces, pieces[0].new_zeros(spare)]).abs_().view(_integer(dtype))


def _narrowed(lowest: int, highest: int, inside: Tensor, below: int, count: int, fraction: float) -> tuple[int, int]:
    """The window as far as ``count`` samples narrow it, of which ``below`` lie below it and ``inside`` in it."""
    spread = _DEVIATIONS * math.sqrt(count * fraction * (1 - fraction)) + 2
    first, last = math.floor(count * fraction - spread) - below, math.ceil(count * fraction + spread) - below
    return (
        int(inside.kthvalue(first).values) if 1 <= first <= inside.numel() else lowest,
        int(inside.kthvalue(last).values) if 1 <= last <= inside.numel() else highest,
    )


def _fill(flat: Sequence[Tensor], dtype: torch.dtype, buffer: Tensor) -> Iterator[int]:
    """Put all magnitudes into ``buffer``, as many at a time as it holds; yields how many."""
    waiting: list[Tensor] = []
    count = 0
    for piece in (piece for weight in flat for piece in torch.split(weight, _CHUNK)):
        if count + piece.numel() > buffer.numel():
            yield _put(waiting, buffer[:count])
            waiting, count = [], 0
        waiting.append(piece.to(dtype))
        count += piece.numel()
    if count:
        yield _put(waiting, buffer[:count])


def _put(pieces: Sequence[Tensor], out: Tensor) -> int:
    if len(pieces) == 1:
        torch.abs(pieces[0], out=out)
    else:
        torch.cat(list(pieces), out=out).abs_()
    return out.numel()


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32


def _flat(weight: Tensor) -> Tensor:
    """All elements in memory order: a view where the memory is dense (contiguous, channels_last), else a copy."""
    order = sorted(range(weight.ndim), key=weight.stride, reverse=True)
    return weight.permute(order).reshape(-1)
