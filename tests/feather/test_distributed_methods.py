"""Two processes on gloo, every method, with and without HAM: equal weights on both, and those of one process."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import feather
from tests.feather.reference import loop, make_batches, make_model
from tests.processes import on_two_ranks

STEPS = 20
METHODS = [method for method in feather.methods() if method != "dense"]
CASES = [*((method, "none") for method in METHODS), ("dense", "ham"), ("feather", "ham"), ("rigl", "ham")]


def begin(model, method, modifier):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    sparsity = 0 if method == "dense" else 0.7
    sparsifier = feather.create(method, model, optimizer, sparsity=sparsity, total_steps=STEPS, modifier=modifier)
    return optimizer, sparsifier


def train(rank, method, modifier):
    model = make_model()
    wrapped = DistributedDataParallel(model)
    optimizer, sparsifier = begin(wrapped, method, modifier)
    loop(wrapped, optimizer, [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in make_batches(STEPS)], clip=0.5)
    state = sparsifier.state_dict()
    zeros = sparsifier.finalize().zeros
    return {"dense": state["dense"], "model": model.state_dict(), "own": state["method"], "zeros": zeros}


def worker(rank, directory):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/rendezvous", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.save({case: train(rank, *case) for case in CASES}, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without gloo")
    directory = tmp_path_factory.mktemp("ddp")
    on_two_ranks(worker, str(directory))
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(2)]


def equal(first, second):
    """Bit for bit, through dicts and lists."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_ranks_agree_bitwise_and_follow_one_process(ranks, case):
    first, second = (rank[case] for rank in ranks)
    assert equal(first, second)

    model = make_model()
    optimizer, sparsifier = begin(model, *case)
    loop(model, optimizer, make_batches(STEPS), clip=0.5)
    assert sparsifier.finalize().zeros == first["zeros"]
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(first["model"][name], weight, rtol=1e-6, atol=1e-9)
