"""Learned thresholds: ASL as published, and ASL+ with each of its choices."""

import copy
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import feather
from feather.frameworks.asl import ASL, gaussian, gaussian_ratio
from feather.frameworks.asl_plus import CROSSING, EXACT, ASLPlus, is_laplace, laplace, laplace_ratio
from feather.frameworks.learned import GRADIENTS, centre_, standard_deviation, threshold_gradient
from feather.schedule import Cubic
from tests.feather.reference import loop
from tests.processes import on_two_ranks

SIZES = [40 * 30, 30 * 40, 40 * 3]  # ASL leaves the last dense
GRID = [("feather", {}), ("feather", {"p": 2.5, "theta": 0.3}), ("gmp", {}), ("ste", {}), ("soft_ste", {})]


def build(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 3)).to(dtype)


def batches(count, size=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randn(size, n, generator=generator, dtype=torch.float64).to(dtype) for n in (40, 3))
        for _ in range(count)
    ]


def setup(method="feather", framework="asl_plus", options=None, *, seed=0, dtype=torch.float64, model=None, **kwargs):
    model = build(seed, dtype) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.01)
    kwargs = {"sparsity": 0.9, "total_steps": 20, **kwargs}
    return model, optimizer, feather.create(
        method, model, optimizer, framework=framework, framework_options=options, **kwargs
    )  # fmt: skip


def weights_of(model):
    return [layer.weight.detach().clone() for layer in model[::2]]


def dense_of(model, sparsifier):
    with sparsifier.dense():
        return weights_of(model)


def ratios_of(sparsifier):
    return sparsifier.method.framework.ratios


# ---- the formulas ---------------------------------------------------------------------------------------------------


class Normalised(torch.autograd.Function):
    """``P_1(u)`` of order p, with theta as the gradient of pruned values."""

    @staticmethod
    def forward(ctx, u, p, theta):
        ctx.theta, ctx.kept = theta, u.abs() > 1
        inside = u if math.isinf(p) else u.sign() * (u.abs() ** p - 1).clamp(min=0) ** (1 / p)
        return torch.where(ctx.kept, inside, 0)

    @staticmethod
    def backward(ctx, grad):
        return torch.where(ctx.kept, grad, ctx.theta * grad), None, None


