"""scripts/bench_gpu.py without a GPU: what it times are training steps, recorded ones too."""

import pytest
import torch

from scripts import bench_gpu
from tests.graph_recorder import GraphRecorder

CPU = torch.device("cpu")


def test_its_recorded_steps_are_its_ordinary_ones_and_prune():
    recorder = GraphRecorder()
    runs = [bench_gpu.Run("resnet20", True, CPU, how, total_steps=12, shape=(4, 8)) for how in (recorder, None)]
    for run in runs:
        run.warm_up()
        for _ in range(3):
            run()
    assert recorder.graphs == 1
    assert recorder.replays >= 3
    captured, eager = runs
    assert captured.sparsifier.step == eager.sparsifier.step == captured.taken
    assert captured.sparsifier.report().zeros == eager.sparsifier.report().zeros > 0


def test_the_dense_run_prunes_nothing():
    run = bench_gpu.Run("resnet20", False, CPU, GraphRecorder(), shape=(4, 8))
    run.warm_up()
    assert run.sparsifier.report().zeros == 0


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_gpu.main([])
    assert "this needs a CUDA GPU" in capsys.readouterr().err
