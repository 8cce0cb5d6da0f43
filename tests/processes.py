"""Processes forked from a server that has imported what takes seconds to import."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]

_PRELOADED = [
    "torch", "torch._dynamo", "torchvision", "sklearn.datasets", "safetensors.torch", "wandb", "tests.train_helpers",
    "train", "engine.captured", "engine.data", "engine.distributed", "engine.evaluate", "engine.outcome",
    "engine.progress", "engine.tracking", "models",
]  # fmt: skip


def forkserver() -> ForkServerContext:
    """Starts processes; its first one starts the server, with the surroundings of that moment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def on_two_ranks(worker: Callable[..., None], *arguments: Any) -> None:
    """``worker(rank, *arguments)`` in two processes; an error of theirs is raised here."""
    forkserver()
    with mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT)}):
        torch.multiprocessing.start_processes(worker, arguments, nprocs=2, start_method="forkserver")
