"""Feather's thresholding operator and gradient rule: the paper on one screen.

Feather: An Elegant Solution to Effective DNN Sparsification, https://arxiv.org/abs/2310.02448

    forward     P_T(w) = sign(w) (|w|^p - T^p)^(1/p)   where |w| > T, else 0
    backward    dL/dw  = m * dL/dP_T(w),   m = 1 where |w| > T, else theta;   dL/dT = 0

p = 1 is soft thresholding, p -> inf hard thresholding; the paper adopts p = 3.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

# elements, on a CPU
_SLICE = 1 << 18  # worked on at a time
_MANY = 1 << 15  # of fewer, the root of all of them costs less than to look for the kept ones


def p_threshold(weight: Tensor, threshold: Tensor, p: float = 3.0) -> Tensor:
    """Threshold ``weight`` with the operator of order ``p``.

    With ``gap = (|w| - T) / |w|`` the operator reads ``w (1 - (1 - gap)^p)^(1/p)``: in this form it keeps the precision
    of the floating type right above T, where ``|w|^p - T^p`` cancels, and neither over- nor underflows.

    Args:
        weight: dense weights, any shape and floating type.
        threshold: T >= 0, a 0-dim tensor of at least fp32. T = 0 returns ``weight`` bit for bit.
        p: order of the operator, in [1, inf].

    Returns:
        A new tensor of ``weight``'s shape and type; zero exactly where ``|w| <= T``. A NaN stays a NaN.
    """
    if weight.device.type != "cpu":  # what would have to wait for the device before Python knows how to go on
        return torch.where(threshold > 0, _of_all(weight, threshold, p), weight)
    if threshold == 0:
        return weight.clone()
    sparse = torch.empty_like(weight)
    if weight.numel() < _MANY or weight.stride() != sparse.stride():  # the latter: memory with gaps
        return _of_all(weight, threshold, p)
    for piece, out in zip(_slices(weight), _slices(sparse), strict=True):
        if p == 1 or math.isinf(p) or (kept := _few_kept(piece, threshold)) is None:
            out.copy_(_of_all(piece, threshold, p))
        else:
            out.zero_()[kept] = _of_all(piece[kept], threshold, p)
    return sparse


def scale_pruned_gradient(grad: Tensor, sparse_weight: Tensor, theta: float) -> Tensor:
    """Scale the gradient of the pruned weights by ``theta`` (straight-through elsewhere).

    Args:
        grad: dL/dP_T(w), any shape.
        sparse_weight: P_T(w), same shape; its zeros are the pruned weights.
        theta: in [0, 1]; 1 is the plain straight-through estimator, 0 stops the gradient of pruned weights.

    Returns:
        dL/dw, same shape as ``grad``.
    """
    if theta == 1:
        return grad
    if grad.device.type != "cpu" or grad.dtype != compute_dtype(grad.dtype):
        return torch.where(sparse_weight == 0, grad * theta, grad)
    # the same to the bit: on a CPU arithmetic takes an eighth of the time of a choice by a mask
    kept = torch.ne(sparse_weight.detach(), 0, out=torch.empty_like(grad))
    return kept.clamp_(min=theta).mul_(grad)


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


def _of_all(weight: Tensor, threshold: Tensor, p: float) -> Tensor:
    """``p_threshold`` of every element alike, for T > 0."""
    # |w|^3 would underflow in fp16 below 3e-3; an fp64 threshold rounded to fp32 could reach the weight above it
    w = weight.to(torch.promote_types(compute_dtype(weight.dtype), threshold.dtype))
    sparse = _of_order(p, w, threshold)
    if weight.dtype == w.dtype:
        return sparse
    # masked_fill would lose channels_last
    return torch.where(w.abs() <= threshold, 0, _narrow(sparse, w, weight.dtype)).to(weight.dtype)


def _of_order(p: float, w: Tensor, threshold: Tensor) -> Tensor:
    """``P_T(w)`` for T > 0, in ``w``'s type; its zeros have no sign.

    Arithmetic all the way: on a CPU a choice by a mask costs as much as the root.
    """
    magnitude = w.abs()
    if math.isinf(p):
        return (w * (magnitude <= threshold).logical_not_()).add_(0)  # -0 + 0 = 0
    excess = magnitude - threshold
    if p == 1:
        return excess.clamp_(min=0).copysign_(w).add_(0)
    gap = excess.div_(magnitude).clamp_(min=0)
    if p == 3:
        power = (3 - gap * (3 - gap)).mul_(gap)
    else:
        power = torch.expm1(torch.log1p(-gap).mul_(p)).neg_()
    if p == 3 and w.device.type == "cpu":  # takes half as long as pow_, but many times as long where it meets a zero
        power.clamp_(min=torch.finfo(w.dtype).tiny).log2_().div_(3).exp2_().mul_(gap.sign_())
    else:
        power.pow_(1 / p)
    return power.mul_(w).add_(0)


def _narrow(thresholded: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    """In ``dtype``'s range where that is narrower: a kept weight must not round to zero."""
    if dtype == w.dtype:
        return thresholded
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return thresholded.abs().clamp_(min=smallest).copysign_(w)


def _slices(tensor: Tensor) -> tuple[Tensor, ...]:
    """The memory of a tensor without gaps, whatever its layout, as 1-D views that stay in a core's cache."""
    return torch.split(tensor.as_strided((tensor.numel(),), (1,)), _SLICE)


def _few_kept(w: Tensor, threshold: Tensor) -> Tensor | None:
    """Positions of the kept among 1-D weights where a root of these alone is faster, else None."""
    if w.numel() < _MANY:
        return None
    sample = w[::61]  # odd: channels come in even numbers, and all of them are to be met
    if int((sample.abs() > threshold).count_nonzero()) > 0.07 * sample.numel():
        return None
    kept = (w.abs() <= threshold).logical_not_()  # a NaN is kept
    return torch.from_numpy(kept.numpy().nonzero()[0]) if numpy_reads_tensors() else kept.nonzero().view(-1)


@functools.cache
def numpy_reads_tensors() -> bool:
    """Whether NumPy is there and this torch can share memory with it."""
    try:
        torch.empty(0).numpy()
    except RuntimeError:
        return False
    return True
