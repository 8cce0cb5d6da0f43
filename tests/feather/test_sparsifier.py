"""The mechanism: what the model holds at any moment, what a step does, and every way to get it wrong."""

import copy
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import feather
from feather.flat import pack
from tests.feather import reference
from tests.feather.reference import loop, make_batches, make_model

ROOT = Path(__file__).parents[2]
NAMES = ["0.weight", "2.weight", "4.weight"]
SIZE = 6 * 16 + 16 * 8 + 8 * 3


def setup(
    method="feather", *, sparsity=0.9, total_steps=10, seed=0, dtype=torch.float64, optimizer=None, model=None, **kw
):
    model = make_model(seed, dtype) if model is None else model
    make = optimizer or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01))
    optimizer = make(model.parameters())
    return model, optimizer, feather.create(
        method, model, optimizer, sparsity=sparsity, total_steps=total_steps, **kw
    )  # fmt: skip


def zeros(model, names=NAMES):
    weights = dict(model.named_parameters())
    return sum(int((weights[name] == 0).sum()) for name in names)


def dense_of(model, sparsifier):
    with sparsifier.dense():
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# ---- against the reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0])
def test_trajectory_equals_the_straightforward_implementation(p, theta):
    """Momentum and weight decay act on dense weights, theta comes before clipping, biases stay dense."""
    batches = make_batches(12)
    model, optimizer, sparsifier = setup(p=p, theta=theta, total_steps=12, end_step=8)
    losses = loop(model, optimizer, batches, clip=0.5)
    other = make_model()
    expected, final = reference.train(
        other, torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01), batches,
        feather.Cubic(0.9, 0, 8), NAMES, p, theta, clip=0.5,
    )  # fmt: skip
    assert losses == pytest.approx(expected, rel=1e-9)
    for name, weight in dense_of(model, sparsifier).items():
        torch.testing.assert_close(weight, dict(other.named_parameters())[name].detach(), rtol=1e-9, atol=1e-12)
    assert sparsifier.finalize().zeros == feather.zeros_at(0.9, SIZE)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), final[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", ["gmp", "ste", "soft_ste"])
def test_named_methods_are_points_of_the_grid(method):
    p, theta = {"gmp": (math.inf, 0), "ste": (math.inf, 1), "soft_ste": (1, 1)}[method]
    runs = []
    for settings in ({"method": method}, {"method": "feather", "p": p, "theta": theta}):
        model, optimizer, _ = setup(**settings)
        loop(model, optimizer, make_batches(10))
        runs.append(snapshot(model))
    assert_same(*runs)


def test_dense_run_equals_plain_training_bit_for_bit():
    batches = make_batches(6)
    for method in ("dense", "feather"):
        model, optimizer, sparsifier = setup(method, sparsity=0, total_steps=6)
        plain = make_model()
        plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        assert loop(model, optimizer, batches) == loop(plain, plain_optimizer, batches)
        assert_same(snapshot(model), snapshot(plain))
        assert sparsifier.finalize().zeros == 0


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [0.0, 0.3, 0.5, 1.0])
def test_gradient_of_pruned_weights_is_theta_times_the_plain_one_before_clipping(theta):
    model, _, _ = setup(theta=theta, schedule="one_shot")
    plain = copy.deepcopy(model)
    (x, y), = make_batches(1)  # fmt: skip
    for m in (model, plain):
        nn.functional.mse_loss(m(x), y).backward()
    for name, weight in model.named_parameters():
        grad = dict(plain.named_parameters())[name].grad
        pruned = (weight == 0) & (name in NAMES)
        assert torch.equal(weight.grad, torch.where(pruned, grad * theta, grad))
    assert zeros(model) > 0


def test_theta_zero_leaves_pruned_weights_where_they_are():
    model, optimizer, sparsifier = setup(
        "gmp", sparsity=0.5, schedule="one_shot", optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
    )
    before, pruned = dense_of(model, sparsifier), {n: p == 0 for n, p in model.named_parameters()}
    loop(model, optimizer, make_batches(1))
    for name, after in dense_of(model, sparsifier).items():
        assert torch.equal(after[pruned[name]], before[name][pruned[name]])
        assert not torch.equal(after, before[name])


