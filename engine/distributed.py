"""One process or many (``torchrun``): who am I, and the few collectives the loop needs.

Every collective here returns its input unchanged when there is only one process.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from engine.allocation import keep_freed_memory
from engine.config import ConfigError

T = TypeVar("T")

# what Gloo and NCCL say when a peer is gone or silent
_PEER_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out|socket", re.IGNORECASE)


@dataclass(frozen=True)
class Ranks:
    """This process among all: ``rank`` in [0, world_size), ``local_rank`` on this machine, and the device it uses."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files."""
        return self.rank == 0


def init(device: str = "auto", timeout_minutes: float = 10.0) -> Ranks:
    """Prepare the process: choose the device; under ``torchrun``, join the group (NCCL on CUDA, Gloo on the CPU).

    Args:
        device: ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.
        timeout_minutes: how long a collective waits for the other processes before it fails.

    Raises:
        ValueError: an unknown device, CUDA asked for but not there, or more processes than GPUs on this machine.
    """
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = _choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    else:
        keep_freed_memory()
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            timeout=timedelta(minutes=timeout_minutes),
            device_id=chosen if chosen.type == "cuda" else None,
        )
    return Ranks(rank, world_size, local_rank, chosen)


@contextmanager
def session(device: str = "auto", timeout_minutes: float = 10.0) -> Iterator[Ranks]:
    """``init``, and leave the process group at the end, also after an error.

    Raises:
        ConfigError: another process has died or does not answer.
    """
    ranks = init(device, timeout_minutes)
    try:
        yield ranks
    except RuntimeError as error:
        if ranks.world_size == 1 or not _PEER_LOST.search(str(error)):
            raise
        raise ConfigError(
            f"Process {ranks.rank} of {ranks.world_size} ends because another one has ended or does not answer: the "
            "other's message says why; the same command goes on from the last checkpoint."
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of ``tensor`` over all processes, in place; any shape, equal in all of them."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def broadcast_object(value: T) -> T:
    """The main process's ``value``, a small picklable object, in every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def share_buffers(model: torch.nn.Module) -> None:
    """Give every process the main process's buffers, which are those that are saved.

    DistributedDataParallel does so before a forward pass alone: after the last step of an epoch each process still has
    BatchNorm statistics of its own.
    """
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def barrier() -> None:
    """Wait until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def _choose_device(device: str, local_rank: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"trainer.device={device} is unknown: choose auto, cpu or cuda")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "trainer.device=cuda asks for a CUDA GPU, but torch finds none here: use trainer.device=cpu or auto"
        )
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"torchrun started more processes on this machine than it has GPUs ({count}): "
            f"use --nproc-per-node={count} or trainer.device=cpu"
        )
    return torch.device("cuda", local_rank)


def gather_objects(value: T) -> list[T]:
    """Every process's ``value``, a small picklable object, in the order of ranks, in every process."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def main_first(ranks: Ranks) -> Iterator[None]:
    """The main process does the work inside alone, the others follow: for downloads that all of them then read."""
    if not ranks.is_main and not broadcast_object(False):
        raise RuntimeError("The main process could not prepare what all processes need.")
    done = False
    try:
        yield
        done = True
    finally:
        if ranks.is_main:
            broadcast_object(done)


def meet_at(step: int, directory: object) -> None:
    """Wait for every process, and refuse to go on where their checkpoints differ: machines that share no directory.

    Raises:
        ConfigError: in every process, where ``step`` differs between them.
    """
    steps = gather_objects(step)
    other = next((rank for rank, found in enumerate(steps) if found != steps[0]), None)
    if other is not None:
        raise ConfigError(
            f"Process 0 found a checkpoint of step {steps[0]} in {directory} and process {other} one of step "
            f"{steps[other]}: put run_dir on storage that all machines share, or copy the newest checkpoint to each."
        )
