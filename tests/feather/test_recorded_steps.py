"""A sparsifier whose steps are recorded once and replayed, as a CUDA graph would be."""

import math

import pytest
import torch
from torch.nn import functional as F

import feather
from feather.operator import p_threshold_all, p_threshold_unread
from tests.feather.reference import make_batches, make_model
from tests.graph_recorder import GraphRecorder, ReadWhileRecording

STEPS = 40


def trained(method="feather", *, replayed, steps=STEPS, **options):
    """A model after ``steps`` steps, with its sparsifier and the number of replays."""
    model = make_model(0, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1), momentum=0.9, fused=True)
    sparsifier = feather.create(method, model, optimizer, total_steps=STEPS, **options)
    recorder, replays = GraphRecorder(), {}
    inputs, targets = make_batches(1, dtype=torch.float32)[0]
    if replayed:
        sparsifier.make_recordable()

    def step():
        optimizer.zero_grad(set_to_none=True)
        F.mse_loss(model(inputs), targets).backward()
        optimizer.step()

    for batch, (x, y) in enumerate(make_batches(steps, dtype=torch.float32)):
        inputs.copy_(x)
        targets.copy_(y)
        optimizer.param_groups[0]["lr"].fill_(0.1 * (1 - batch / STEPS))
        kind = sparsifier.sparsity > 0
        if not replayed or batch in {0, 1, 15} or not sparsifier.steady:  # one of another shape may come between
            step()
            continue
        if kind not in replays:
            with sparsifier.recording():
                replays[kind], _ = recorder.record(step)
        sparsifier.advance()
        replays[kind]()
    return model, sparsifier, recorder


CASES = {
    "feather": {"sparsity": 0.98},
    "theta": {"sparsity": 0.9, "theta": 0.3},
    "late": {"sparsity": 0.9, "start_step": 10, "end_step": 30},
    "gmp": {"method": "gmp", "sparsity": 0.9},
    "soft_ste": {"method": "soft_ste", "sparsity": 0.9},
    "counting": {"sparsity": 0.95, "framework_options": {"selection": "counting"}},
    "dense": {"method": "dense", "sparsity": 0.0},
}


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_train_the_network_that_ordinary_ones_train(case):
    options = CASES[case]
    model, sparsifier, recorder = trained(replayed=True, **options)
    expected, plain, _ = trained(replayed=False, **options)
    assert recorder.replays >= STEPS - 5
    assert recorder.graphs == (2 if case == "late" else 1)
    assert sparsifier.step == plain.step
    assert sparsifier.sparsity == plain.sparsity
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        assert torch.equal(ours == 0, theirs == 0)
    assert sparsifier.finalize().zeros == plain.finalize().zeros


def test_report_and_state_are_of_the_replayed_step_and_go_on_in_an_ordinary_run():
    model, sparsifier, _ = trained(replayed=True, steps=25, sparsity=0.9)
    expected, plain, _ = trained(replayed=False, steps=25, sparsity=0.9)
    assert sparsifier.report().zeros == plain.report().zeros
    for ours, theirs in zip(sparsifier.method.thresholds(), plain.method.thresholds(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    plain.load_state_dict(sparsifier.state_dict())
    assert torch.equal(model[0].weight, expected[0].weight)


def test_a_recorded_step_is_not_taken():
    model = make_model(0, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1), fused=True)
    sparsifier = feather.create("feather", model, optimizer, sparsity=0.9, total_steps=STEPS)
    sparsifier.make_recordable()
    x, y = make_batches(1, dtype=torch.float32)[0]

    def step():
        optimizer.zero_grad(set_to_none=True)
        F.mse_loss(model(x), y).backward()
        optimizer.step()

    step()
    before, taken = [p.detach().clone() for p in model.parameters()], sparsifier.step
    with sparsifier.recording():
        GraphRecorder().record(step)
    assert all(map(torch.equal, model.parameters(), before))
    assert sparsifier.step == taken


def test_an_ordinary_sparsifier_asks_for_values_that_a_recorded_step_has_not_yet():
    """The recorder of these tests would find out a step that waits for the device."""
    model = make_model(0, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1), fused=True)
    feather.create("feather", model, optimizer, sparsity=0.9, total_steps=STEPS)
    x, y = make_batches(1, dtype=torch.float32)[0]

    def step():
        F.mse_loss(model(x), y).backward()
        optimizer.step()

    step()
    with pytest.raises(ReadWhileRecording):
        GraphRecorder().record(step)


def test_a_weight_changed_from_outside_is_found_before_the_replay():
    model, sparsifier, _ = trained(replayed=True, steps=25, sparsity=0.9)
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match=r"0\.weight.*changed from outside"):
        sparsifier.advance()


def test_steady_ends_where_pruning_begins():
    _, sparsifier, _ = trained(replayed=False, steps=0, sparsity=0.9, start_step=5, end_step=30)
    told = []
    for step in range(8):
        sparsifier.step = step
        told.append(sparsifier.steady)
    assert told == [True, True, True, True, True, False, True, True]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "rigl"}, "RigL"),
        ({"method": "st3"}, "ST3"),
        ({"method": "feather", "framework": "asl_plus"}, "ASLPlus"),
        ({"method": "feather", "framework": "erk"}, "ERK"),
        ({"method": "feather", "modifier": "ham"}, "HAM"),
    ],
)
def test_what_decides_on_the_host_cannot_be_recorded_and_says_so(options, words):
    model = make_model(0, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = dict(options)
    sparsifier = feather.create(options.pop("method"), model, optimizer, sparsity=0.9, total_steps=STEPS, **options)
    with pytest.raises(ValueError, match=words):
        sparsifier.make_recordable()


@pytest.mark.parametrize("sparsity", [1e-9, 1 / 3, 0.9, 1 - 1e-6, math.nextafter(1, 0)])
@pytest.mark.parametrize("algorithm", ["auto", "sort", "counting"])
@pytest.mark.parametrize("size", [1, 2, 100_001])
def test_a_sparsity_that_the_host_does_not_read_gives_the_same_bits(size, sparsity, algorithm):
    weights = [torch.randn(size, generator=torch.Generator().manual_seed(0))]
    on_device = torch.tensor(sparsity, dtype=torch.float64)
    found = feather.magnitude_quantile(weights, on_device, algorithm=algorithm)
    assert torch.equal(found, feather.magnitude_quantile(weights, sparsity))


@pytest.mark.parametrize("p", [1.0, 3.0, 4.5, math.inf])
@pytest.mark.parametrize("packed", [False, True])
def test_the_operator_that_reads_nothing_equals_the_one_that_does(p, packed, monkeypatch):
    monkeypatch.setattr("feather.operator._LAUNCH", 1000)
    shapes = [(16, 8, 3, 3), (50, 40), (7,), (20, 20)]
    weights = [torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes)]
    weights[0] = weights[0].contiguous(memory_format=torch.channels_last)
    if packed:
        weights = feather.flat.pack(weights)
    one, zero = torch.tensor(1.2), torch.tensor(0.0)
    thresholds = [one, one, zero, torch.tensor(0.4)]
    found = p_threshold_unread(weights, thresholds, p)
    for ours, theirs in zip(found, p_threshold_all(weights, thresholds, p), strict=True):
        assert ours.stride() == theirs.stride()
        assert torch.equal(ours == 0, theirs == 0)
        torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=0)