def test_weight_decay_acts_in_full_on_pruned_dense_weights():
    model, optimizer, sparsifier = setup(
        "gmp", schedule="one_shot", optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5)
    )
    before, pruned = dense_of(model, sparsifier), {n: model.get_parameter(n) == 0 for n in NAMES}
    loop(model, optimizer, make_batches(1))
    after = dense_of(model, sparsifier)
    for name in NAMES:
        torch.testing.assert_close(after[name][pruned[name]], before[name][pruned[name]] * (1 - 0.1 * 0.5))


def test_a_weight_is_followed_to_another_layout_once_and_one_with_gaps_never(monkeypatch):
    model = make_model()
    model[0].weight = nn.Parameter(torch.randn(16, 12, dtype=torch.float64)[:, ::2])
    _, optimizer, sparsifier = setup(model=model)
    followed = []
    monkeypatch.setattr("feather.sparsifier.pack", lambda weights: followed.append(1) or pack(weights))
    for step, (x, y) in enumerate(make_batches(6)):
        if step == 3:
            model[0].weight.data = model[0].weight.data.contiguous()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        assert len(followed) == (step >= 3)
    assert sparsifier.step == 6
    assert dense_of(model, sparsifier)["0.weight"].all()


def test_a_weight_unfrozen_later_gets_the_gradient_rule_from_its_first_gradient():
    model = make_model()
    model[2].weight.requires_grad_(False)
    model, optimizer, _ = setup(model=model, theta=0.25, schedule="one_shot")
    assert not model[2].weight.requires_grad
    loop(model, optimizer, make_batches(2))
    assert model[2].weight.grad is None
    model[2].weight.requires_grad_(True)
    plain = copy.deepcopy(model)
    (x, y), = make_batches(1)  # fmt: skip
    for m in (model, plain):
        m.zero_grad()
        nn.functional.mse_loss(m(x), y).backward()
    pruned = model[2].weight == 0
    assert pruned.any()
    assert torch.equal(model[2].weight.grad[pruned], 0.25 * plain[2].weight.grad[pruned])


def test_a_frozen_weight_is_pruned_and_its_dense_weight_kept():
    model = make_model()
    model[2].weight.requires_grad_(False)
    before = model[2].weight.clone()
    model, optimizer, sparsifier = setup(model=model)
    loop(model, optimizer, make_batches(10))
    assert torch.equal(dense_of(model, sparsifier)["2.weight"], before)
    assert (model[2].weight == 0).any()
    assert sparsifier.finalize().zeros == feather.zeros_at(0.9, SIZE)


# ---- the target -----------------------------------------------------------------------------------------------------


def convolutional():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(self.attention(x, x, x)[0].mean(1))


class TiedLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.a(x).tanh()).tanh())


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.volume, self.line = nn.ConvTranspose2d(1, 2, 3), nn.Conv3d(2, 2, 1), nn.Conv1d(2, 3, 1)

    def forward(self, x):
        x = self.volume(self.up(x)[:, :, None])
        return self.line(x.flatten(2)).mean(2)


