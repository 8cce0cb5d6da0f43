"""Feather's thresholding operator and gradient rule: the paper on one screen.

Feather: An Elegant Solution to Effective DNN Sparsification, https://arxiv.org/abs/2310.02448

    forward     P_T(w) = sign(w) (|w|^p - T^p)^(1/p)   where |w| > T, else 0
    backward    dL/dw  = m * dL/dP_T(w),   m = 1 where |w| > T, else theta;   dL/dT = 0

p = 1 is soft thresholding, p -> inf hard thresholding; the paper adopts p = 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
    # |w|^3 would underflow in fp16 below 3e-3; an fp64 threshold rounded to fp32 could reach the weight above it
    w = weight.to(torch.promote_types(compute_dtype(weight.dtype), threshold.dtype))
    magnitude = w.abs()
    pruned = magnitude <= threshold
    if math.isinf(p):
        thresholded = w
    elif p == 1:
        thresholded = (magnitude - threshold).copysign_(w)
    elif (kept := _few_kept(w, pruned, threshold)) is not None:
        sparse = torch.zeros_like(w)
        few, magnitude = (_in_memory_order(t)[kept] for t in (w, magnitude))
        _in_memory_order(sparse)[kept] = _narrow(_of_order(p, few, magnitude, threshold), few, weight.dtype)
        return sparse.to(weight.dtype)
    else:
        thresholded = _of_order(p, w, magnitude, threshold)
    # masked_fill would lose channels_last
    sparse = torch.where(pruned, 0, _narrow(thresholded, w, weight.dtype))
    return torch.where(threshold > 0, sparse.to(weight.dtype), weight)


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
    return torch.where(sparse_weight == 0, grad * theta, grad)


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


def _of_order(p: float, w: Tensor, magnitude: Tensor, threshold: Tensor) -> Tensor:
    """``w (1 - (1 - gap)^p)^(1/p)`` where ``magnitude = |w| > T``; anything elsewhere."""
    gap = (magnitude - threshold).div_(magnitude)
    if p == 3:
        power = (3 - gap * (3 - gap)).mul_(gap)
    else:
        power = torch.expm1(torch.log1p(-gap).mul_(p)).neg_()
    return power.pow_(1 / p).mul_(w)


def _narrow(thresholded: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    """In ``dtype``'s range where that is narrower: a kept weight must not round to zero."""
    if dtype == w.dtype:
        return thresholded
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return thresholded.abs().clamp_(min=smallest).copysign_(w)


def _few_kept(w: Tensor, pruned: Tensor, threshold: Tensor) -> Tensor | None:
    """Positions in memory of the kept weights where they are so few that a root of them alone is faster, else None."""
    if w.device.type != "cpu":  # a GPU would have to wait for their number
        return None
    gapless = w.stride() == torch.empty_like(w).stride()
    if not gapless or threshold == 0 or int(pruned.count_nonzero()) < 0.8 * pruned.numel():
        return None
    return (~_in_memory_order(pruned)).nonzero().view(-1)


def _in_memory_order(tensor: Tensor) -> Tensor:
    """All elements of a tensor without gaps, whatever its layout, as a 1-D view."""
    return tensor.as_strided((tensor.numel(),), (1,))
