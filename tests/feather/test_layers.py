"""One training step after another on every prunable layer type: gradients, zeros and untouched neighbours."""

import copy

import pytest
import torch
from torch import nn

import feather

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2, dilation=2), (2, 4, 12)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect"), (2, 4, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3), (2, 2, 5, 5, 5)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 8)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "linear": (lambda: nn.Linear(12, 7), (5, 12)),
    "bias-free": (lambda: nn.Linear(12, 7, bias=False), (2, 3, 12)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_computes_with_its_sparse_weight_and_trains_its_dense_one(layer, dtype):
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    module = make().to(dtype)
    with torch.no_grad():
        module.weight.copy_((torch.randperm(module.weight.numel()) + 1).view_as(module.weight) / module.weight.numel())
    dense = module.weight.detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    sparsifier = feather.create(
        "feather", module, optimizer, sparsity=0.6, total_steps=1, theta=0.5, schedule="one_shot"
    )

    plain = copy.deepcopy(module)
    threshold = feather.magnitude_quantile([dense], 0.6)
    with torch.no_grad():
        plain.weight.copy_(feather.p_threshold(dense, threshold, 3))
    x = torch.randn(shape, dtype=dtype)
    output, expected = module(x), plain(x)
    assert torch.equal(output, expected)
    output.square().mean().backward()
    expected.square().mean().backward()
    mask = torch.where(plain.weight == 0, 0.5, 1.0).to(dtype)
    grad = plain.weight.grad * mask
    assert torch.equal(module.weight.grad, grad)
    if module.bias is not None:
        assert torch.equal(module.bias.grad, plain.bias.grad)
    optimizer.step()
    with sparsifier.dense():
        torch.testing.assert_close(module.weight.detach(), dense - 0.5 * grad)
    assert sparsifier.finalize().zeros >= feather.zeros_at(0.6, dense.numel())


@pytest.mark.parametrize("split", [False, True])
def test_multihead_attention_learns_with_pruned_projections(split):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, kdim=5 if split else None, vdim=6 if split else None, batch_first=True)
    optimizer = torch.optim.Adam(attention.parameters(), lr=1e-2)
    sparsifier = feather.create("feather", attention, optimizer, sparsity=0.8, total_steps=20)
    q, k, v = torch.randn(4, 3, 8), torch.randn(4, 6, 5 if split else 8), torch.randn(4, 6, 6 if split else 8)
    target = torch.randn(4, 3, 8)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(attention(q, k, v)[0], target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    report = sparsifier.finalize()
    assert len(report.layers) == (4 if split else 2)
    assert report.zeros == feather.zeros_at(0.8, report.prunable)
    assert losses[-1] < losses[0]
    # the fused inference path reads the Parameters directly: they must be the sparse ones
    attention.eval()
    with torch.no_grad():
        fast = attention(q, k, v)[0]
    torch.testing.assert_close(fast, attention(q, k, v)[0].detach())


def test_embedding_by_opt_in():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 6, padding_idx=0), nn.Flatten(), nn.Linear(18, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.create(
        "feather", model, optimizer, sparsity=0.7, total_steps=4, theta=0.5, include=["0.weight", "2.weight"]
    )
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randint(0, 20, (5, 3))).square().mean().backward()
        optimizer.step()
    report = sparsifier.finalize()
    assert [layer.name for layer in report.layers] == ["0.weight", "2.weight"]
    pruned = int((model[0].weight == 0).sum()) + int((model[2].weight == 0).sum())
    assert pruned == feather.zeros_at(0.7, 20 * 6 + 18 * 3)


def test_tied_weights_are_thresholded_once():
    torch.manual_seed(0)
    embed, head = nn.Embedding(12, 6), nn.Linear(6, 12, bias=False)
    head.weight = embed.weight
    model = nn.Sequential(embed, nn.Linear(6, 6), head)
    dense = embed.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.create(
        "feather", model, optimizer, sparsity=0.5, total_steps=2, schedule="one_shot", include=["0.weight"]
    )
    expected = feather.p_threshold(dense, feather.magnitude_quantile([dense], 0.5))
    assert torch.equal(embed.weight, expected)
    model(torch.randint(0, 12, (4, 3))).square().mean().backward()
    optimizer.step()
    sparsifier.finalize()
    assert head.weight is embed.weight
    assert int((head.weight == 0).sum()) == feather.zeros_at(0.5, 72)


def test_lazy_layers_are_refused_until_they_have_a_shape():
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"weight '0.weight' is not initialised yet: run the lazy model once"):
        feather.create("feather", model, optimizer, sparsity=0.5, total_steps=2)
    model(torch.ones(1, 3))
    feather.create("feather", model, optimizer, sparsity=0.5, total_steps=2)