FAMILIES = {
    "convolutional": (convolutional, lambda: torch.randn(5, 1, 4, 4), {}),
    "attention": (Attention, lambda: torch.randint(0, 11, (5, 6)), {}),
    "embedding": (Attention, lambda: torch.randint(0, 11, (5, 6)), {"include": ["*", "embed.weight"]}),
    "tied": (TiedLayers, lambda: torch.randn(5, 8), {}),
    "transposed": (Transposed, lambda: torch.randn(5, 1, 4, 4), {}),
}


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98])
@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_are_exact_after_finalize_and_the_optimizer_trains_every_weight(family, sparsity):
    torch.manual_seed(0)
    make, batch, kwargs = FAMILIES[family]
    model = make()
    initial = snapshot(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.create("feather", model, optimizer, sparsity=sparsity, total_steps=6, **kwargs)
    for _ in range(6):
        optimizer.zero_grad()
        model(batch()).square().mean().backward()
        optimizer.step()
    with sparsifier.dense():
        for name, weight in model.named_parameters():
            assert not torch.equal(weight, initial[name]) or weight.grad.abs().max() < 1e-6, f"{name} was not trained"
    report = sparsifier.finalize()
    weights = feather.prunable_parameters(model, **kwargs).values()
    size = sum(w.numel() for w in weights)
    assert sum(int((w == 0).sum()) for w in weights) == report.zeros == feather.zeros_at(sparsity, size)
    assert all(p.ndim > 1 or not (p == 0).all() or n.endswith("bias") for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [1, 3, math.inf])
def test_half_precision_weights_reach_the_target_up_to_ties(dtype, p):
    model, optimizer, sparsifier = setup(dtype=dtype, p=p, optimizer=lambda q: torch.optim.SGD(q, lr=0.01))
    loop(model, optimizer, make_batches(10, dtype=dtype))
    report = sparsifier.finalize()  # raises unless equal magnitudes explain every zero too many
    assert feather.zeros_at(0.9, SIZE) <= report.zeros <= feather.zeros_at(0.9, SIZE) + 8


def test_every_forward_has_the_schedules_sparsity():
    model, optimizer, sparsifier = setup(total_steps=10)
    schedule = feather.Cubic(0.9, 0, 5)
    for step, batch in enumerate(make_batches(10)):
        assert zeros(model) == feather.zeros_at(schedule(step), SIZE)
        assert sparsifier.sparsity == schedule(step)
        loop(model, optimizer, [batch])


def test_a_schedule_that_starts_at_its_target_prunes_the_first_forward():
    model, _, sparsifier = setup(schedule="one_shot")
    assert zeros(model) == feather.zeros_at(0.9, SIZE)
    assert sparsifier.step == 0


def test_finalize_before_the_target_is_refused_and_at_once_prunes_the_rest():
    model, optimizer, sparsifier = setup(total_steps=10)
    loop(model, optimizer, make_batches(3))
    with pytest.raises(RuntimeError, match=r"stands at sparsity 0\.\d+ of 0\.9 after 3 of 10 optimizer steps"):
        sparsifier.finalize()
    loop(model, optimizer, make_batches(1))  # the refusal changed nothing
    assert sparsifier.finalize(at_once=True).zeros == feather.zeros_at(0.9, SIZE) == zeros(model)


@pytest.mark.parametrize("reached", [0.8, 0.95])
def test_a_missed_target_raises(reached):
    model, optimizer, sparsifier = setup()
    loop(model, optimizer, make_batches(10))
    framework = sparsifier.method.framework
    framework.thresholds = lambda weights, s: [feather.magnitude_quantile(weights, reached)] * len(weights)
    sparsifier._update()
    zeros = feather.zeros_at(reached, SIZE)
    with pytest.raises(RuntimeError, match=f"{zeros} of 248 weights are zero where sparsity=0.9 asks for 223"):
        sparsifier.finalize()


def test_ties_at_the_threshold_are_no_missed_target():
    model = nn.Linear(10, 10, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.5)
        model.weight[0] = 1.0
    _, _, sparsifier = setup(model=model, sparsity=0.5, schedule="one_shot")
    assert sparsifier.finalize().zeros == 90


def test_ties_in_one_layer_are_no_missed_target_where_every_layer_has_its_threshold():
    model = make_model()
    with torch.no_grad():
        order = model[2].weight.abs().flatten().argsort()
        model[2].weight.view(-1)[order[64]] = model[2].weight.view(-1)[
            order[63]
        ]  # the first kept equals the last pruned
    _, _, sparsifier = setup(model=model, sparsity=0.5, schedule="one_shot", framework="uniform")
    expected = sum(
        feather.zeros_at(0.5, weight.numel()) for weight in (model[0].weight, model[2].weight, model[4].weight)
    )
    assert sparsifier.finalize().zeros == expected + 1


@pytest.mark.parametrize("sparsity", [0.0, 0.3])
def test_weights_that_start_at_zero_are_no_missed_target(sparsity):
    model = make_model()
    nn.init.zeros_(model[2].weight)  # 128 of 248
    _, _, sparsifier = setup(model=model, sparsity=sparsity, schedule="one_shot")
    assert sparsifier.finalize().zeros == 128


def test_steps_beyond_the_total_warn_once_and_keep_the_target():
    model, optimizer, sparsifier = setup(total_steps=4)
    loop(model, optimizer, make_batches(4))
    with pytest.warns(UserWarning, match="total_steps=4 optimizer steps are done") as record:
        loop(model, optimizer, make_batches(5))
    assert len(record) == 1
    assert sparsifier.finalize().zeros == zeros(model) == feather.zeros_at(0.9, SIZE)


def test_after_finalize_nothing_is_left_on_model_and_optimizer():
    for end in ("finalize", "remove"):
        model, optimizer, sparsifier = setup(schedule="one_shot", theta=0.5)
        getattr(sparsifier, end)()
        before = snapshot(model)
        plain = make_model()
        plain.load_state_dict(before)
        plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        batches = make_batches(2)
        assert loop(model, optimizer, batches) == loop(plain, plain_optimizer, batches)
        assert_same(snapshot(model), snapshot(plain))
        assert not any(m._load_state_dict_post_hooks or m._load_state_dict_pre_hooks for m in model.modules())


def test_report_masks_and_mask_change():
    model, optimizer, sparsifier = setup(sparsity=0.5, schedule="one_shot")
    report = sparsifier.report()
    assert [layer.name for layer in report.layers] == NAMES
    assert [layer.zeros for layer in report.layers] == [zeros(model, [name]) for name in NAMES]
    threshold = report.layers[0].threshold
    dense = dense_of(model, sparsifier)
    assert sum(int((dense[name].abs() <= threshold).sum()) for name in NAMES) == report.zeros
    masks = sparsifier.masks()
    assert sparsifier.mask_change(masks) == 0
    loop(model, optimizer, make_batches(5))
    expected = sum(int(((model.get_parameter(n) != 0) != m).sum()) for n, m in zip(NAMES, masks, strict=True)) / SIZE
    assert sparsifier.mask_change(masks) == expected > 0


# ---- the model from outside -----------------------------------------------------------------------------------------


def test_state_dict_of_the_model_has_its_own_keys_and_is_sparse_at_any_moment():
    model, optimizer, sparsifier = setup(schedule="one_shot")
    keys = list(make_model().state_dict())
    for batch in make_batches(3):
        state = model.state_dict()
        assert list(state) == keys
        assert sum(int((state[n] == 0).sum()) for n in NAMES) == feather.zeros_at(0.9, SIZE)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
        assert zeros(model) == feather.zeros_at(0.9, SIZE)
        optimizer.step()
    assert type(model[0]) is nn.Linear
    sparsifier.finalize()
    assert list(model.state_dict()) == keys


def test_whole_model_pickle_loads_where_feather_is_not_installed(tmp_path):
    model, optimizer, _ = setup(model=nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).double(), theta=0.5)
    loop(model, optimizer, make_batches(2))
    torch.save(model, tmp_path / "model.pt")
    script = f"""
import sys
sys.modules["feather"] = None  # makes `import feather` fail
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
model(torch.ones(1, 6, dtype=torch.float64)).sum().backward()
model.load_state_dict(model.state_dict())
torch.save(model, {str(tmp_path / "again.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, timeout=120)
    again = torch.load(tmp_path / "again.pt", weights_only=False)
    assert_same(snapshot(again), snapshot(model))


def test_weights_changed_from_outside_are_refused_by_name_with_the_way_out():
    model, optimizer, sparsifier = setup(schedule="one_shot")
    with torch.no_grad():
        model[2].weight.clamp_(-0.01, 0.01)
    for call in (sparsifier.finalize, sparsifier.state_dict, lambda: loop(model, optimizer, make_batches(1))):
        with pytest.raises(RuntimeError, match=r"weight '2.weight' was changed from outside.*sparsifier.dense\(\)"):
            call()


def test_a_loop_that_writes_through_data_is_refused_at_its_second_step():
    """``parameter.data`` moves no version counter, so the values are compared now and then."""
    model, optimizer, _ = setup(schedule="one_shot")
    loop(model, optimizer, make_batches(1))
    model[0].weight.data.clamp_(-0.01, 0.01)
    with pytest.raises(RuntimeError, match=r"weight '0.weight' was changed from outside"):
        loop(model, optimizer, make_batches(1))


def test_a_write_that_changes_nothing_is_accepted():
    model, optimizer, sparsifier = setup(schedule="one_shot")
    with torch.no_grad():
        model[0].weight.mul_(1.0)
    loop(model, optimizer, make_batches(1))
    assert sparsifier.step == 1


def test_before_pruning_starts_weights_may_change():
    """Nothing is pruned yet, so what the model holds are the dense weights."""
    model, optimizer, sparsifier = setup(start_step=3)
    loop(model, optimizer, make_batches(1))
    with torch.no_grad():
        model[0].weight.fill_(0.123)
    assert (dense_of(model, sparsifier)["0.weight"] == 0.123).all()
    optimizer.param_groups[0].update(lr=0.0)
    loop(model, optimizer, make_batches(1))
    assert (model[0].weight == 0.123).all()


# ---- load_state_dict ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["whole", "submodule", "leaf"])
@pytest.mark.parametrize("schedule", ["one_shot", "cubic"])
def test_weights_loaded_after_create_are_taken_as_dense(part, schedule):
    model = nn.Sequential(make_model(), nn.Linear(3, 3).double())
    model, _, sparsifier = setup(model=model, schedule=schedule)
    other = nn.Sequential(make_model(seed=5), nn.Linear(3, 3).double())
    target, source = {
        "whole": (model, other), "submodule": (model[0], other[0]), "leaf": (model[0][2], other[0][2])
    }[part]  # fmt: skip
    kept = dense_of(model, sparsifier)
    target.load_state_dict(source.state_dict())
    names = {id(p): n for n, p in model.named_parameters()}
    expected = {
        **kept,
        **{names[id(p)]: q.detach() for p, q in zip(target.parameters(), source.parameters(), strict=True)},
    }
    assert_same(dense_of(model, sparsifier), expected)
    weights = feather.prunable_parameters(model).values()
    pruned = sum(int((w == 0).sum()) for w in weights)
    assert pruned == (feather.zeros_at(0.9, SIZE + 9) if schedule == "one_shot" else 0)


def test_loading_computes_the_thresholds_once(monkeypatch):
    model, _, sparsifier = setup(schedule="one_shot")
    calls = []
    update = sparsifier.method.update
    monkeypatch.setattr(sparsifier.method, "update", lambda *args: (calls.append(1), update(*args)))
    model.load_state_dict(make_model(seed=5).state_dict())
    assert len(calls) == 1


def test_loading_after_a_strict_error_still_works():
    model, _, sparsifier = setup(schedule="one_shot")
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**make_model(seed=4).state_dict(), "extra": torch.zeros(1)})
    other = make_model(seed=5)
    model.load_state_dict(other.state_dict())
    assert_same(dense_of(model, sparsifier), snapshot(other))


def test_loading_another_type_follows():
    model, _, sparsifier = setup(schedule="one_shot")
    model.float()
    other = make_model(seed=5, dtype=torch.float32)
    model.load_state_dict(other.state_dict())
    assert_same(dense_of(model, sparsifier), snapshot(other))
    assert sparsifier.finalize().zeros == feather.zeros_at(0.9, SIZE)


def test_assign_is_refused():
    model, _, _ = setup()
    with pytest.raises(RuntimeError, match=r"load_state_dict\(assign=True\) replaced the Parameter '0.weight'"):
        model.load_state_dict(make_model(seed=5).state_dict(), assign=True)


@pytest.mark.parametrize("settings", [
    {"p": 3, "theta": 0.5}, {"p": 1, "theta": 1.0, "schedule": "linear"}, {"p": math.inf, "theta": 0.0},
    {"p": 2.5, "theta": 0.3, "schedule": "one_shot"}, {"start_step": 8, "end_step": 11},
])  # fmt: skip
@pytest.mark.parametrize("order", ["model first", "sparsifier first", "no model"])
def test_resume_in_mid_schedule_is_bitwise(tmp_path, settings, order):
    batches = make_batches(12)
    model, optimizer, sparsifier = setup(total_steps=12, **settings)
    loop(model, optimizer, batches[:5])
    with torch.no_grad():
        biases = {n: p.clone() for n, p in model.named_parameters() if "bias" in n}
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sparsifier": sparsifier.state_dict()}
    torch.save(state, tmp_path / "checkpoint.pt")
    losses = loop(model, optimizer, batches[5:])
    sparsifier.finalize()

    resumed, resumed_optimizer, resumed_sparsifier = setup(total_steps=12, seed=7, **settings)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    if order == "model first":
        resumed.load_state_dict(state["model"])
        resumed_sparsifier.load_state_dict(state["sparsifier"])
    else:
        resumed_sparsifier.load_state_dict(state["sparsifier"])
        if order == "no model":
            resumed.load_state_dict(biases, strict=False)
        else:
            resumed.load_state_dict(state["model"])
    resumed_optimizer.load_state_dict(state["optimizer"])
    assert_same(snapshot(resumed), state["model"])
    assert loop(resumed, resumed_optimizer, batches[5:]) == losses
    resumed_sparsifier.finalize()
    assert_same(snapshot(resumed), snapshot(model))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"p": 2}, "settings"), ({"theta": 0.1}, "settings"), ({"sparsity": 0.8}, "settings"),
        ({"end_step": 3}, "settings"), ({"schedule": "linear"}, "settings"), ({"total_steps": 11}, "total_steps=10"),
        ({"exclude": ["4"]}, "other prunable weights"),
    ],
)  # fmt: skip
def test_a_state_of_other_settings_is_refused_and_changes_nothing(changed, message):
    model, optimizer, sparsifier = setup(theta=0.5, end_step=5)
    loop(model, optimizer, make_batches(2))
    other, _, other_sparsifier = setup(**{"theta": 0.5, "end_step": 5, "seed": 3, **changed})
    before = snapshot(other)
    with pytest.raises(ValueError, match=message):
        other_sparsifier.load_state_dict(sparsifier.state_dict())
    assert_same(snapshot(other), before)
    assert other_sparsifier.step == 0


def test_state_dict_after_finalize_is_refused():
    _, _, sparsifier = setup(schedule="one_shot")
    sparsifier.finalize()
    for call in (sparsifier.state_dict, lambda: sparsifier.load_state_dict({})):
        with pytest.raises(RuntimeError, match=r"after finalize\(\): the sparsifier has let go of the model"):
            call()
    assert sparsifier.finalize().zeros == feather.zeros_at(0.9, SIZE)  # again is harmless


# ---- model.to(...) --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before the first step", "in mid-schedule"])
def test_model_to_another_type_is_followed(when):
    model, optimizer, sparsifier = setup(theta=0.5, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    if when == "in mid-schedule":
        loop(model, optimizer, make_batches(3))
    dense = dense_of(model, sparsifier)
    model.float()
    assert_same(dense_of(model, sparsifier), {n: w.float() for n, w in dense.items()})
    loop(model, optimizer, make_batches(7 if when == "in mid-schedule" else 10, dtype=torch.float32))
    plain = copy.deepcopy(model)
    x, y = make_batches(1, dtype=torch.float32)[0]
    for m in (model, plain):
        m.zero_grad()
        nn.functional.mse_loss(m(x), y).backward()
    pruned = model[0].weight == 0
    assert torch.equal(model[0].weight.grad[pruned], 0.5 * plain[0].weight.grad[pruned])  # the gradient rule came along
    assert sparsifier.finalize().zeros == feather.zeros_at(0.9, SIZE)


def test_model_to_channels_last_is_followed():
    torch.manual_seed(0)
    runs = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).double()
        model, optimizer, sparsifier = setup(model=model, schedule="one_shot")
        model.to(memory_format=layout)
        for seed in range(3):
            optimizer.zero_grad()
            x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            model(x).square().mean().backward()
            optimizer.step()
        assert model[0].weight.is_contiguous(memory_format=layout)
        assert all(d.stride() == p.stride() for d, p in zip(sparsifier._dense, sparsifier._parameters, strict=True))
        sparsifier.finalize()
        runs.append(snapshot(model))
    for name in runs[0]:
        torch.testing.assert_close(runs[0][name], runs[1][name], rtol=1e-10, atol=1e-13)


# ---- non-finite weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_weight_ends_the_very_step_with_its_name(value):
    model, optimizer, sparsifier = setup(schedule="one_shot")
    loop(model, optimizer, make_batches(2))
    optimizer.zero_grad()
    x, y = make_batches(1)[0]
    nn.functional.mse_loss(model(x), y).backward()
    model[2].weight.grad[1, 3] = value
    with pytest.raises(
        FloatingPointError, match=r"weight '2.weight' holds a NaN or an infinity after 3 optimizer steps"
    ):
        optimizer.step()
    assert not model[2].weight[1, 3].isfinite()  # it did not become a pruned weight
    for call in (sparsifier.state_dict, sparsifier.finalize):
        with pytest.raises(FloatingPointError, match=r"2\.weight"):
            call()


def test_a_non_finite_weight_at_create_is_refused_and_leaves_nothing_behind():
    model = make_model()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError, match=r"weight '0.weight' holds a NaN"):
        feather.create("feather", model, optimizer, sparsity=0.5, total_steps=2)
    nn.init.ones_(model[0].weight)
    feather.create("feather", model, optimizer, sparsity=0.5, total_steps=2)


# ---- dense() --------------------------------------------------------------------------------------------------------


def test_dense_shows_the_dense_weights_and_gives_the_sparse_ones_back_bit_for_bit():
    model, optimizer, sparsifier = setup(schedule="one_shot")
    loop(model, optimizer, make_batches(2))
    before = snapshot(model)
    with sparsifier.dense():
        assert zeros(model) == 0
        with sparsifier.dense():  # nested
            assert zeros(model) == 0
        assert zeros(model) == 0
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("how", ["in place", "data", "data replaced", "load_state_dict"])
def test_a_change_inside_dense_is_a_change_of_the_dense_weights(how):
    model, optimizer, sparsifier = setup(schedule="one_shot")
    new = torch.randn(8, 16, dtype=torch.float64)
    with sparsifier.dense():
        if how == "in place":
            with torch.no_grad():
                model[2].weight.copy_(new)
        elif how == "data":
            model[2].weight.data.copy_(new)
        elif how == "data replaced":
            model[2].weight.data = new.clone()
        else:
            model[2].load_state_dict({"weight": new, "bias": torch.zeros(8)})
    assert torch.equal(dense_of(model, sparsifier)["2.weight"], new)
    assert zeros(model) == feather.zeros_at(0.9, SIZE)
    loop(model, optimizer, make_batches(1))


def test_an_exception_inside_dense_leaves_the_sparse_weights():
    model, _, sparsifier = setup(schedule="one_shot")
    before = snapshot(model)
    with pytest.raises(KeyError), sparsifier.dense():
        raise KeyError
    assert_same(snapshot(model), before)


def test_inside_dense_a_step_a_checkpoint_and_the_end_are_refused():
    model, optimizer, sparsifier = setup(schedule="one_shot")
    state = sparsifier.state_dict()
    with sparsifier.dense():
        for call in (
            lambda: loop(model, optimizer, make_batches(1)), lambda: sparsifier.load_state_dict(state),
            sparsifier.state_dict, sparsifier.finalize, sparsifier.remove,
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match=r"leave `with sparsifier.dense\(\):` first"):
                call()
    loop(model, optimizer, make_batches(1))
    assert sparsifier.step == 1


# ---- optimizer steps of another kind --------------------------------------------------------------------------------


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("name", ["SGD", "LBFGS"])
def test_closures_see_sparse_weights(name, keyword):
    model = make_model()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
    sparsifier = feather.create("feather", model, optimizer, sparsity=0.9, total_steps=4, schedule="one_shot")
    losses = []
    for x, y in make_batches(1) * 4:

        def closure(x=x, y=y):
            # thresholds stand still inside one step, so a trial's count may move; dense weights have no zero at all
            assert zeros(model) > 0
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        losses.append((optimizer.step(closure=closure) if keyword else optimizer.step(closure)).item())
        assert zeros(model) == feather.zeros_at(0.9, SIZE)
    assert name == "LBFGS" or losses[-1] < losses[0]
    assert sparsifier.step == 4


def test_sgd_with_a_closure_equals_the_plain_loop():
    batches = make_batches(5)
    runs = []
    for closures in (False, True):
        model, optimizer, _ = setup(total_steps=5, theta=0.5)
        if closures:
            for x, y in batches:

                def closure(x=x, y=y, model=model, optimizer=optimizer):
                    optimizer.zero_grad()
                    loss = nn.functional.mse_loss(model(x), y)
                    loss.backward()
                    return loss

                optimizer.step(closure)
        else:
            loop(model, optimizer, batches)
        runs.append(snapshot(model))
    assert_same(*runs)


class Wrapping(torch.optim.SGD):
    """``step`` and the ``step`` of the base class both run the hooks once a plain SGD exists."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.mul_(1 - 1e-3)
        return loss


