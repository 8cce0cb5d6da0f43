"""Two processes on gloo: thresholds and weights stay equal without any communication of ours."""

import itertools
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import feather
from tests.feather.reference import loop, make_batches, make_model
from tests.processes import on_two_ranks

NAMES = ["0.weight", "2.weight", "4.weight"]
SIZE = 6 * 16 + 16 * 8 + 8 * 3
STEPS = 6
ORDERS = ["create before DDP", "create after DDP"]
SEEDS = ["equal seeds", "different seeds"]
VARIANTS = {"plain": {}, "static_graph": {"static_graph": True}, "bucket_view": {"gradient_as_bucket_view": True}}
CASES = [*itertools.product(ORDERS, SEEDS, ["plain"]), *itertools.product(ORDERS, SEEDS[:1], list(VARIANTS)[1:])]


def train(rank, order, seeds, variant):
    model = make_model(seed=rank if seeds == "different seeds" else 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)

    def create(m):
        return feather.create("feather", m, optimizer, sparsity=0.9, total_steps=STEPS, theta=0.5)

    if order == "create before DDP":
        sparsifier = create(model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=False, **VARIANTS[variant])
    if order == "create after DDP":
        sparsifier = create(wrapped)
    losses = loop(wrapped, optimizer, [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in make_batches(STEPS)], clip=0.5)
    state = sparsifier.state_dict()
    thresholds = sparsifier.method.thresholds()
    zeros = sparsifier.finalize().zeros
    return {
        "losses": losses,
        "thresholds": thresholds,
        "dense": state["dense"],
        "model": model.state_dict(),
        "zeros": zeros,
    }


def load_into_wrapped(rank):
    """``load_state_dict`` after create, through the wrapper."""
    wrapped = DistributedDataParallel(make_model())
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    sparsifier = feather.create("feather", wrapped, optimizer, sparsity=0.9, total_steps=4, schedule="one_shot")
    wrapped.load_state_dict({f"module.{name}": w for name, w in make_model(seed=5).state_dict().items()})
    return sparsifier.state_dict()["dense"]


def refusal_of_a_pruned_start_before_ddp(rank):
    """DDP's broadcast overwrites the other ranks' sparse weights with rank 0's: that is said, not lost."""
    model = make_model(seed=rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    feather.create("feather", model, optimizer, sparsity=0.9, total_steps=4, schedule="one_shot")
    wrapped = DistributedDataParallel(model)
    try:
        loop(wrapped, optimizer, make_batches(1))
    except RuntimeError as error:
        return str(error)
    return "accepted"


def traffic(rank, method):
    """Every collective of some training steps, with the shapes that it moves."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = DistributedDataParallel(model)
    feather.create(method, wrapped, optimizer, sparsity=0.9 if method != "dense" else 0.0, total_steps=STEPS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        loop(wrapped, optimizer, [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in make_batches(STEPS)])
    return sorted(str((e.name, e.input_shapes)) for e in profile.events() if e.name.startswith(("gloo:", "c10d::")))


def refusal_of_sharded_weights():
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(make_model(), mesh=dist.init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        feather.create("feather", model, optimizer, sparsity=0.9, total_steps=4)
    except ValueError as error:
        return str(error)
    return "accepted"


def worker(rank, directory):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/rendezvous", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    results = {case: train(rank, *case) for case in CASES}
    results["load"] = load_into_wrapped(rank)
    results["refusal"] = refusal_of_a_pruned_start_before_ddp(rank)
    results["traffic"] = {method: traffic(rank, method) for method in ("dense", "feather")}
    results["sharded"] = refusal_of_sharded_weights()
    torch.save(results, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without gloo")
    directory = tmp_path_factory.mktemp("ddp")
    on_two_ranks(worker, str(directory))
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(case))
def test_ranks_agree_bitwise_and_follow_one_process(ranks, case):
    first, second = (rank[case] for rank in ranks)
    assert all(map(torch.equal, first["thresholds"], second["thresholds"]))
    for kind in ("dense", "model"):
        assert first[kind].keys() == second[kind].keys()
        assert all(torch.equal(first[kind][name], second[kind][name]) for name in first[kind])
    assert first["zeros"] == second["zeros"] == feather.zeros_at(0.9, SIZE)

    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    sparsifier = feather.create("feather", model, optimizer, sparsity=0.9, total_steps=STEPS, theta=0.5)
    losses = loop(model, optimizer, make_batches(STEPS), clip=0.5)
    mean = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert mean == pytest.approx(losses, rel=1e-9)
    sparsifier.finalize()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(first["model"][name], weight, rtol=1e-7, atol=1e-9)


def test_weights_loaded_into_the_wrapped_model_are_taken_as_dense(ranks):
    expected = make_model(seed=5)
    for rank in ranks:
        assert list(rank["load"]) == NAMES
        assert all(torch.equal(rank["load"][name], expected.get_parameter(name)) for name in NAMES)


def test_a_pruned_start_before_ddp_with_different_seeds_is_refused_on_the_rank_that_lost_its_weights(ranks):
    assert ranks[0]["refusal"] == "accepted"
    assert "was changed from outside" in ranks[1]["refusal"]
    assert "create the sparsifier after initialising, loading and wrapping the model" in ranks[1]["refusal"]


def test_data_parallel_and_nested_wrappers_train_the_inner_model():
    model = nn.DataParallel(torch.compile(make_model(), backend="eager"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.create("feather", model, optimizer, sparsity=0.9, total_steps=4)
    loop(model, optimizer, make_batches(4))
    assert [layer.name for layer in sparsifier.finalize().layers] == NAMES


def test_thresholds_are_equal_without_any_traffic_beyond_that_of_dense_training(ranks):
    for rank in ranks:
        assert len(rank["traffic"]["dense"]) >= STEPS
        assert rank["traffic"]["feather"] == rank["traffic"]["dense"]


def test_sharded_weights_are_refused_in_every_process(ranks):
    for rank in ranks:
        assert re.fullmatch("The weight .* is sharded over processes .* use DistributedDataParallel.*", rank["sharded"])
