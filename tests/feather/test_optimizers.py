"""Any optimizer, any of its implementations, any parameter groups: the dense weights follow its own rule."""

import pytest
import torch

import feather
from tests.feather import reference
from tests.feather.reference import loop, make_batches, make_model

NAMES = ["0.weight", "2.weight", "4.weight"]
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.01}),
    "momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}
IMPLEMENTATIONS = {"default": {}, "foreach": {"foreach": True}, "single": {"foreach": False}, "fused": {"fused": True}}


def groups(model):
    first, second, *rest = (model.get_parameter(name) for name in NAMES)
    biases = [p for p in model.parameters() if p.ndim == 1]
    return [
        {"params": [first], "lr": 0.02},
        {"params": [second, *rest], "weight_decay": 0.2},
        {"params": biases, "lr": 0.03, "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("several", [False, True], ids=["one group", "three groups"])
def test_trajectory_equals_the_reference(name, implementation, several):
    make, settings = OPTIMIZERS[name]
    batches = make_batches(10)
    model, other = make_model(), make_model()
    optimizer = make(groups(model) if several else model.parameters(), **settings, **IMPLEMENTATIONS[implementation])
    sparsifier = feather.create("feather", model, optimizer, sparsity=0.8, total_steps=10, theta=0.5)
    losses = loop(model, optimizer, batches)
    plain = make(groups(other) if several else other.parameters(), **settings)
    expected, final = reference.train(other, plain, batches, feather.Cubic(0.8, 0, 5), NAMES, 3, 0.5)
    assert losses == pytest.approx(expected, rel=1e-8)
    sparsifier.finalize()
    for parameter_name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), final[parameter_name], rtol=1e-6, atol=1e-9)


def test_a_learning_rate_scheduler_created_before_or_after_does_not_matter():
    runs = []
    for order in ("before", "after"):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if order == "before":
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
        feather.create("feather", model, optimizer, sparsity=0.8, total_steps=6)
        if order == "after":
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
        for batch in make_batches(6):
            loop(model, optimizer, [batch])
            scheduler.step()
        runs.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *runs))


def test_weights_in_a_second_optimizer_are_refused_by_name():
    model = make_model()
    optimizer = torch.optim.SGD([model[0].weight], lr=0.1)
    with pytest.raises(ValueError, match=r"does not hold the prunable weight '2.weight' and 1 more.*exclude=\["):
        feather.create("feather", model, optimizer, sparsity=0.5, total_steps=2)
    feather.create("feather", model, optimizer, sparsity=0.5, total_steps=2, exclude=["2", "4"])
