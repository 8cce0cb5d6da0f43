"""``create``: names, defaults, and refusals that say what would be right."""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import feather


def create(method="feather", *, model=None, optimizer=None, **kwargs):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    return feather.create(method, model, optimizer, **{"sparsity": 0.9, "total_steps": 100, **kwargs})


NAN = float("nan")


def refused(name, values, allowed):
    return [({name: v}, re.escape(f"{name}={v!r} is out of range: it must be {allowed}.")) for v in values]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"method": "fether"}, "method='fether' is unknown: choose one of dense, feather, gmp, ste, soft_ste"),
        *refused("sparsity", [1, 1.5, -0.1, NAN, 98, "0.9", None, True], "in [0, 1), the fraction of zeros"),
        *refused("total_steps", [0, -3, 2.5, None, True], "an integer of at least 1"),
        *refused("p", [0.5, 0, -1, NAN, "3", True], "a number in [1, inf]"),
        *refused("theta", [-0.1, 1.1, NAN, "automatic", math.inf], "a number in [0, 1] or 'auto'"),
        *refused("start_step", [-1, 101, 1.5], "in [0, 100]"),
        *refused("end_step", [-1, 101, "9"], "in [0, 100]"),
        ({"start_step": 60, "end_step": 50}, r"end_step=50 is outside \[start_step=60, total_steps\]"),
        ({"schedule": "cosine"}, "schedule='cosine' is unknown: choose one of cubic, linear, one_shot"),
        ({"schedule": "one_shot", "end_step": 7}, "end_step=7 does not go with schedule='one_shot'"),
        ({"framework": "local"}, "framework='local' is out of range: it must be one of auto, global"),
        ({"method": "dense"}, "sparsity=0.9 is out of range: it must be 0 with method='dense'"),
        ({"method": "gmp", "p": 3}, "p=3 does not go with method='gmp', which is p=inf"),
        ({"method": "gmp", "theta": 0.5}, "theta=0.5 does not go with method='gmp', which is theta=0.0"),
        ({"method": "ste", "theta": "auto"}, "theta='auto' does not go with method='ste'"),
        ({"schedule": feather.Cubic(0.8, 0, 50)}, "schedule.target=0.8 is out of range: it must be sparsity=0.9"),
        ({"schedule": feather.Cubic(0.9, 0, 101)}, r"schedule.end_step=101 is out of range: it must be in \[0, 100\]"),
        ({"schedule": feather.Cubic(0.9, 0, 50), "start_step": 3}, "start_step=3 is out of range: it must be left out"),
        ({"model": "resnet20", "optimizer": 1}, "model='resnet20' is out of range: it must be a torch.nn.Module"),
        ({"optimizer": "sgd"}, "optimizer='sgd' is out of range: it must be a torch.optim.Optimizer"),
        ({"include": ["x*"]}, r"include: the pattern 'x\*' matches no weight; names look like 0.weight, 1.weight"),
        ({"exclude": "1"}, r"exclude='1' is a string: give a list of patterns, \['1'\]"),
    ],
)  # fmt: skip
def test_every_refusal_names_the_argument_its_value_and_what_is_allowed(kwargs, message):
    with pytest.raises(ValueError, match=message):
        create(**kwargs)


def test_a_refusal_leaves_model_and_optimizer_as_they_were():
    model = nn.Linear(6, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.weight.clone()
    with pytest.raises(ValueError, match="framework="):
        create(model=model, optimizer=optimizer, framework="nowhere", schedule="one_shot")
    assert torch.equal(model.weight, before)
    create(model=model, optimizer=optimizer)  # no other sparsifier in the way


@pytest.mark.parametrize(("sparsity", "theta"), [(0.5, 1.0), (0.95, 1.0), (0.951, 0.5), (0.99, 0.5)])
def test_feather_defaults_to_the_paper(sparsity, theta):
    method = create(sparsity=sparsity).method
    assert (method.p, method.theta, method.schedule) == (3.0, theta, feather.Cubic(sparsity, 0, 50))
    assert type(method.framework).__name__ == "GlobalMagnitude"
    assert create(sparsity=sparsity, theta="auto", framework="global").method.theta == theta


def test_every_listed_method_trains_to_its_target():
    for name in feather.methods():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsity = 0 if name == "dense" else 0.8
        sparsifier = feather.create(name, model, optimizer, sparsity=sparsity, total_steps=4)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(3, 6)).square().mean().backward()
            optimizer.step()
        expected = sparsifier.method.expected_zeros([(5, 6), (4, 5)])
        if expected is None:  # steered, not controlled: it says what it has reached
            assert sparsifier.finalize().prunable == 50
            continue
        assert expected in (feather.zeros_at(sparsity, 50), feather.zeros_at(sparsity, 50) - 1)  # whole, or by layer
        assert sparsifier.finalize().zeros == expected


def test_a_schedule_object_is_taken_as_it_is():
    schedule = feather.Linear(0.9, 10, 90)
    assert create(schedule=schedule).method.schedule is schedule


def test_numpy_numbers_are_numbers():
    sparsifier = create(sparsity=np.float64(0.9), total_steps=np.int64(100), p=np.float32(3), theta=np.float64(0.5))
    plain = create(sparsity=0.9, total_steps=100, p=3, theta=0.5)
    assert sparsifier.method.settings() == plain.method.settings()
    assert type(sparsifier.total_steps) is int


@pytest.mark.parametrize("same_optimizer", [True, False])
@pytest.mark.parametrize("theta", [0.5, 1.0])
def test_two_sparsifiers_on_one_model_are_refused_until_the_first_lets_go(same_optimizer, theta):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = create(model=model, optimizer=optimizer, theta=theta)
    second = optimizer if same_optimizer else torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"Another sparsifier holds weights .*call its finalize\(\) or remove\(\) first"
    ):
        create(model=model, optimizer=second)
    with pytest.raises(ValueError, match="Another sparsifier"):
        create(model=torch.compile(model, backend="eager"), optimizer=second)
    first.remove()
    create(model=model, optimizer=second)


def test_two_sparsifiers_may_share_a_model_between_them():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model]
    sparsifiers = [
        create(model=model, optimizer=optimizer, include=[str(i)], total_steps=2, sparsity=s)
        for i, (optimizer, s) in enumerate(zip(optimizers, (0.5, 0.8), strict=True))
    ]
    for _ in range(2):
        model(torch.randn(3, 6)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert [s.finalize().zeros for s in sparsifiers] == [feather.zeros_at(0.5, 30), feather.zeros_at(0.8, 20)]
