"""Feather's thresholding operator and gradient rule: the paper on one screen.

Feather: An Elegant Solution to Effective DNN Sparsification, https://arxiv.org/abs/2310.02448

    forward     P_T(w) = sign(w) (|w|^p - T^p)^(1/p)   where |w| > T, else 0
    backward    dL/dw  = m * dL/dP_T(w),   m = 1 where |w| > T, else theta;   dL/dT = 0

p = 1 is soft thresholding, p -> inf hard thresholding; the paper adopts p = 3.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from feather.flat import Run, joined, runs, unflatten

_SLICE = 1 << 18  # elements worked on at a time on a CPU, so that what is between stays in the cache
_LAUNCH = 1 << 24  # and on a GPU, so that what is between does not take much memory
_FEW = 0.35  # of them, below which it pays to look for the kept ones


def p_threshold(weight: Tensor, threshold: Tensor, p: float = 3.0) -> Tensor:
    """Threshold ``weight`` with the operator of order ``p``.

    With ``gap = (|w| - T) / |w|`` the operator reads ``w (1 - (1 - gap)^p)^(1/p)``: in this form it keeps the precision
    of the floating type right above T, where ``|w|^p - T^p`` cancels, and neither over- nor underflows.

    Args:
        weight: dense weights, any shape and floating type.
        threshold: T >= 0, a 0-dim tensor of at least fp32. T = 0 returns ``weight`` bit for bit.
        p: order of the operator, in [1, inf].

    Returns:
        A new tensor of ``weight``'s shape and type; zero exactly where ``|w| <= T``. A NaN stays a NaN. No gradient
        flows through it: the gradient rule is ``scale_pruned_gradient``.
    """
    return p_threshold_all([weight], [threshold], p)[0]


@torch.no_grad()
def p_threshold_all(weights: Sequence[Tensor], thresholds: Sequence[Tensor], p: float = 3.0) -> list[Tensor]:
    """``p_threshold`` of each weight under its threshold: much faster where there are many small ones.

    Args:
        weights: tensors of any shape, of one floating type and device.
        thresholds: one for each weight, of one floating type.
        p: order of the operator.

    Returns:
        For each weight a new tensor of its shape and type; they may share storage.
    """
    if weights[0].device.type != "cpu":
        return p_threshold_unread(weights, thresholds, p)
    sparse = weights[0].new_empty(sum(weight.numel() for weight in weights))
    parts = unflatten(sparse, weights)
    dense = joined(weights)
    if dense is None:
        torch._foreach_copy_(parts, list(weights))
        dense = sparse
    start = 0
    for run in runs(weights, thresholds, _SLICE):
        end = start + sum(size for _, size in run)
        _threshold_run(p, run, dense[start:end], sparse[start:end])
        start = end
    return parts


@torch.no_grad()
def p_threshold_unread(weights: Sequence[Tensor], thresholds: Sequence[Tensor], p: float = 3.0) -> list[Tensor]:
    """``p_threshold_all`` by the same operations whatever the numbers are: the host reads none and waits for none."""
    found: list[Tensor] = []
    for _, alike in itertools.groupby(zip(thresholds, weights, strict=True), key=lambda pair: id(pair[0])):
        pairs = list(alike)
        threshold, some = pairs[0][0], [weight for _, weight in pairs]
        dense = joined(some)
        if dense is None:
            found += [torch.where(threshold > 0, _of_order(p, weight, threshold), weight) for weight in some]
            continue
        sparse = torch.empty_like(dense)
        for part, out in zip(torch.split(dense, _LAUNCH), torch.split(sparse, _LAUNCH), strict=True):
            torch.where(threshold > 0, _of_order(p, part, threshold), part, out=out)
        found += unflatten(sparse, some)
    return found


def scale_pruned_gradient(grad: Tensor, sparse_weight: Tensor, theta: float) -> Tensor:
    """Scale the gradient of the pruned weights by ``theta`` (straight-through elsewhere).

    Args:
        grad: dL/dP_T(w), any shape.
        sparse_weight: P_T(w), same shape; its zeros, and what is no number, are the pruned weights.
        theta: in [0, 1]; 1 is the plain straight-through estimator, 0 stops the gradient of pruned weights.

    Returns:
        dL/dw, same shape as ``grad``.
    """
    if theta == 1:
        return grad
    # the derivative of a ReLU whose slope is theta, at |w|: one pass, where a choice by a mask takes three
    weight = sparse_weight.detach()
    if grad.requires_grad:  # backward(create_graph=True)
        return torch.ops.aten.leaky_relu_backward(grad, weight.abs(), theta, False)  # type: ignore[no-any-return]
    # in place, as less memory is to be passed through, and in the very strides that DDP and .grad want
    scaled = torch.abs(weight, out=torch.empty_like(weight))
    torch.ops.aten.leaky_relu_backward.grad_input(grad, scaled, theta, False, grad_input=scaled)
    return scaled


def auto_theta(sparsity: float) -> float:
    """The paper's rule for theta, set once from the final target: 0.5 above 95 % sparsity, else 1."""
    return 0.5 if sparsity > 0.95 else 1.0


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The floating type that magnitudes and thresholds are computed in: fp64 for fp64 weights, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast_sparse(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` in the floating type ``dtype``, in which its zeros, and no other weights, are zero."""
    if weight.dtype == dtype:
        return weight
    return torch.where(weight == 0, weight, _narrow(weight, weight, dtype)).to(dtype)


def _of_order(p: float, weight: Tensor, threshold: Tensor) -> Tensor:
    """``p_threshold`` for T > 0, of every element alike."""
    # |w|^3 would underflow in fp16 below 3e-3; an fp64 threshold rounded to fp32 could reach the weight above it
    w = weight.to(torch.promote_types(compute_dtype(weight.dtype), threshold.dtype))
    magnitude = w.abs()
    excess = magnitude - threshold
    if math.isinf(p):
        sparse = w
    elif p == 1:
        sparse = excess.copysign(w)
    else:
        gap = excess.div(magnitude).clamp_(min=torch.finfo(w.dtype).tiny)  # a logarithm of zero takes six times as long
        if p == 3:
            power = (gap - 3).mul_(gap).add_(3).mul_(gap)
        else:
            power = torch.expm1(torch.log1p(-gap).mul_(p)).neg_()
        if p == 3 and w.device.type == "cpu":  # takes half as long as pow_
            power.log2_().div_(3).exp2_()
        else:
            power.pow_(1 / p)
        sparse = power.mul_(w)
    # the derivative of a ReLU is a choice in one pass, where one by a mask takes two
    chosen: Tensor = torch.ops.aten.threshold_backward(_narrow(sparse, w, weight.dtype), excess, 0)
    return chosen.to(weight.dtype)


def _narrow(thresholded: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    """In ``dtype``'s range where that is narrower: a kept weight must not round to zero."""
    if dtype == w.dtype:
        return thresholded
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return thresholded.abs().clamp_(min=smallest).copysign_(w)


def _threshold_run(p: float, run: Run, dense: Tensor, out: Tensor) -> None:
    """``out`` becomes ``P_T(dense)``, both 1-D and perhaps the same."""
    threshold = run[0][0]
    if len(run) > 1:  # an element's own
        sizes = torch.tensor([size for _, size in run])
        threshold = torch.stack([t for t, _ in run]).repeat_interleave(sizes, output_size=dense.numel())
    if len(run) == 1 and threshold == 0:
        out.copy_(dense)
    elif p == 1 or math.isinf(p) or (kept := _few_kept(dense, threshold)) is None:
        out.copy_(_of_order(p, dense, threshold))
    else:
        some = _of_order(p, dense.take(kept), threshold.take(kept) if threshold.ndim else threshold)
        out.zero_().scatter_(0, kept, some)


def _few_kept(w: Tensor, threshold: Tensor) -> Tensor | None:
    """Positions of the kept among 1-D weights where a root of these alone is faster, else None."""
    if w.dtype != threshold.dtype or not numpy_reads_tensors():
        return None
    import numpy

    # NumPy compares in a tenth and finds in a third of torch's time; a NaN is kept
    kept = ~(w.abs().numpy() <= threshold.numpy())
    return torch.from_numpy(kept.nonzero()[0]) if numpy.count_nonzero(kept) < _FEW * w.numel() else None


@functools.cache
def numpy_reads_tensors() -> bool:
    """Whether NumPy is there and this torch can share memory with it."""
    try:
        torch.empty(0).numpy()
    except RuntimeError:
        return False
    return True
