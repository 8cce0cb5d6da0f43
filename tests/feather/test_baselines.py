"""What defines each method that Feather is compared with."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import feather
from feather.baselines.rigl import drop_and_grow

BASELINES = ["st3", "st3_sigma", "sr_ste", "rigl", "set", "acdc", "topkast"]


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10)
    )


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 3, 8, 8, generator=generator), torch.randint(0, 10, (16,), generator=generator)


def train(model, optimizer, steps):
    for step in steps:
        images, labels = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def start(method, model, total_steps=40, sparsity=0.9, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    return optimizer, feather.create(method, model, optimizer, sparsity=sparsity, total_steps=total_steps, **options)


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98])
def test_the_final_count_of_zeros_is_the_rules(method, sparsity):
    model = build()
    optimizer, sparsifier = start(method, model, sparsity=sparsity)
    train(model, optimizer, range(40))
    expected = sparsifier.method.expected_zeros([p.shape for p in feather.prunable_parameters(model).values()])
    masks = getattr(sparsifier.method, "masks", None)
    zeros = sparsifier.finalize().zeros
    if masks is None:
        assert zeros == expected
    else:  # a grown weight whose inputs are dead stays at zero, though it is active
        assert sum(int((~mask).sum()) for mask in masks) == expected <= zeros
    assert expected / 10160 == pytest.approx(sparsity, abs=1e-3)


@pytest.mark.parametrize("method", BASELINES)
def test_resuming_in_mid_schedule_gives_the_same_bits(method):
    whole = build()
    optimizer, _ = start(method, whole)
    train(whole, optimizer, range(40))

    first = build()
    optimizer, sparsifier = start(method, first)
    train(first, optimizer, range(13))
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), sparsifier.state_dict()))
    second = build(seed=1)
    optimizer, sparsifier = start(method, second)
    second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    sparsifier.load_state_dict(saved[2])
    train(second, optimizer, range(13, 40))
    for mine, theirs in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_st3_rescales_each_filter_of_the_soft_thresholded_weight():
    model = build()
    _, sparsifier = start("st3", model, schedule="one_shot", sparsity=0.8)
    with sparsifier.dense():
        dense = model[2].weight.detach().clone()
    threshold = sparsifier.method.thresholds()[1]
    expected = torch.empty_like(dense)
    for f, w in enumerate(dense):
        mask = w.abs() > threshold
        rho = ((w.abs() * mask).mean() + 1e-6) / (w.abs().mean() + 1e-6)
        expected[f] = 1.01 / (rho + 0.01) * w.sign() * (w.abs() - threshold).clamp(min=0)
    torch.testing.assert_close(model[2].weight.detach(), expected)
    model(batch(0)[0]).sum().backward()  # the gradient is the identity: none is scaled or stopped
    plain = copy.deepcopy(model)
    plain.zero_grad()
    plain(batch(0)[0]).sum().backward()
    assert torch.equal(model[2].weight.grad, plain[2].weight.grad)


def test_st3_sigma_prunes_by_magnitude_in_units_of_the_layer():
    model = build()
    _, sparsifier = start("st3_sigma", model, schedule="one_shot", sparsity=0.8)
    with sparsifier.dense():
        scores = {
            name: p.detach().abs() * math.sqrt(sum(p.shape)) for name, p in feather.prunable_parameters(model).items()
        }
    kept = {name: p.detach() != 0 for name, p in feather.prunable_parameters(model).items()}
    assert (
        torch.cat([scores[name][~kept[name]] for name in scores]).max()
        < torch.cat([scores[name][kept[name]] for name in scores]).min()
    )


def test_sr_ste_decays_pruned_weights_alone():
    steps = 3
    models = {method: build() for method in ("ste", "sr_ste")}
    dense = {}
    for method, model in models.items():
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        sparsifier = feather.create(method, model, optimizer, sparsity=0.5, total_steps=steps, schedule="one_shot")
        kept = model[5].weight.detach() != 0
        with sparsifier.dense():
            before = model[5].weight.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        with sparsifier.dense():
            dense[method] = model[5].weight.detach().clone()
    assert torch.equal(dense["ste"], before)
    assert torch.equal(dense["sr_ste"][kept], before[kept])
    torch.testing.assert_close(dense["sr_ste"][~kept], before[~kept] * (1 - 2e-4), rtol=1e-6, atol=0)


def test_drop_and_grow_moves_the_smallest_weights_to_the_largest_scores():
    weight = torch.tensor([[5.0, -1.0, 3.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, True], [False, False, False, False]])
    score = torch.tensor([[0.0, 9.0, 0.0, 0.0], [1.0, 4.0, 3.0, 2.0]])
    drop_and_grow(mask, weight, score, fraction=0.5)
    # 0.5 and -1 go; -1 comes back because its gradient is the largest, and keeps its value
    assert mask.tolist() == [[True, True, True, False], [False, True, False, False]]
    assert weight[0, 1] == -1.0


def test_rigl_keeps_its_non_zeros_per_layer_and_changes_its_mask_only_at_intervals():
    model = build()
    optimizer, sparsifier = start("rigl", model, total_steps=40)
    counts = [int(mask.sum()) for mask in sparsifier.method.masks]
    assert sparsifier.method.interval == 5
    changed = []
    for step in range(40):
        before = [mask.clone() for mask in sparsifier.method.masks]
        train(model, optimizer, [step])
        after = sparsifier.method.masks
        assert [int(mask.sum()) for mask in after] == counts
        if any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            changed.append(step + 1)
    assert changed == [5, 10, 15, 20, 25]  # and no more from 75 % of training on
    sparsifier.finalize()


def test_rigl_grows_where_the_dense_gradient_is_largest():
    model = build()
    optimizer, sparsifier = start("rigl", model, total_steps=100, framework="uniform")
    train(model, optimizer, range(4))
    before = sparsifier.method.masks[2].clone()
    images, labels = batch(4)
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    gradient = model[5].weight.grad.abs().clone()  # dense at this step alone
    assert (gradient[~before] > 0).any()
    optimizer.step()
    grown = sparsifier.method.masks[2] & ~before
    still_inactive = ~sparsifier.method.masks[2] & ~before
    assert grown.any()
    assert gradient[grown].min() >= gradient[still_inactive].max()
    assert (model[5].weight[grown] == 0).all()


def test_acdc_alternates_and_ends_sparse():
    model = build()
    optimizer, sparsifier = start("acdc", model, total_steps=40)
    sparse = []
    for step in range(40):
        sparse.append(sparsifier.report().sparsity > 0.5)
        before = sparsifier.masks()
        train(model, optimizer, [step])
        if sparse[-1] and sparsifier.method.active:  # within a phase no pruned weight comes back
            assert not any((now & ~was).any() for now, was in zip(sparsifier.masks(), before, strict=True))
    share = [step / 40 for step in range(40)]
    assert not any(s for s, f in zip(sparse, share, strict=True) if f < 0.10 or 0.75 <= f < 0.85)
    assert all(s for s, f in zip(sparse, share, strict=True) if f >= 0.85)
    assert sparse[4:30] == [True, True, False, False] * 6 + [True, True]


def test_acdc_projects_pruned_weights_to_zero_and_releases_them_in_dense_phases():
    model = build()
    optimizer, sparsifier = start("acdc", model, total_steps=40)
    train(model, optimizer, range(4))
    pruned = ~sparsifier.masks()[2]
    with sparsifier.dense():
        assert (model[5].weight[pruned] == 0).all()
    train(model, optimizer, range(4, 7))  # into the dense phase, one step
    assert (model[5].weight[pruned] != 0).any()


def test_topkast_learns_on_twice_the_forward_set_and_pulls_the_rest_of_it_harder():
    model = build()
    optimizer, sparsifier = start("topkast", model, sparsity=0.9)
    with sparsifier.dense():
        order = model[5].weight.detach().abs().flatten().argsort(descending=True)
        dense = model[5].weight.detach().flatten().clone()
    forward, both = order[:512], order[:1024]
    images, labels = batch(0)
    F.cross_entropy(model(images), labels).backward()
    gradient = model[5].weight.grad.flatten().clone()
    outside = torch.ones(5120, dtype=torch.bool)
    outside[both] = False
    assert (gradient[outside] == 0).all()
    assert (gradient[both[512:]] != 0).any()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    pulled = model[5].weight.grad.flatten() - gradient
    torch.testing.assert_close(pulled[forward], 1e-4 * dense[forward], rtol=1e-2, atol=1e-8)
    torch.testing.assert_close(pulled[both[512:]], 1e-3 * dense[both[512:]], rtol=1e-2, atol=1e-8)


def test_set_grows_elsewhere_than_rigl():
    masks = {}
    for method in ("rigl", "set"):
        model = build()
        optimizer, sparsifier = start(method, model)
        train(model, optimizer, range(5))
        masks[method] = sparsifier.method.masks
    assert any(not torch.equal(a, b) for a, b in zip(masks["rigl"], masks["set"], strict=True))


@pytest.mark.parametrize(
    ("method", "options", "names"),
    [
        ("rigl", {"framework": "global"}, ("framework='global'", "erk or uniform")),
        ("st3_sigma", {"framework": "erk"}, ("framework='erk'", "global")),
        ("st3", {"p": 3}, ("p=3", "p=1.0")),
        ("rigl", {"theta": 0.5}, ("theta=0.5", "no theta")),
    ],
)
def test_what_does_not_go_with_a_method_is_refused(method, options, names):
    with pytest.raises(ValueError, match="does not go with") as error:
        start(method, build(), **options)
    assert all(name in str(error.value) for name in names)
