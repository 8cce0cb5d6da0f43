"""Going on from a sparse model, with its mask fixed or free."""

import math

import pytest
import torch
from torch import nn

import feather
from tests.feather.reference import loop, make_batches, make_model

SIZE = 6 * 16 + 16 * 8 + 8 * 3


def sparse_model(sparsity=0.7, dtype=torch.float64):
    model = make_model(dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.create("feather", model, optimizer, sparsity=sparsity, total_steps=4)
    loop(model, optimizer, make_batches(4, dtype=dtype))
    sparsifier.finalize()
    return model


def masks(model):
    return [w != 0 for w in feather.prunable_parameters(model).values()]


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05), lambda p: torch.optim.AdamW(p, lr=0.01),
])  # fmt: skip
def test_a_fixed_mask_never_changes_while_the_kept_weights_train(make):
    model = sparse_model()
    before, mask = weights(model), masks(model)
    optimizer = make(model.parameters())
    sparsifier = feather.fine_tune(model, optimizer, total_steps=12, mask="fixed")
    assert all(map(torch.equal, weights(model), before))
    losses = []
    for batch in make_batches(12):
        losses += loop(model, optimizer, [batch])
        assert all(map(torch.equal, masks(model), mask))
    with sparsifier.dense():  # nothing grows behind the mask either
        assert all(map(torch.equal, masks(model), mask))
    assert sparsifier.finalize().zeros == feather.zeros_at(0.7, SIZE)
    assert all(not torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


def test_a_fixed_mask_equals_training_with_masked_gradients():
    model, plain = sparse_model(), sparse_model()
    mask = masks(plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)
    feather.fine_tune(model, optimizer, total_steps=6, mask="fixed")
    loop(model, optimizer, make_batches(6))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)
    for x, y in make_batches(6):
        optimizer.zero_grad()
        nn.functional.mse_loss(plain(x), y).backward()
        for weight, kept in zip(feather.prunable_parameters(plain).values(), mask, strict=True):
            weight.grad.mul_(kept)
        optimizer.step()
    for a, b in zip(weights(model), weights(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_free_mask_starts_from_unchanged_weights_keeps_the_count_and_lets_masks_change(dtype):
    model = sparse_model(dtype=dtype)
    before, mask = weights(model), masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparsifier = feather.fine_tune(model, optimizer, total_steps=12, mask="free")
    assert all(map(torch.equal, weights(model), before))
    changed = False
    for batch in make_batches(12, dtype=dtype):
        loop(model, optimizer, [batch])
        assert sum(int((~m).sum()) for m in masks(model)) == feather.zeros_at(0.7, SIZE)
        changed = changed or not all(map(torch.equal, masks(model), mask))
    assert changed
    assert sparsifier.finalize().zeros == feather.zeros_at(0.7, SIZE)


@pytest.mark.parametrize("size", [2, 3, 7, 49, 1000, 99_991])
def test_a_free_mask_keeps_any_count(size):
    for zeros in sorted({1, 2, size // 3 or 1, size // 2, size - 1} & set(range(1, size))):
        model = nn.Linear(size, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(1 + torch.arange(size) / size)
            model.weight[0, :zeros] = 0
        before = model.weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        sparsifier = feather.fine_tune(model, optimizer, total_steps=2, mask="free")
        assert torch.equal(model.weight, before)
        (model.weight * torch.linspace(-1, 1, size)).sum().backward()
        optimizer.step()
        assert sparsifier.finalize().zeros == zeros


def test_a_fixed_mask_resumes_from_its_state():
    runs = []
    for resume in (False, True):
        model = sparse_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier = feather.fine_tune(model, optimizer, total_steps=6)
        loop(model, optimizer, make_batches(3))
        if resume:
            state = sparsifier.state_dict()
            sparse = {n: w.clone() for n, w in model.state_dict().items()}
            model = make_model(seed=9)
            with torch.no_grad():
                model[0].weight[0, 0] = 0  # another mask, replaced by the state's
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            sparsifier = feather.fine_tune(model, optimizer, total_steps=6)
            sparsifier.load_state_dict(state)
            model.load_state_dict(sparse)
        loop(model, optimizer, make_batches(3, seed=2))
        assert sparsifier.step == 6
        sparsifier.finalize()
        runs.append(weights(model))
    assert all(map(torch.equal, *runs))


def test_excluded_weights_stay_free():
    model = sparse_model()
    zeros = int((model[0].weight == 0).sum())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = feather.fine_tune(model, optimizer, total_steps=3, exclude=["0"])
    loop(model, optimizer, make_batches(3))
    assert [layer.name for layer in sparsifier.finalize().layers] == ["2.weight", "4.weight"]
    assert int((model[0].weight == 0).sum()) < zeros


@pytest.mark.parametrize(
    ("prepare", "kwargs", "message"),
    [
        (lambda m: None, {}, "No prunable weight of the model is zero"),
        (lambda m: [nn.init.zeros_(p) for p in m.parameters()], {}, "Every prunable weight of the model is zero"),
        (lambda m: None, {"mask": "loose"}, "mask='loose' is out of range: it must be 'fixed' or 'free'"),
        (lambda m: None, {"total_steps": 0}, "total_steps=0 is out of range: it must be an integer of at least 1"),
        (lambda m: None, {"exclude": ["nine"]}, "exclude: the pattern 'nine' matches no weight"),
    ],
)
def test_wrong_use_is_refused(prepare, kwargs, message):
    model = make_model()
    prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        feather.fine_tune(model, optimizer, **{"total_steps": 3, **kwargs})


def test_the_gradient_rule_of_a_free_mask_follows_its_sparsity():
    for sparsity, theta in ((0.7, 1.0), (0.97, 0.5)):
        model = sparse_model(sparsity)
        sparsifier = feather.fine_tune(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=3, mask="free")
        assert sparsifier.method.theta == theta
        assert math.isclose(sparsifier.method.sparsity, sparsity, abs_tol=1 / SIZE)
