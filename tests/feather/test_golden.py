"""Parity with vectors recorded from the authors' public code (tests/golden/README.md)."""

import copy
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import feather
from models import create_model

GOLDEN = Path(__file__).parents[1] / "golden"


def load(name):
    return np.load(GOLDEN / f"{name}.npz")


@pytest.mark.parametrize("threshold", ["0.0001", "0.02", "0.05"])
def test_operator_and_gradient_rule(threshold):
    z = load("operator")
    weight, grad = torch.from_numpy(z["w"]), torch.from_numpy(z["g"])
    sparse = feather.p_threshold(weight, torch.tensor(float(threshold), dtype=torch.float64), p=3)
    expected = torch.from_numpy(z[f"out_T{threshold}"])
    assert torch.equal(sparse == 0, expected == 0)
    # the recorded form cancels right above T, at T's distance: 1e-12 relative holds away from it
    clear = (weight.abs() - float(threshold)).abs() > 1e-3 * float(threshold)
    torch.testing.assert_close(sparse[clear], expected[clear], rtol=1e-12, atol=0)
    torch.testing.assert_close(sparse, expected, rtol=1e-9, atol=1e-18)
    for theta in (1.0, 0.5):
        scaled = feather.scale_pruned_gradient(grad, sparse, theta)
        torch.testing.assert_close(scaled, torch.from_numpy(z[f"grad_T{threshold}_theta{theta}"]), rtol=1e-12, atol=0)


def test_schedule():
    z = load("schedule")
    for key in z.files:
        target, per_epoch, epochs, start = key[1:].replace("_nb", " ").replace("_e", " ").replace("_t1", " ").split()
        total = int(per_epoch) * int(epochs)
        schedule = feather.Cubic(float(target), int(start) * int(per_epoch), total // 2)
        ours = [schedule(step) for step in range(total)]
        np.testing.assert_allclose(ours, z[key], rtol=1e-12, atol=1e-15)


def test_threshold():
    z = load("threshold")
    for key in (k for k in z.files if k.startswith("T")):
        index, ratio = key[1:].split("_")
        threshold = feather.magnitude_quantile([torch.from_numpy(z[f"w{index}"])], float(ratio))
        np.testing.assert_allclose(threshold.numpy(), z[key], rtol=1e-12)


def initialise(model):
    """tests/golden/README.md: the k-th weight of its shape, in execution order."""
    counts, order = {}, []

    def visit(module, args):
        shape = "x".join(map(str, module.weight.shape))
        key = f"{shape}#{counts.setdefault(shape, 0)}"
        counts[shape] += 1
        order.append(key)
        fan_out = module.weight.shape[0] * math.prod(module.weight.shape[2:])
        values = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(module.weight.shape))
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(values * math.sqrt(2 / fan_out)))
            if module.bias is not None:
                module.bias.zero_()

    kinds = (nn.Conv2d, nn.Linear)
    handles = [m.register_forward_pre_hook(visit) for m in model.modules() if isinstance(m, kinds)]
    model.eval()(torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    for handle in handles:
        handle.remove()
    return order


@pytest.mark.parametrize("name", [pytest.param("trace_resnet20_s0.90", marks=pytest.mark.long), "trace_resnet20_s0.98"])
def test_training_trace(name):
    """Losses, gradient norms, thresholds, zeros and final logits follow the authors' code step by step."""
    z = load(name)
    config = json.loads(str(z["config"]))
    epochs, batches, size = config["epochs"], config["batches_per_epoch"], config["batch_size"]
    rs = np.random.RandomState(config["seed"])
    images = torch.from_numpy(rs.standard_normal((batches, size, 3, 32, 32)))
    labels = torch.from_numpy(rs.randint(0, 100, (batches, size)))
    probe = torch.from_numpy(rs.standard_normal((4, 3, 32, 32)))

    model = create_model("resnet20", num_classes=100).double()
    assert initialise(model) == list(z["order"])
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config["weight_decay"]}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=config["lr"], momentum=config["momentum"])
    total, start = epochs * batches, config["t1_epochs"] * batches
    sparsifier = feather.create(
        "feather", model, optimizer, sparsity=config["rate"], total_steps=total, p=config["p"], theta=config["theta"],
        start_step=start,
    )  # fmt: skip

    for step in range(total):
        model.train()
        epoch, batch = divmod(step, batches)
        for group in optimizer.param_groups:
            group["lr"] = z["lr"][step]
        assert sparsifier.sparsity == pytest.approx(z["ratio"][step], abs=1e-12)
        if z["ratio"][step] > 0:
            assert float(sparsifier.method.thresholds()[0]) == pytest.approx(z["threshold"][step], rel=1e-6)
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config["clip_grad_norm"])
        assert loss.item() == pytest.approx(z["loss"][step], rel=1e-6), f"step {step}"
        assert norm.item() == pytest.approx(z["grad_norm"][step], rel=1e-5), f"step {step}"
        optimizer.step()
        if batch == batches - 1:
            # the authors evaluate with the threshold of the epoch's last ratio
            with sparsifier.dense():
                evaluated = copy.deepcopy(model).eval()
            weights = feather.prunable_parameters(evaluated).values()
            threshold = feather.magnitude_quantile(list(weights), float(z["ratio"][step]))
            with torch.no_grad():
                for weight in weights:
                    weight.copy_(feather.p_threshold(weight, threshold, config["p"]))
                loss = nn.functional.cross_entropy(evaluated(images[0]), labels[0])
            assert loss.item() == pytest.approx(z["eval_loss"][epoch], rel=1e-6)
            assert sum(int((weight == 0).sum()) for weight in weights) == z["zeros"][epoch]
    report = sparsifier.finalize()
    assert report.zeros == z["zeros"][-1]
    assert report.prunable == z["prunable"]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(probe), torch.from_numpy(z["logits"]), rtol=1e-6, atol=1e-8)
