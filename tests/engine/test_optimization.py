"""Parameter groups and the learning rate as a function of the step."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engine.config import LRScheduleConfig, OptimizerConfig
from engine.optimization import create_optimizer, learning_rate
from models import create_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "trace_resnet20_s0.90.npz"
COSINE = LRScheduleConfig(name="cosine")


def rates(cfg: LRScheduleConfig, total: int = 40, per_epoch: int = 10, lr: float = 0.1) -> list[float]:
    return [learning_rate(step, total, per_epoch, lr, cfg) for step in range(total)]


def test_the_authors_lag_gives_the_learning_rates_of_their_trace() -> None:
    trace = np.load(GOLDEN)
    expected = trace["lr"].tolist()
    lagging = rates(LRScheduleConfig(name="cosine", authors_lag=True), total=len(expected), lr=expected[0])
    assert lagging == pytest.approx(expected, rel=1e-9)
    assert json.loads(str(trace["config"]))
    prompt = rates(COSINE, total=len(expected), lr=expected[0])
    assert prompt[:-1] == pytest.approx(expected[1:], rel=1e-9)


def test_cosine_falls_from_the_full_rate_to_0() -> None:
    found = rates(COSINE)
    assert found[0] == 0.1
    assert found[20] == pytest.approx(0.05)
    assert found == sorted(found, reverse=True)
    assert learning_rate(40, 40, 10, 0.1, COSINE) == pytest.approx(0, abs=1e-12)


def test_warm_up_rises_in_equal_steps_to_the_full_rate() -> None:
    found = rates(LRScheduleConfig(name="cosine", warmup_epochs=0.5))
    assert found[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert found[5] == pytest.approx(0.1)
    assert found[5:] == sorted(found[5:], reverse=True)
    assert found[5 + 7] == pytest.approx(0.05 * (1 + math.cos(math.pi * 7 / 35)))


def test_warm_up_longer_than_the_run_never_exceeds_the_full_rate() -> None:
    found = rates(LRScheduleConfig(name="cosine", warmup_epochs=100))
    assert found == sorted(found)
    assert found[-1] == pytest.approx(0.1)


def test_constant_stays() -> None:
    assert set(rates(LRScheduleConfig(name="constant"))) == {0.1}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_biases_and_norms_have_no_weight_decay(name: str) -> None:
    model = create_model("resnet20", num_classes=10, width=4)
    optimizer = create_optimizer(model, OptimizerConfig(name=name, lr=0.1, weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            free = key == "bias" or isinstance(module, nn.BatchNorm2d)
            assert decay[id(parameter)] == (0.0 if free else 0.3)


def test_frozen_parameters_are_left_out_and_settings_arrive() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, bias=False))
    model[0].requires_grad_(False)
    optimizer = create_optimizer(model, OptimizerConfig(name="sgd", lr=0.3, momentum=0.7, nesterov=True))
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert group["params"] == [model[1].weight]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.3, 0.7, True)
