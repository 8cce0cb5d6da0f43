"""scripts/bench_gpu.py as far as it can be tested without a GPU: its captured step prunes what it should, and no host
decision hides in the device-side quantile."""

import pytest
import torch
from torch import nn

import feather
from scripts import bench_gpu


@pytest.mark.parametrize("rank", [0, 1, 500, 999])
def test_the_quantile_of_a_rank_that_is_a_tensor(rank):
    magnitudes = torch.cat([torch.rand(990, generator=torch.Generator().manual_seed(0)), torch.zeros(10)])
    found = bench_gpu.quantile_of_rank(magnitudes, torch.tensor(rank))
    assert torch.equal(found, magnitudes.sort().values[rank])


def test_the_host_reads_nothing():
    """A meta tensor has no values: reading one raises."""
    found = bench_gpu.quantile_of_rank(torch.empty(100, device="meta"), torch.empty((), device="meta"))
    assert found.device.type == "meta"


def test_the_step_follows_the_sparsity_that_it_is_given():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    step = bench_gpu.CapturedStep(model, torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]), sparse=True, theta=0.5)
    for sparsity in (0.3, 0.9):
        step.set_sparsity(sparsity)
        before = [w.clone() for w in step.dense]
        step()
        assert sum(int((p == 0).sum()) for p in step.prunable) == feather.zeros_at(sparsity, step.size)
        assert not any(map(torch.equal, before, step.dense))


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_gpu.main([])
    assert "this needs a CUDA GPU" in capsys.readouterr().err
