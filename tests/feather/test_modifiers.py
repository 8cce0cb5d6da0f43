"""HAM: its step, on which weights, and with every method."""

import copy
import math
import re

import pytest
import torch
from torch import nn

import feather
from tests.feather.reference import loop, make_batches, make_model

SIZE = 6 * 16 + 16 * 8 + 8 * 3


def start(method, model, modifier="ham", total_steps=6, sparsity=0.8, **settings):
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, **settings})
    sparsity = 0 if method == "dense" else sparsity
    return optimizer, feather.create(
        method, model, optimizer, sparsity=sparsity, total_steps=total_steps, modifier=modifier
    )


def ham(weight, grad, lr, alpha, beta):
    return weight * torch.exp((lr * (-alpha * weight.sign() * grad - beta)).clamp(-5, 5))


@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"foreach": False}, {"nesterov": True}])
@pytest.mark.parametrize(("modifier", "alpha", "beta"), [("ham", 200, 1e-3), (feather.HAM(30, 16e-3), 30, 16e-3)])
def test_the_dense_run_with_ham_is_the_equation_after_every_step(modifier, alpha, beta, settings):
    ours, plain = make_model(), make_model()
    optimizer, sparsifier = start("dense", ours, modifier, **settings)
    loop(ours, optimizer, make_batches(5))
    other = torch.optim.SGD(plain.parameters(), **{"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, **settings})
    for batch in make_batches(5):
        loop(plain, other, [batch])
        with torch.no_grad():
            for parameter in plain.parameters():
                if parameter.ndim >= 2:
                    parameter.copy_(ham(parameter, parameter.grad, 0.05, alpha, beta))
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=0)
    assert sparsifier.finalize().zeros == 0
    before = copy.deepcopy(ours.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0  # whatever a step does from here on, HAM's part is over
    loop(ours, optimizer, make_batches(1))
    assert all(torch.equal(weight, before[name]) for name, weight in ours.state_dict().items())


def test_the_exponent_is_clamped_and_each_group_has_its_learning_rate():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    groups = [{"params": [model[0].weight], "lr": 1.0}, {"params": [model[1].weight], "lr": 1e-3}]
    optimizer = torch.optim.SGD(groups)
    feather.create("dense", model, optimizer, sparsity=0, total_steps=2, modifier=feather.HAM(200, 0.0))
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.tensor([[1.0, -1.0], [1e-3, 0.0]])
    optimizer.step()
    stepped = [w - lr * p.grad for w, lr, p in zip(before, (1.0, 1e-3), model.parameters(), strict=True)]
    signs = stepped[0].sign()
    torch.testing.assert_close(
        model[0].weight.detach(),
        stepped[0] * torch.exp(torch.tensor([[-5.0, 5.0], [-0.2, 0.0]]) * signs),
    )
    torch.testing.assert_close(model[1].weight.detach(), ham(stepped[1], model[1].weight.grad, 1e-3, 200, 0.0))


def test_ham_acts_on_the_dense_weights_right_after_the_optimizer():
    ours, reference = make_model(), make_model()
    optimizer, sparsifier = start("feather", ours, total_steps=2)
    plain, other = start("feather", reference, "none", total_steps=2)
    loop(ours, optimizer, make_batches(1))
    loop(reference, plain, make_batches(1))
    with other.dense(), torch.no_grad():
        for name in ("0.weight", "2.weight", "4.weight"):
            weight = reference.get_parameter(name)
            weight.copy_(ham(weight, weight.grad, 0.05, 200, 1e-3))
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert sparsifier.masks()[0].sum() == other.masks()[0].sum()


@pytest.mark.parametrize("method", feather.methods())
def test_every_method_goes_with_ham_and_keeps_its_final_count(method):
    models = {modifier: make_model(dtype=torch.float32) for modifier in ("none", "ham")}
    counts = {}
    for modifier, model in models.items():
        optimizer, sparsifier = start(method, model, modifier, lr=0.01)
        loop(model, optimizer, make_batches(6, dtype=torch.float32))
        expected = sparsifier.method.expected_zeros([(16, 6), (8, 16), (3, 8)])
        counts[modifier] = sparsifier.finalize().zeros
        assert expected is None or counts[modifier] == expected
    assert any(not torch.equal(*pair) for pair in zip(*(m.parameters() for m in models.values()), strict=True))


@pytest.mark.parametrize("method", ["dense", "feather", "rigl", "powerprop"])
def test_resuming_gives_the_same_bits(method):
    whole = make_model()
    optimizer, _ = start(method, whole)
    loop(whole, optimizer, make_batches(6))
    first = make_model()
    optimizer, sparsifier = start(method, first)
    loop(first, optimizer, make_batches(6)[:3])
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), sparsifier.state_dict()))
    second = make_model(seed=5)
    optimizer, sparsifier = start(method, second)
    second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    sparsifier.load_state_dict(saved[2])
    loop(second, optimizer, make_batches(6)[3:])
    assert all(map(torch.equal, second.parameters(), whole.parameters()))


