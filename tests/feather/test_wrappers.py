"""What users put around a model and a step: copies, averages, accumulation, clipping, scaling, compilation."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import feather
from tests.feather.reference import loop, make_batches, make_model

NAMES = ["0.weight", "2.weight", "4.weight"]
SIZE = 6 * 16 + 16 * 8 + 8 * 3


def zeros(model):
    return sum(int((w == 0).sum()) for w in feather.prunable_parameters(model).values())


def snapshot(model):
    return [p.detach().clone() for p in model.parameters()]


def setup(*, sparsity=0.9, total_steps=10, make=torch.optim.SGD, lr=0.1, dtype=torch.float64, settings=None, **kwargs):
    model = make_model(dtype=dtype)
    optimizer = make(model.parameters(), lr=lr, **(settings or {}))
    return model, optimizer, feather.create(
        "feather", model, optimizer, sparsity=sparsity, total_steps=total_steps, **kwargs
    )  # fmt: skip


# ---- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [0.0, 1.0])
def test_a_deepcopy_is_a_plain_model_that_trains_by_itself(theta):
    batches = make_batches(10)
    undisturbed, optimizer, _ = setup(theta=theta)
    expected = loop(undisturbed, optimizer, batches)

    model, optimizer, sparsifier = setup(theta=theta)
    losses = loop(model, optimizer, batches[:6])
    twin = copy.deepcopy(model)
    plain = make_model()
    plain.load_state_dict(model.state_dict())
    for other in (twin, plain):
        loop(other, torch.optim.SGD(other.parameters(), lr=0.3), batches[:3])
    twin.load_state_dict(twin.state_dict())
    assert all(map(torch.equal, twin.parameters(), plain.parameters()))  # nobody prunes or scales the copy
    losses += loop(model, optimizer, batches[6:])
    assert losses == expected
    sparsifier.finalize()
    assert all(map(torch.equal, model.parameters(), undisturbed.parameters()))


def test_a_copy_can_have_its_own_sparsifier():
    model, optimizer, sparsifier = setup()
    loop(model, optimizer, make_batches(5))
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    other = feather.create("feather", twin, twin_optimizer, sparsity=0.95, total_steps=4)
    loop(twin, twin_optimizer, make_batches(4))
    loop(model, optimizer, make_batches(5))
    assert other.finalize().zeros == feather.zeros_at(0.95, SIZE)
    assert sparsifier.finalize().zeros == feather.zeros_at(0.9, SIZE)


# ---- averages -------------------------------------------------------------------------------------------------------


def test_ema_averages_dense_weights_and_meets_the_target_with_thresholds_of_its_own():
    model, optimizer, sparsifier = setup(settings={"momentum": 0.9})
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    mean = None
    for batch in make_batches(10):
        loop(model, optimizer, [batch])
        with sparsifier.dense():
            dense = snapshot(model)
            ema.update_parameters(model)
        mean = dense if mean is None else [0.8 * m + 0.2 * d for m, d in zip(mean, dense, strict=True)]
        assert zeros(model) == feather.zeros_at(sparsifier.sparsity, SIZE)
    for averaged, expected in zip(ema.module.parameters(), mean, strict=True):
        torch.testing.assert_close(averaged.detach(), expected)
    deployed = copy.deepcopy(ema)
    sparsifier.apply_to(deployed)
    assert zeros(deployed.module) == feather.zeros_at(0.9, SIZE)
    weights = [ema.module.get_parameter(name).detach() for name in NAMES]
    threshold = feather.magnitude_quantile(weights, 0.9)
    assert threshold != sparsifier.method.thresholds()[0]
    for name, weight in zip(NAMES, weights, strict=True):
        assert torch.equal(deployed.module.get_parameter(name), feather.p_threshold(weight, threshold))
    biases = [(a, b) for (n, a), b in zip(deployed.named_parameters(), ema.parameters(), strict=True) if "bias" in n]
    assert all(torch.equal(a, b) for a, b in biases)
    sparsifier.finalize()


def test_apply_to_reaches_through_wrappers_and_refuses_another_architecture():
    model, _, sparsifier = setup(schedule="one_shot")
    for wrapped in (
        AveragedModel(nn.DataParallel(make_model(3))), torch.compile(make_model(3), backend="eager"), make_model(3)
    ):  # fmt: skip
        sparsifier.apply_to(wrapped)
        assert sum(int((p == 0).sum()) for p in wrapped.parameters()) == feather.zeros_at(0.9, SIZE)
    with pytest.raises(ValueError, match=r"no weight '0.weight' of shape \(16, 6\)"):
        sparsifier.apply_to(nn.Sequential(nn.Linear(3, 3)))
    assert zeros(model) == feather.zeros_at(0.9, SIZE)


# ---- accumulation and clipping --------------------------------------------------------------------------------------


def test_four_micro_batches_equal_one_batch():
    runs = []
    for parts in (1, 4):
        model, optimizer, sparsifier = setup(theta=0.5, settings={"momentum": 0.9})
        for x, y in make_batches(10):
            optimizer.zero_grad()
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (nn.functional.mse_loss(model(xs), ys) / parts).backward()
            optimizer.step()
        assert sparsifier.step == 10
        sparsifier.finalize()
        runs.append(snapshot(model))
    for one, four in zip(*runs, strict=True):
        torch.testing.assert_close(one, four, rtol=1e-9, atol=1e-12)


def test_clipping_sees_the_gradients_after_theta():
    model, optimizer, _ = setup(theta=0.25, sparsity=0.5, schedule="one_shot")
    (x, y), = make_batches(1)  # fmt: skip
    plain = copy.deepcopy(model)
    for m in (model, plain):
        nn.functional.mse_loss(m(x), y).backward()
    scaled = [
        p.grad * torch.where((p == 0) & (p.ndim > 1), 0.25, 1.0).to(p.dtype) for p in plain.parameters()
    ]  # fmt: skip
    norm = torch.stack([g.norm() for g in scaled]).norm()
    assert norm < 0.999 * torch.stack([p.grad.norm() for p in plain.parameters()]).norm()
    torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), 1e-3), norm)
    optimizer.step()


# ---- GradScaler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("implementation", ["foreach", "fused"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_that_grad_scaler_skips_is_no_step(make, implementation, unscale):
    """A fused optimizer's step runs, hooks and all, and leaves the skipping to its kernel."""
    model, optimizer, sparsifier = setup(
        make=make, lr=0.01, dtype=torch.float32, settings={implementation: True}, theta=0.5, total_steps=6, end_step=4
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    steps = []
    for i, (x, y) in enumerate(make_batches(8, dtype=torch.float32)):
        before = snapshot(model)
        with sparsifier.dense():
            dense = snapshot(model)
        optimizer.zero_grad()
        scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
        if i in (2, 5):
            model[2].weight.grad[0, 0] = float("inf")
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        steps.append(sparsifier.step)
        if i in (2, 5):
            assert all(map(torch.equal, model.parameters(), before))
            with sparsifier.dense():
                assert all(map(torch.equal, model.parameters(), dense))
        assert zeros(model) == feather.zeros_at(sparsifier.sparsity, SIZE)
    assert steps == [1, 2, 2, 3, 4, 4, 5, 6]
    assert sparsifier.finalize().zeros == feather.zeros_at(0.9, SIZE)


# ---- torch.compile --------------------------------------------------------------------------------------------------


class Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(graph, inputs)


@pytest.mark.parametrize("first", ["create", "compile"])
def test_compile_makes_one_graph_for_a_whole_schedule_and_the_same_losses(first):
    torch._dynamo.reset()
    batches = make_batches(10)
    eager, optimizer, _ = setup(theta=0.5, start_step=2, end_step=8)
    expected = loop(eager, optimizer, batches)

    backend = Counting()
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if first == "compile":
        model = torch.compile(model, backend=backend, fullgraph=True)
    sparsifier = feather.create(
        "feather", model, optimizer, sparsity=0.9, total_steps=10, theta=0.5, start_step=2, end_step=8
    )
    if first == "create":
        model = torch.compile(model, backend=backend, fullgraph=True)
    assert loop(model, optimizer, batches) == pytest.approx(expected, rel=1e-12)
    assert backend.graphs == 1
    assert sparsifier.finalize().zeros == feather.zeros_at(0.9, SIZE)
    assert zeros(model) == zeros(eager)


@pytest.mark.long
def test_inductor_trains_as_eager_does():
    torch._dynamo.reset()
    batches = make_batches(10, dtype=torch.float32)
    eager, optimizer, _ = setup(theta=0.5, dtype=torch.float32)
    expected = loop(eager, optimizer, batches)
    model, optimizer, sparsifier = setup(theta=0.5, dtype=torch.float32)
    torch._dynamo.utils.counters.clear()
    assert loop(torch.compile(model), optimizer, batches) == pytest.approx(expected, rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert sparsifier.finalize().zeros == feather.zeros_at(0.9, SIZE)
