"""Layer-wise allocations meet the whole's sparsity, and the frameworks that use them prune to the weight."""

import math

import pytest
import torch
from torch import nn

import feather
from feather.distribution import erdos_renyi_kernel, uniform

SHAPES = [(16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (64, 64, 1, 1), (10, 64)]


def overall(shapes, shares):
    sizes = [math.prod(shape) for shape in shapes]
    return sum(size * share for size, share in zip(sizes, shares, strict=True)) / sum(sizes)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.98, 0.995])
@pytest.mark.parametrize("distribution", [uniform, erdos_renyi_kernel])
def test_shares_add_up_to_the_sparsity_of_the_whole(distribution, sparsity):
    shares = distribution(SHAPES, sparsity)
    assert overall(SHAPES, shares) == pytest.approx(sparsity, abs=1e-12)
    assert all(0 <= share < 1 for share in shares)


def test_erk_densities_are_proportional_to_sum_over_product():
    shares = erdos_renyi_kernel(SHAPES, 0.98)
    scale = {(1 - s) * math.prod(shape) / sum(shape) for s, shape in zip(shares, SHAPES, strict=True) if s > 0}
    assert max(scale) == pytest.approx(min(scale))


def test_erk_keeps_small_layers_dense_and_the_others_pay_for_them():
    shares = erdos_renyi_kernel(SHAPES, 0.5)
    assert shares[0] == 0.0
    assert shares[2] > 0.5


@pytest.mark.parametrize("framework", ["uniform", "erk"])
@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0])
def test_layerwise_frameworks_prune_each_layer_to_its_share(framework, theta):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = feather.create(
        "feather", model, optimizer, sparsity=0.9, total_steps=10, framework=framework, theta=theta
    )
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(torch.randn(32, 40)), torch.randint(0, 10, (32,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    report = sparsifier.finalize()
    shapes = [layer.shape for layer in report.layers]
    shares = (uniform if framework == "uniform" else erdos_renyi_kernel)(shapes, 0.9)
    for layer, share in zip(report.layers, shares, strict=True):
        assert layer.zeros == feather.zeros_at(share, layer.size)