def test_another_modifier_in_the_checkpoint_is_refused_and_none_is_what_older_ones_have():
    states = {name: start("feather", make_model(), name)[1].state_dict() for name in ("none", "ham")}
    _, sparsifier = start("feather", make_model(), feather.HAM(beta=16e-3))
    with pytest.raises(ValueError, match="create the sparsifier with the arguments of the run"):
        sparsifier.load_state_dict(states["ham"])
    del states["none"]["modifier"]
    start("feather", make_model(), "none")[1].load_state_dict(states["none"])


@pytest.mark.parametrize("method", ["dense", "feather"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_grad_scaler_skips_is_no_step_of_ham_and_its_scale_is_none_of_hams(method, fused):
    results = []
    for scaled in (False, True):
        model = make_model(dtype=torch.float32)
        optimizer, _ = start(method, model, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for i, (x, y) in enumerate(make_batches(4, dtype=torch.float32)):
            for attempt in range(2 if scaled and i == 2 else 1):
                optimizer.zero_grad()
                scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
                if scaled and i == 2 and attempt == 0:
                    model[2].weight.grad[0, 0] = math.inf
                scaler.step(optimizer)
                scaler.update(2.0**10)
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other)


def test_ham_takes_the_accumulated_gradient_once_and_leaves_weights_without_one():
    model, plain = make_model(), make_model()
    unused = nn.Linear(3, 3, dtype=torch.float64)
    model.unused = unused
    before = unused.weight.detach().clone()
    optimizer, _ = start("dense", model)
    other = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for network in (model, plain):
        for x, y in make_batches(2):
            nn.functional.mse_loss(network[:5](x), y).backward()
    optimizer.step()
    other.step()
    assert torch.equal(unused.weight, before)
    weight = plain[2].weight.detach()
    torch.testing.assert_close(model[2].weight.detach(), ham(weight, plain[2].weight.grad, 0.05, 200, 1e-3))


@pytest.mark.parametrize(
    ("modifier", "message"),
    [
        ("hams", "modifier='hams' is out of range: it must be one of none, ham, or an instance such as HAM()."),
        (None, "modifier=None is out of range"),
        (200, "modifier=200 is out of range"),
    ],
)
def test_an_unknown_modifier_is_refused(modifier, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        start("feather", make_model(), modifier)


@pytest.mark.parametrize("settings", [{"alpha": -1}, {"beta": math.nan}, {"alpha": "200"}, {"beta": math.inf}])
def test_settings_out_of_range_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name}=.* is out of range: it must be a finite number of at least 0"):
        feather.HAM(**settings)


def test_a_second_modifier_on_the_same_model_is_refused():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"sparsity": 0.5, "total_steps": 2}
    feather.create("feather", model, optimizer, include=["0"], modifier="ham", **options)
    with pytest.raises(ValueError, match="Another sparsifier of this model has a modifier"):
        feather.create("feather", model, optimizer, include=["2"], modifier="ham", **options)
    feather.create("feather", model, optimizer, include=["2"], **options)


def test_options_go_with_a_modifier_given_by_name():
    optimizer = torch.optim.SGD((model := make_model()).parameters(), lr=0.1)
    sparsifier = feather.create(
        "dense", model, optimizer, sparsity=0, total_steps=2, modifier="ham", modifier_options={"beta": 0.5}
    )
    assert sparsifier.modifier.beta == 0.5
    for options, modifier, told in (
        ({"gamma": 1}, "ham", "one of those of ham: alpha, beta"),
        ({"beta": -1}, "ham", "beta=-1 is out of range"),
        ({"beta": 0.5}, feather.HAM(), "left out where modifier is an instance"),
    ):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=told):
            feather.create(
                "dense", model, optimizer, sparsity=0, total_steps=2, modifier=modifier, modifier_options=options
            )