def test_an_optimizer_that_calls_the_step_of_its_base_class_counts_once():
    class Flat(torch.optim.SGD):
        pass

    def shrink(optimizer, args, kwargs):
        with torch.no_grad():
            for p in optimizer.param_groups[0]["params"]:
                p.mul_(1 - 1e-3)

    runs = []
    for kind in (Flat, Wrapping):
        make = lambda p, kind=kind: kind(p, lr=0.1)  # noqa: E731
        model = make_model()
        optimizer = make(model.parameters())
        if kind is Flat:
            optimizer.register_step_post_hook(shrink)
        sparsifier = feather.create("feather", model, optimizer, sparsity=0.9, total_steps=8, theta=0.5)
        losses = loop(model, optimizer, make_batches(8))
        assert sparsifier.step == 8
        runs.append((losses, snapshot(model)))
        assert sparsifier.finalize().zeros == feather.zeros_at(0.9, SIZE)
    assert runs[0][0] == runs[1][0]
    assert_same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("start_step", [0, 9])
@pytest.mark.parametrize("make", [torch.optim.SGD, Wrapping])
def test_a_step_that_raises_half_way_does_not_break_the_next(make, start_step):
    model, optimizer, sparsifier = setup(optimizer=lambda p: make(p, lr=0.1), start_step=start_step, end_step=9)
    loop(model, optimizer, make_batches(2))

    def fail(*_):
        with torch.no_grad():
            model[0].weight.mul_(2.0)  # the update got this far
        raise OSError("out of luck")

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(OSError, match="out of luck"):
        loop(model, optimizer, make_batches(1))
    handle.remove()
    loop(model, optimizer, make_batches(8))
    assert sparsifier.step == 10
    assert sparsifier.finalize().zeros == feather.zeros_at(0.9, SIZE)


def test_no_warning_in_an_ordinary_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer, sparsifier = setup(theta=0.5)
        loop(model, optimizer, make_batches(10))
        copy.deepcopy(model)
        sparsifier.finalize()


def test_a_dense_run_keeps_no_copy_but_its_checkpoint_follows_the_model():
    model, optimizer, sparsifier = setup("dense", sparsity=0)
    assert all(d.data_ptr() == p.data_ptr() for d, p in zip(sparsifier._dense, sparsifier._parameters, strict=True))
    model.float()
    loop(model, optimizer, make_batches(2, dtype=torch.float32))
    state = sparsifier.state_dict()
    assert all(torch.equal(state["dense"][name], model.get_parameter(name)) for name in NAMES)
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"0\.weight"):
        sparsifier.finalize()
