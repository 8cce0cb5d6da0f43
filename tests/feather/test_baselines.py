"""What defines each method that Feather is compared with."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import feather
from feather.baselines.rigl import drop_and_grow
from feather.baselines.spartan import solve_shift

BASELINES = ["st3", "st3_sigma", "sr_ste", "rigl", "set", "acdc", "topkast", "spartan", "powerprop"]


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


@pytest.mark.parametrize("stop", [13, 34])
@pytest.mark.parametrize("method", [*BASELINES, "str"])
def test_resuming_in_mid_schedule_gives_the_same_bits(method, stop):
    whole = build()
    optimizer, _ = start(method, whole)
    train(whole, optimizer, range(40))

    first = build()
    optimizer, sparsifier = start(method, first)
    train(first, optimizer, range(stop))
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), sparsifier.state_dict()))
    second = build(seed=1)
    optimizer, sparsifier = start(method, second)
    second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    sparsifier.load_state_dict(saved[2])
    train(second, optimizer, range(stop, 40))
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
        ("spartan", {"framework": "erk"}, ("framework='erk'", "uses global")),
        ("spartan", {"p": 2}, ("p=2", "no p")),
        ("str", {"framework": "global"}, ("framework='global'", "uses thresholds of its own")),
        ("str", {"theta": 1}, ("theta=1", "no theta")),
        ("powerprop", {"p": 3}, ("p=3", "p=inf")),
    ],
)
def test_what_does_not_go_with_a_method_is_refused(method, options, names):
    with pytest.raises(ValueError, match="does not go with") as error:
        start(method, build(), **options)
    assert all(name in str(error.value) for name in names)


# ---- GradScaler with a fused optimizer, whose kernel undoes the scale ------------------------------------------------


@pytest.mark.parametrize("method", ["rigl", "spartan", "sr_ste", "str", "topkast"])
def test_a_scale_that_the_optimizer_undoes_changes_nothing(method):
    results = []
    for scaled in (False, True):
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
        feather.create(method, model, optimizer, sparsity=0.8, total_steps=12)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for step in range(12):
            images, labels = batch(step)
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(images), labels)).backward()
            if scaled and step == 3:
                model[2].weight.grad[0, 0] = math.inf
                scaler.step(optimizer)  # skipped, and this batch is taken once more
                scaler.update(2.0**10)
                optimizer.zero_grad()
                scaler.scale(F.cross_entropy(model(images), labels)).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other)


# ---- Spartan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 20, 500, 980, 999])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0, 300.0])
@pytest.mark.parametrize("start", [-100.0, 0.0, 100.0])
def test_spartans_mask_sums_to_its_budget(budget, sharpness, start):
    scores = sharpness * torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).abs()
    shift = solve_shift(scores, budget, torch.tensor(start), tolerance=1e-9)
    assert float((scores - shift).sigmoid().sum()) == pytest.approx(budget, rel=1e-8)


def spartan(step, sparsity=0.7, total_steps=100, dtype=torch.float64):
    """A method that stands after ``step`` steps, and the weights of two layers."""
    generator = torch.Generator().manual_seed(3)
    weights = [0.1 * torch.randn(shape, generator=generator, dtype=dtype) for shape in ((7, 5), (4, 6))]
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = feather.create("spartan", model, optimizer, sparsity=sparsity, total_steps=total_steps).method
    method.update(weights, step)
    return method, weights


@pytest.mark.parametrize("step", [5, 30, 79])
def test_spartans_gradient_is_that_of_the_soft_mask_under_its_budget(step):
    method, weights = spartan(step)
    scale = float(method._scale)
    budget = 59 - feather.zeros_at(method.scheduled_sparsity(step), 59)
    assert scale == pytest.approx((1 + 9 * step / 80) / float(method.thresholds()[0]))
    generator = torch.Generator().manual_seed(4)
    upstream = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]

    def loss(*ws):  # what the cut would see, with gradient ``upstream``
        scores = scale * torch.cat([w.abs().flatten() for w in ws])
        shift = solve_shift(scores.detach(), budget, torch.tensor(0.0), tolerance=1e-14)
        return sum((g * w * (scale * w.abs() - shift).sigmoid()).sum() for g, w in zip(upstream, ws, strict=True))

    gradients = [g.clone() for g in upstream]
    method.before_step(weights, gradients, [])
    for layer, gradient in enumerate(gradients):
        for position in ((0, 0), (1, 3), (3, 2)):
            difference = []
            for sign in (1, -1):
                moved = [w.clone() for w in weights]
                moved[layer][position] += sign * 1e-6
                difference.append(float(loss(*moved)))
            expected = (difference[0] - difference[1]) / 2e-6
            assert float(gradient[position]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_spartan_shows_the_hard_top_k_of_the_softly_masked_weights():
    method, weights = spartan(step=40)
    shown = torch.cat([sparse.flatten() for sparse in method.forward(weights)])
    dense = torch.cat([w.flatten() for w in weights])
    masked = dense * (method._scale * dense.abs() - method._shift).sigmoid()
    kept = masked.abs().topk(59 - feather.zeros_at(0.7, 59)).indices
    assert sorted(kept.tolist()) == shown.nonzero().flatten().tolist()
    torch.testing.assert_close(shown[kept], masked[kept])


def test_spartans_budget_falls_in_a_fifth_of_the_steps_and_its_mask_is_frozen_for_the_last_fifth():
    model = build()
    optimizer, sparsifier = start("spartan", model, total_steps=40)
    method = sparsifier.method
    assert [method.scheduled_sparsity(step) for step in (0, 4, 8, 40)] == [0, 0.45, 0.9, 0.9]
    train(model, optimizer, range(31))
    assert not method.frozen
    before = sparsifier.masks()
    train(model, optimizer, range(31, 32))
    assert method.frozen
    assert 0 < sparsifier.mask_change(before) < 0.1
    masks, frozen = sparsifier.masks(), [mask.clone() for mask in method.frozen]
    assert all(0 < float(mask[mask > 0].min()) < 1 for mask in frozen)  # soft still: freezing makes no jump
    train(model, optimizer, range(32, 40))
    assert sparsifier.mask_change(masks) == 0
    assert all(map(torch.equal, method.frozen, frozen))
    with sparsifier.dense():
        dense = model[5].weight.detach().clone()
    torch.testing.assert_close(model[5].weight.detach(), dense * frozen[2])
    sparsifier.finalize()


# ---- STR -------------------------------------------------------------------------------------------------------------


def test_strs_gradients_are_autograds():
    model = build().double()
    _, sparsifier = start("str", model)
    method = sparsifier.method
    method.s = torch.tensor([-2.5, -3.5, -4.0], dtype=torch.float64)
    with sparsifier.dense():
        for weight in feather.prunable_parameters(model).values():
            weight.data *= 1.01  # a change, so that the thresholds are taken anew
        dense = {n: p.detach().clone().requires_grad_() for n, p in feather.prunable_parameters(model).items()}
    s = method.s.clone().requires_grad_()
    shown = {n: w.sign() * (w.abs() - t).relu() for (n, w), t in zip(dense.items(), s.sigmoid(), strict=True)}
    images, labels = batch(0)
    output = torch.func.functional_call(model, shown, (images.double(),))
    F.cross_entropy(output, labels).backward()
    F.cross_entropy(model(images.double()), labels).backward()
    parameters = feather.prunable_parameters(model)
    for name, weight in dense.items():
        torch.testing.assert_close(parameters[name].detach(), shown[name].detach())
        torch.testing.assert_close(parameters[name].grad, weight.grad)
    ours = method.s_gradient([w.detach() for w in dense.values()], [p.grad for p in parameters.values()])
    torch.testing.assert_close(ours, s.grad)
    assert (s.grad != 0).all()


def test_strs_thresholds_are_trained_with_the_weights_learning_rate_and_momentum():
    model = build()
    groups = [{"params": [model[0].weight], "lr": 0.2}, {"params": [model[2].weight, model[5].weight]}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.5)
    method = feather.create("str", model, optimizer, sparsity=0.9, total_steps=200).method
    method.s, method._behind = torch.tensor([-2.0, -2.5, -3.0]), torch.tensor(0.25)
    gradients = [torch.ones_like(p) for p in (model[0].weight, model[2].weight, model[5].weight)]
    weights = [g.clone() for g in gradients]
    sums = torch.tensor([float(g.sum()) for g in gradients])
    options = [optimizer.param_groups[i] for i in (0, 1, 1)]
    lr, momentum, expected = torch.tensor([0.2, 0.1, 0.1]), torch.zeros(3), method.s
    for _ in range(3):
        t = expected.sigmoid()
        momentum = 0.5 * momentum - t * (1 - t) * sums
        expected = expected - lr * (momentum + 0.06 / 0.2 * 0.25 * expected)
        method.before_step(weights, gradients, options)
        torch.testing.assert_close(method.s, expected)


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_str_comes_near_its_target_in_a_short_run_and_reports_what_it_reached(sparsity):
    model = build()
    optimizer, sparsifier = start("str", model, total_steps=100, sparsity=sparsity)
    assert sparsifier.report().sparsity < 0.01
    train(model, optimizer, range(100))
    assert sparsifier.method.expected_zeros([]) is None
    report = sparsifier.finalize()
    assert report.sparsity == pytest.approx(sparsity, abs=0.05)
    assert len({layer.threshold for layer in report.layers}) == 3


# ---- Powerpropagation ------------------------------------------------------------------------------------------------


def test_powerpropagation_starts_with_the_networks_own_weights_and_trains_their_roots():
    model, own = build(), build()
    _, sparsifier = start("powerprop", model)
    for mine, theirs in zip(model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)
    with sparsifier.dense():
        v = model[5].weight.detach().clone()
    torch.testing.assert_close(v, own[5].weight.sign() * own[5].weight.abs() ** 0.8)
    own.load_state_dict(build(seed=9).state_dict())
    model.load_state_dict(own.state_dict())
    torch.testing.assert_close(model[5].weight, own[5].weight, rtol=1e-5, atol=1e-8)
    with sparsifier.dense():
        torch.testing.assert_close(model[5].weight.detach(), own[5].weight.sign() * own[5].weight.abs() ** 0.8)


def test_powerpropagations_gradient_is_the_chain_rules_on_kept_weights():
    model = build().double()
    _, sparsifier = start("powerprop", model, schedule="one_shot", sparsity=0.6)
    with sparsifier.dense():
        v = {n: p.detach().clone().requires_grad_() for n, p in feather.prunable_parameters(model).items()}
    kept = {n: p.detach() != 0 for n, p in feather.prunable_parameters(model).items()}
    shown = {n: torch.where(kept[n], p * p.abs() ** 0.25, 0) for n, p in v.items()}
    images, labels = batch(0)
    F.cross_entropy(torch.func.functional_call(model, shown, (images.double(),)), labels).backward()
    F.cross_entropy(model(images.double()), labels).backward()
    for name, parameter in feather.prunable_parameters(model).items():
        torch.testing.assert_close(parameter.grad, v[name].grad)
        assert (parameter.grad[~kept[name]] == 0).all()
