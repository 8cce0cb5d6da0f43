"""Properties that hold for all inputs: of the operator, its gradient, schedules, distributions and reports."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import feather
from feather import zeros_at
from feather.distribution import erdos_renyi_kernel, uniform
from feather.operator import p_threshold, scale_pruned_gradient
from feather.report import sparsity_report
from feather.schedule import SCHEDULES

FINITE = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
WEIGHTS = st.lists(FINITE, min_size=1, max_size=30).map(torch.tensor)
THRESHOLDS = st.floats(0, 1e4, width=32, allow_subnormal=False).map(torch.tensor)
ORDERS = st.sampled_from([1.0, 1.5, 2.0, 3.0, 4.0, 15.0, math.inf])


@given(WEIGHTS, THRESHOLDS, ORDERS)
def test_the_operator_shrinks_keeps_signs_and_prunes_up_to_the_threshold(
    weights: torch.Tensor, threshold: torch.Tensor, p: float
) -> None:
    found = p_threshold(weights, threshold, p)
    assert found.isfinite().all()
    assert ((found == 0) | (found.sign() == weights.sign())).all()
    assert (found.abs() <= weights.abs() * (1 + 1e-5)).all()
    if threshold > 0:
        assert (found[weights.abs() <= threshold] == 0).all()
    clearly = weights.abs() > threshold * 1.01 + 1e-30
    assert (found[clearly] != 0).all()
    assert torch.equal(p_threshold(-weights, threshold, p), -found)  # odd


@given(WEIGHTS, THRESHOLDS, st.sampled_from([1.0, 2.0, 3.0]))
def test_a_greater_weight_stays_greater(weights: torch.Tensor, threshold: torch.Tensor, p: float) -> None:
    ordered = weights.sort().values
    found = p_threshold(ordered, threshold, p)
    assert (found.diff() >= -1e-5 * ordered.abs().max().clamp(min=1)).all()


@given(WEIGHTS, st.floats(0, 1))
def test_the_gradient_rule_scales_where_a_weight_is_zero_and_nowhere_else(weights: torch.Tensor, theta: float) -> None:
    gradient = torch.linspace(-2, 3, len(weights))
    found = scale_pruned_gradient(gradient.clone(), weights, theta)
    expected = torch.where(weights == 0, gradient * theta, gradient)
    torch.testing.assert_close(found, expected)


@given(st.sampled_from(["cubic", "linear", "one_shot"]), st.floats(0, 0.999), st.integers(0, 200), st.integers(0, 200))
def test_a_schedule_rises_from_nothing_to_its_target(name: str, target: float, start: int, length: int) -> None:
    schedule = SCHEDULES[name](target, start, start if name == "one_shot" else start + length)
    values = [schedule(step) for step in range(start + length + 3)]
    assert all(0 <= value <= target for value in values)
    assert all(before <= after + 1e-12 for before, after in itertools.pairwise(values))
    assert values[-1] == target
    assert all(value == 0 for value in values[:start])


@given(st.lists(st.tuples(*[st.integers(1, 40)] * 4), min_size=1, max_size=6), st.floats(0, 0.99))
def test_a_distribution_spends_the_budget(shapes: list[tuple[int, ...]], sparsity: float) -> None:
    sizes = [math.prod(shape) for shape in shapes]
    assert uniform(shapes, sparsity) == [sparsity] * len(shapes)
    found = erdos_renyi_kernel(shapes, sparsity)
    assert all(-1e-9 <= value <= 1 for value in found)
    zeros = sum(value * size for value, size in zip(found, sizes, strict=True))
    assert math.isclose(zeros, sparsity * sum(sizes), rel_tol=1e-6, abs_tol=1e-6)


@given(st.lists(WEIGHTS, min_size=1, max_size=4), st.floats(0, 1))
def test_a_report_counts_what_is_there(tensors: list[torch.Tensor], share: float) -> None:
    for tensor in tensors:
        tensor[: int(share * len(tensor))] = 0
    report = sparsity_report({str(index): tensor for index, tensor in enumerate(tensors)}, None)
    together = torch.cat(tensors)
    assert report.prunable == len(together)
    assert report.zeros == int((together == 0).sum()) == report.prunable - report.nonzeros
    assert report.sparsity == report.zeros / report.prunable
    assert sum(layer.zeros for layer in report.layers) == report.zeros


@given(st.integers(1, 60), st.integers(1, 60), st.floats(1e-6, 0.99), st.sampled_from(["global", "uniform", "erk"]))
def test_training_ends_at_the_target(inputs: int, outputs: int, sparsity: float, framework: str) -> None:
    assume(inputs * outputs > 1)
    torch.manual_seed(0)
    model = nn.Linear(inputs, outputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.create("feather", model, optimizer, sparsity=sparsity, total_steps=2, framework=framework)
    for _ in range(2):
        model(torch.ones(1, inputs)).sum().backward()
        optimizer.step()
    exact = zeros_at(sparsity, inputs * outputs)
    assert abs(sparsifier.finalize().zeros - exact) <= (framework == "erk")  # whose layers are rounded