@pytest.mark.parametrize("p", [1.0, 2.5, 3.0, math.inf])
@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_each_gradient_of_the_threshold_is_autograds_for_what_it_states(kind, p, theta):
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(20, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    threshold = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    # T * Q(w / T): the identity as gradient of Q but for "operator_masked", the hard Q for "hard"
    normalised = Normalised.apply(
        weight / threshold, math.inf if kind == "hard" else p, theta if kind == "operator_masked" else 1.0
    )
    (expected,) = torch.autograd.grad((threshold * normalised * grad).sum(), threshold)
    for arrived in (1.0, 0.3):
        seen = torch.where(weight.abs() > 0.7, grad, arrived * grad)
        found = threshold_gradient(kind, weight, seen, threshold.detach(), p=p, theta=theta, arrived=arrived)
        torch.testing.assert_close(found / 0.7, expected.detach())


@pytest.mark.parametrize(("model", "inverse"), [(gaussian, gaussian_ratio), (laplace, laplace_ratio)])
def test_the_modelled_sparsity_has_the_derivative_and_the_inverse_that_it_says(model, inverse):
    ratios = torch.linspace(0.01, 3, 50, dtype=torch.float64, requires_grad=True)
    sparsities, slopes = model(ratios)
    (expected,) = torch.autograd.grad(sparsities.sum(), ratios)
    torch.testing.assert_close(slopes, expected)
    torch.testing.assert_close(inverse(sparsities), ratios)


@pytest.mark.parametrize(
    ("law", "model", "heavy"),
    [(torch.distributions.Normal, gaussian, False), (torch.distributions.Laplace, laplace, True)],
)
def test_the_likelier_law_is_chosen_and_says_how_many_weights_a_threshold_prunes(law, model, heavy):
    torch.manual_seed(0)
    weight = law(0.0, 0.03).sample((200, 500))
    assert bool(is_laplace(weight)) is heavy
    for ratio in (0.3, 1.0, 2.0, 3.0):
        pruned = (weight.abs() <= ratio * standard_deviation(weight)).float().mean()
        assert float(pruned) == pytest.approx(float(model(torch.tensor(ratio))[0]), abs=3e-3)


def test_the_choice_flips_where_both_likelihoods_are_equal():
    def gap(mean_magnitude):  # of the mean log-likelihoods at standard deviation 1
        normal = -0.5 * math.log(2 * math.pi) - 0.5
        return -math.log(math.sqrt(2)) - math.sqrt(2) * mean_magnitude - normal

    assert gap(CROSSING - 1e-4) > 0 > gap(CROSSING + 1e-4)


@pytest.mark.parametrize("framework", [ASL, ASLPlus])
def test_the_budget_gradient_is_autograds(framework):
    learned = framework()
    learned.start(Cubic(0.9, 0, 10), 20)
    torch.manual_seed(0)
    weights = [torch.randn(40, 30), torch.distributions.Laplace(0.0, 1.0).sample((30, 40)), torch.randn(40, 30)]
    learned.update(weights, 3)
    learned.thresholds(weights, 0.7)
    learned.ratios = ratios = torch.tensor([0.2, 1.0, 2.5], requires_grad=True)
    sizes = torch.tensor([100, 400, 1500])
    nonzeros = (sizes * (1 - learned.modelled(ratios)[0])).sum() / sizes.sum()
    (expected,) = torch.autograd.grad(10 * (nonzeros - 0.3) ** 2, ratios)
    torch.testing.assert_close(learned.budget_gradient(sizes).detach(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_centring_a_centred_weight_keeps_its_bits(dtype):
    torch.manual_seed(0)
    for size, shift in itertools.product((2, 9, 300_001), (0.0, 0.01, 3.0)):
        weight = (torch.randn(size, dtype=torch.float64) + shift).to(dtype)
        centre_(weight)
        wide = weight.double()
        assert abs(float(wide.mean())) <= 10 * torch.finfo(dtype).eps * float(wide.std())
        before = weight.clone()
        centre_(weight)
        assert torch.equal(weight, before)


# ---- ASL ------------------------------------------------------------------------------------------------------------


class HardSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        return nn.functional.hardshrink(u, 1)

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_asl_trains_as_its_published_loop_does():
    """The paper's own layout: r in an optimizer group of its own, the budget loss in the loss, autograd for all."""
    model, optimizer, sparsifier = setup("ste", "asl", schedule="linear")
    plain = build()
    layers = [plain[0], plain[2]]
    first = math.sqrt(2) * float(torch.erfinv(torch.tensor(0.6 * 0.9, dtype=torch.float64)))
    ratios = [torch.tensor(first, dtype=torch.float64, requires_grad=True) for _ in layers]
    reference = torch.optim.SGD(
        [{"params": plain.parameters()}, {"params": ratios, "lr": 0.005, "weight_decay": 0}],
        lr=0.5, momentum=0.9, weight_decay=0.01,
    )  # fmt: skip

    def sparse():
        found = {}
        for name, layer, ratio in zip(("0.weight", "2.weight"), layers, ratios, strict=True):
            layer.weight.data -= layer.weight.data.mean()
            b = ratio.clamp(0, 5) * layer.weight.std().detach()
            found[name] = b * HardSTE.apply(layer.weight / b)
        return found

    for (x, y), mine in zip(batches(20), loop(model, optimizer, batches(20)), strict=True):
        reference.zero_grad()
        loss = nn.functional.mse_loss(torch.func.functional_call(plain, sparse(), (x,)), y)
        nonzeros = sum((1 - torch.erf(r / math.sqrt(2))) for r in ratios) / 2  # the layers have equal sizes
        (loss + 10 * (nonzeros - 0.1) ** 2).backward()
        reference.step()
        assert mine == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(ratios_of(sparsifier)[:2].double(), torch.stack(ratios).detach(), rtol=1e-5, atol=0)
    for weight, expected in zip(weights_of(model), sparse().values(), strict=False):
        assert torch.equal(weight == 0, expected == 0)


def test_asl_reports_what_it_reaches_and_leaves_small_layers_dense():
    model, optimizer, sparsifier = setup("feather", "asl")
    assert sparsifier.sparsity == 0.9  # active from the first step on
    start = sparsifier.report()
    assert [layer.sparsity for layer in start.layers] == pytest.approx([0.54, 0.54, 0], abs=0.2)
    loop(model, optimizer, batches(20))
    report = sparsifier.finalize()
    assert start.zeros < report.zeros < feather.zeros_at(0.9, sum(SIZES))
    assert [layer.threshold == 0 for layer in report.layers] == [False, False, True]
    assert report.layers[2].zeros == 0


# ---- ASL+ -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "kwargs"), GRID, ids=str)
@pytest.mark.parametrize("schedule", ["cubic", "one_shot"])
def test_asl_plus_ends_at_the_target_to_the_weight_at_every_point_of_the_grid(method, kwargs, schedule):
    for sparsity, dtype, gradient in ((0.5, torch.float64, "operator"), (0.98, torch.float32, "operator_masked")):
        for exact in EXACT:
            model, optimizer, sparsifier = setup(
                method, options={"gradient": gradient, "exact": exact}, schedule=schedule, sparsity=sparsity,
                dtype=dtype, total_steps=6, **kwargs,
            )  # fmt: skip
            loop(model, optimizer, batches(6, dtype=dtype))
            assert sparsifier.finalize().zeros == feather.zeros_at(sparsity, sum(SIZES))


def test_asl_plus_is_dense_until_pruning_starts_and_follows_the_schedule_from_there():
    model, optimizer, sparsifier = setup(start_step=3, end_step=12, sparsity=0.95)
    for step, batch in enumerate(batches(20)):
        zeros = sum(int((w == 0).sum()) for w in weights_of(model))
        assert zeros == feather.zeros_at(sparsifier.sparsity, sum(SIZES))
        assert (zeros == 0) is (step <= 3)  # the cubic ramp starts at 0
        if zeros:
            for weight in dense_of(model, sparsifier):
                assert abs(float(weight.mean())) < 1e-14
        loop(model, optimizer, [batch])
    thresholds = [layer.threshold for layer in sparsifier.finalize().layers]
    assert len(set(thresholds)) == 3


@pytest.mark.parametrize(("exact", "first"), [("always", 1), ("ramp", 10), ("end", 19)])
def test_the_common_factor_acts_from_where_exact_says(exact, first):
    model, optimizer, sparsifier = setup(options={"exact": exact}, sparsity=0.95)
    for step, batch in enumerate(batches(20)):
        zeros = sum(int((w == 0).sum()) for w in weights_of(model))
        if step > 0:
            assert (zeros == feather.zeros_at(sparsifier.sparsity, sum(SIZES))) is (step >= first)
        loop(model, optimizer, [batch])


def test_finalize_at_once_is_exact():
    for exact in EXACT:
        model, optimizer, sparsifier = setup(options={"exact": exact})
        loop(model, optimizer, batches(4))
        assert sparsifier.finalize(at_once=True).zeros == feather.zeros_at(0.9, sum(SIZES))


def test_a_layer_of_equal_weights_and_ratios_at_their_minimum_leave_the_target_reachable():
    model = build()
    nn.init.zeros_(model[4].weight)
    model, optimizer, sparsifier = setup(model=model, schedule="one_shot")
    loop(model, optimizer, batches(3))
    ratios_of(sparsifier)[0] = -1.0
    loop(model, optimizer, batches(3))
    report = sparsifier.finalize()
    assert report.zeros == feather.zeros_at(0.9, sum(SIZES))
    assert all(math.isfinite(layer.threshold) for layer in report.layers)


def test_the_model_of_a_layer_is_chosen_anew_every_hundredth_of_training():
    learned = ASLPlus()
    learned.start(Cubic(0.9, 0, 150), 300)
    torch.manual_seed(0)
    normal, heavy = torch.randn(100, 100), torch.distributions.Laplace(0.0, 1.0).sample((100, 100))
    chosen = []
    for step in range(7):
        learned.update([normal if step == 0 else heavy], step)
        chosen.append(bool(learned._laplace))
        if step == 0:
            first = learned.ratios.clone()
    assert chosen == [False] * 3 + [True] * 4
    assert torch.equal(learned.ratios, first)  # the threshold stays, the modelled sparsity does not


@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_step_of_feather_asl_plus_learns_from_the_whole_gradient_whatever_theta_does_to_the_weights(theta, gradient):
    model, optimizer, sparsifier = setup("feather", options={"gradient": gradient}, theta=theta, schedule="one_shot")
    before, plain = dense_of(model, sparsifier), copy.deepcopy(model)
    ratios, thresholds = ratios_of(sparsifier), sparsifier.method.thresholds()
    ((x, y),) = batches(1)
    nn.functional.mse_loss(plain(x), y).backward()
    loop(model, optimizer, [(x, y)])
    after = [w.clone() for w in sparsifier.state_dict()["dense"].values()]
    task = []
    for layer, old, new, threshold in zip(plain[::2], before, after, thresholds, strict=True):
        grad, pruned = layer.weight.grad, old.abs() <= threshold
        stepped = old - 0.5 * (torch.where(pruned, theta * grad, grad) + 0.01 * old)
        torch.testing.assert_close(new, stepped - stepped.mean())
        task.append(threshold_gradient(gradient, old, grad, threshold, p=3.0, theta=theta))
    sizes = torch.tensor(SIZES, dtype=torch.float64)
    is_heavy, r = sparsifier.method.framework._laplace, ratios.double()
    s = torch.where(is_heavy, laplace(r)[0], gaussian(r)[0])
    slope = torch.where(is_heavy, laplace(r)[1], gaussian(r)[1])
    budget = 20 * ((sizes / sizes.sum() * (1 - s)).sum() - 0.1) * -(sizes / sizes.sum()) * slope
    expected = r - 0.005 * (torch.stack(task) / r + budget)
    torch.testing.assert_close(ratios_of(sparsifier).double(), expected, rtol=1e-5, atol=1e-7)


# ---- in every loop --------------------------------------------------------------------------------------------------

CASES = [("feather", "asl_plus", {"exact": e}, {"theta": t}) for e, t in (("always", 0.5), ("ramp", 0.0), ("end", 1.0))]
CASES += [("ste", "asl", {}, {}), ("gmp", "asl", {}, {})]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("order", ["model first", "sparsifier first"])
@pytest.mark.parametrize("steps", [1, 13])
def test_resuming_gives_the_same_bits(tmp_path, case, order, steps):
    method, framework, options, kwargs = case
    model, optimizer, sparsifier = setup(method, framework, options, dtype=torch.float32, **kwargs)
    data = batches(20, dtype=torch.float32)
    loop(model, optimizer, data[:steps])
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sparsifier": sparsifier.state_dict()}
    torch.save(state, tmp_path / "checkpoint.pt")
    losses = loop(model, optimizer, data[steps:])

    resumed, resumed_optimizer, resumed_sparsifier = setup(
        method, framework, options, seed=7, dtype=torch.float32, **kwargs
    )
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    if order == "model first":
        resumed.load_state_dict(state["model"])
        resumed_sparsifier.load_state_dict(state["sparsifier"])
    else:
        resumed_sparsifier.load_state_dict(state["sparsifier"])
        resumed.load_state_dict(state["model"])
    resumed_optimizer.load_state_dict(state["optimizer"])
    assert loop(resumed, resumed_optimizer, data[steps:]) == losses
    assert all(map(torch.equal, weights_of(resumed), weights_of(model)))
    assert torch.equal(ratios_of(resumed_sparsifier), ratios_of(sparsifier))


def test_a_state_of_another_gradient_is_refused():
    _, _, sparsifier = setup()
    _, _, other = setup(options={"gradient": "operator"})
    with pytest.raises(ValueError, match="settings"):
        other.load_state_dict(sparsifier.state_dict())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_apply_to_prunes_an_average_and_changes_nothing_of_the_training(case):
    method, framework, options, kwargs = case
    runs = []
    for averaged in (False, True):
        model, optimizer, sparsifier = setup(method, framework, options, **kwargs)
        average = torch.optim.swa_utils.AveragedModel(model)
        for batch in batches(20):
            loop(model, optimizer, [batch])
            if averaged:
                with sparsifier.dense():
                    average.update_parameters(model)
                sparse = copy.deepcopy(average)
                sparsifier.apply_to(sparse)
                if framework == "asl_plus" and options["exact"] == "always":
                    zeros = sum(int((w == 0).sum()) for w in weights_of(sparse.module))
                    assert zeros == feather.zeros_at(sparsifier.sparsity, sum(SIZES))
        runs.append((weights_of(model), ratios_of(sparsifier)))
    assert all(map(torch.equal, runs[0][0], runs[1][0]))
    assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("theta", [0.0, 0.5])
def test_a_closure_and_accumulated_gradients_learn_what_the_plain_loop_learns(theta):
    plain, optimizer, plain_sparsifier = setup(theta=theta)
    loop(plain, optimizer, batches(20))

    model, optimizer, sparsifier = setup(theta=theta)
    for x, y in batches(20):

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)  # fmt: skip
    assert torch.equal(ratios_of(sparsifier), ratios_of(plain_sparsifier))
    assert all(map(torch.equal, weights_of(model), weights_of(plain)))

    model, optimizer, sparsifier = setup(theta=theta)
    for x, y in batches(20):
        optimizer.zero_grad()
        for part in range(2):
            (nn.functional.mse_loss(model(x.chunk(2)[part]), y.chunk(2)[part]) / 2).backward()
        optimizer.step()
    torch.testing.assert_close(ratios_of(sparsifier), ratios_of(plain_sparsifier))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_teaches_nothing(fused):
    model = build(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, fused=fused)
    sparsifier = feather.create(
        "feather", model, optimizer, framework="asl_plus", sparsity=0.9, total_steps=20, schedule="one_shot"
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step, (x, y) in enumerate(batches(4, dtype=torch.float32)):
        before, ratios = weights_of(model), ratios_of(sparsifier).clone()
        optimizer.zero_grad()
        scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
        if step == 2:
            model[0].weight.grad[0, 0] = math.inf
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(ratios, ratios_of(sparsifier)) is (step == 2)
        assert all(map(torch.equal, before, weights_of(model))) is (step == 2)
    assert sparsifier.step == 3


def test_a_frozen_layer_takes_part_without_a_gradient():
    model = build()
    model[2].weight.requires_grad_(False)
    model, optimizer, sparsifier = setup(model=model)
    loop(model, optimizer, batches(20))
    assert sparsifier.finalize().zeros == feather.zeros_at(0.9, sum(SIZES))


# ---- who may use them -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", ["asl", "asl_plus"])
def test_methods_that_do_not_threshold_at_will_refuse_learned_thresholds(framework):
    allowed = {"feather", "gmp", "ste", "soft_ste"}
    for method in set(feather.methods()) - allowed - {"dense"}:
        with pytest.raises(ValueError, match=f"framework='{framework}' does not go with method='{method}'"):
            setup(method, framework)


@pytest.mark.parametrize(
    ("framework", "options", "message"),
    [
        ("asl_plus", {"gradiant": "hard"}, "'gradiant' is out of range: .* framework='asl_plus': gradient, exact"),
        ("asl_plus", {"gradient": "soft"}, "'soft' is out of range: it must be one of operator_masked, operator, hard"),
        ("asl", {"gradient": "hard"}, "'gradient' is out of range: .* framework='asl': none"),
        ("global", {"exact": "end"}, "'exact' is out of range: .* framework='global': selection"),
    ],
)
def test_an_option_that_the_framework_lacks_is_refused(framework, options, message):
    with pytest.raises(ValueError, match=f"framework_options.*{message}"):
        setup("feather", framework, options)


# ---- two processes --------------------------------------------------------------------------------------------------


PARALLEL = [CASES[0], CASES[1], CASES[3]]


def train_rank(rank, case):
    method, framework, options, kwargs = case
    model = DistributedDataParallel(build(seed=rank))
    model.module, optimizer, sparsifier = setup(method, framework, options, model=model.module, **kwargs)
    loop(model, optimizer, [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in batches(8)], clip=0.5)
    return {"ratios": ratios_of(sparsifier), "dense": dense_of(model.module, sparsifier)}


def worker(rank, directory):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/rendezvous", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found = [train_rank(rank, case) for case in PARALLEL]
    torch.save(found, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_learn_the_same_thresholds_without_communication_and_those_of_one_process(tmp_path):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without gloo")
    on_two_ranks(worker, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for case, first, second in zip(PARALLEL, *ranks, strict=True):
        assert torch.equal(first["ratios"], second["ratios"])
        assert all(map(torch.equal, first["dense"], second["dense"]))
        method, framework, options, kwargs = case
        model, optimizer, sparsifier = setup(method, framework, options, **kwargs)
        loop(model, optimizer, batches(8), clip=0.5)
        torch.testing.assert_close(first["ratios"], ratios_of(sparsifier), rtol=1e-5, atol=1e-7)
