"""Sparse training written straightforwardly, for comparison: dense Parameters, an autograd.Function, torch.quantile."""

import math

import torch
from torch import nn


class Threshold(torch.autograd.Function):
    """PAPER.md section 1, literally."""

    @staticmethod
    def forward(ctx, w, t, p, theta):
        kept = w.abs() > t
        ctx.save_for_backward(kept)
        ctx.theta = theta
        inside = w if math.isinf(p) else w.sign() * (w.abs() ** p - t**p).clamp(min=0) ** (1 / p)
        return torch.where(kept, inside, 0.0)

    @staticmethod
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        return torch.where(kept, grad, ctx.theta * grad), None, None, None


def sparse_weights(model, names, sparsity, p, theta):
    weights = dict(model.named_parameters())
    if sparsity == 0:
        return weights
    t = torch.quantile(torch.cat([weights[n].detach().abs().reshape(-1) for n in names]), sparsity)
    return {n: Threshold.apply(w, t, p, theta) if n in names else w for n, w in weights.items()}


def train(model, optimizer, batches, schedule, names, p, theta, clip=None):
    """Losses, and the final sparse weights; ``model`` ends with its dense weights."""
    losses = []
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        output = torch.func.functional_call(model, sparse_weights(model, names, schedule(step), p, theta), (x,))
        loss = nn.functional.mse_loss(output, y)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    final = sparse_weights(model, names, schedule(len(batches)), p, theta)
    return losses, {n: w.detach() for n, w in final.items()}


def make_model(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=0.4)  # one threshold leaves some weights in every layer
    return model


def make_batches(count, size=8, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 6, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(size, 3, generator=generator, dtype=torch.float64).to(dtype),
        )
        for _ in range(count)
    ]


def loop(model, optimizer, batches, clip=None):
    """The user's loop, which knows nothing of sparsity."""
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses
