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
    if math.isinf(p):
        thresholded = w
    elif p == 1:
        thresholded = (magnitude - threshold).copysign_(w)
    else:
        gap = (magnitude - threshold).div_(magnitude)
        thresholded = _one_minus_power(gap, p).pow_(1 / p).mul_(w)
    if weight.dtype != w.dtype:  # a kept weight must not round to zero
        smallest = torch.finfo(weight.dtype).smallest_normal * torch.finfo(weight.dtype).eps
        thresholded = thresholded.abs().clamp_(min=smallest).copysign_(w)
    thresholded = torch.where(magnitude <= threshold, 0, thresholded)  # masked_fill would lose channels_last
    return torch.where(threshold > 0, thresholded.to(weight.dtype), weight)


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


def _one_minus_power(gap: Tensor, p: float) -> Tensor:
    """``1 - (1 - gap)^p`` for gap in [0, 1] without cancellation near 0."""
    if p == 3:
        return (3 - gap * (3 - gap)).mul_(gap)
    return torch.expm1(torch.log1p(-gap).mul_(p)).neg_()
