import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import distributed

WORKER = """
import json, os, sys, torch
from engine import distributed
results = []
for _ in range(2):  # twice in one process, as the jobs of a sweep
    with distributed.session("cpu") as ranks:
        total = distributed.all_reduce_sum(torch.tensor([ranks.rank + 1.0, 10.0]))
        word = distributed.broadcast_object({"from": ranks.rank})
        distributed.barrier()
        distributed.meet_at(4, "run")
        try:
            distributed.meet_at(4 * ranks.rank, "run")
        except distributed.ConfigError as error:
            told = str(error)
        results.append([told, ranks.rank, ranks.world_size, ranks.is_main, str(ranks.device), total.tolist(), word])
    assert not torch.distributed.is_initialized()
open(os.path.join(sys.argv[1], os.environ["RANK"]), "w").write(json.dumps(results))
"""


def test_two_processes_agree(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).resolve().parents[2])
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": root}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)], env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    for rank in range(2):
        told = (
            "Process 0 found a checkpoint of step 0 in run and process 1 one of step 4: put run_dir on storage "
            "that all machines share, or copy the newest checkpoint to each."
        )
        expected = [told, rank, 2, rank == 0, "cpu", [3.0, 20.0], {"from": 0}]
        assert json.loads((tmp_path / str(rank)).read_text()) == [expected, expected]


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with distributed.session("cpu") as ranks:
        assert ranks == distributed.Ranks(0, 1, 0, torch.device("cpu"))
        assert ranks.is_main
        assert not torch.distributed.is_initialized()
        assert distributed.all_reduce_sum(torch.tensor(2.0)).item() == 2.0
        assert distributed.broadcast_object("a") == "a"
        distributed.barrier()


def test_cuda_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="trainer.device=cuda asks for a CUDA GPU, but torch finds none here"):
        distributed.init("cuda")
    assert distributed.init("auto").device.type == "cpu"


def test_more_processes_than_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="--nproc-per-node=1"):
        distributed.init("cuda")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="trainer.device=tpu is unknown: choose auto, cpu or cuda"):
        distributed.init("tpu")
