"""Whole training steps as CUDA graphs: recorded once, replayed without Python or launches between their kernels.

Networks for 32x32 images have kernels of a few microseconds, less than it takes to launch them one by one. In a graph
every number of the host is frozen, so that what changes from step to step is a tensor: the batch, the learning rate,
the scheduled sparsity. What the host has to decide, it decides between two replays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from engine.distributed import Ranks
from engine.numerics import flagged
from engine.precision import Precision
from engine.step import TrainingStep
from feather.sparsifier import Sparsifier

WARM_UP = 3  # ordinary steps before one of their kind is recorded: libraries choose algorithms, buffers come to be

Result = TypeVar("Result")


class Recorder(Protocol):
    """Makes graphs of what a function does on a device."""

    def ordinary(self) -> AbstractContextManager[None]:
        """Where steps that are not replayed have to run."""

    def record(self, function: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """What replays ``function``, which has not run yet, and the tensors in which it leaves its result."""


class CudaRecorder:
    """CUDA graphs, which share one pool of memory. Everything runs on one stream, as autograd remembers streams."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def ordinary(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, function: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        graph = torch.cuda.CUDAGraph()
        # other threads, of data and logging, may allocate meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = function()
        return graph.replay, result


def recorder(ranks: Ranks, precision: Precision) -> Recorder:
    """What records steps on this process's device.

    Raises:
        ValueError: nothing can.
    """
    if ranks.device.type != "cuda":
        raise ValueError(f"trainer.capture=true records CUDA graphs, and the device is {ranks.device}: leave it out.")
    if ranks.world_size > 1:
        raise ValueError("trainer.capture=true records the steps of a single process: leave it out of torchrun's.")
    if precision.name == "fp16":
        raise ValueError("trainer.capture=true cannot scale a loss, as fp16 needs it: use trainer.precision=bf16.")
    return CudaRecorder(ranks.device)


@dataclass(frozen=True)
class _Recorded:
    replay: Callable[[], None]
    images: Tensor
    labels: Tensor
    losses: Tensor
    names: list[str]
    norms: Tensor


class CapturedStep:
    """``TrainingStep`` replayed from graphs, one for each shape of batch and for pruning and not pruning.

    Loss and gradients are looked at one step late. A step that is the first of its kind, or at which pruning begins or
    ends, is an ordinary one.

    Args:
        step: the ordinary step, with an optimizer that ``create_optimizer`` made to be captured.
        sparsifier: prunes; has been made recordable.
        recorder: a ``CudaRecorder``.
    """

    def __init__(self, step: TrainingStep, sparsifier: Sparsifier, recorder: Recorder) -> None:
        self._step, self._sparsifier, self._recorder = step, sparsifier, recorder
        self._seen: Counter[Any] = Counter()
        self._recorded: dict[Any, _Recorded] = {}

    def __call__(self, step: int, images: Tensor, labels: Tensor, global_size: int) -> Tensor | None:
        """As ``TrainingStep``; the result is valid up to the next call."""
        guard, sparsifier = self._step.guard, self._sparsifier
        kind = images.shape, global_size, sparsifier.sparsity > 0
        if not sparsifier.steady or guard.leaves_out(step) or self._seen[kind] < WARM_UP:
            self._seen[kind] += sparsifier.steady
            with self._recorder.ordinary():
                return self._step(step, images, labels, global_size)
        if kind not in self._recorded:
            self._recorded[kind] = self._record(images, labels, global_size)
        recorded = self._recorded[kind]
        recorded.images.copy_(images)
        recorded.labels.copy_(labels)
        sparsifier.advance()
        recorded.replay()
        guard.look_later(step, recorded.losses, recorded.names, recorded.norms)
        return recorded.losses

    def _record(self, images: Tensor, labels: Tensor, global_size: int) -> _Recorded:
        images, labels = images.clone(), labels.clone()

        def take() -> tuple[Tensor, list[str], Tensor]:
            losses = self._step.gradients(images, labels, global_size, flagged)
            names, norms = self._step.guard.gradient_norms()
            self._step.update()
            return losses, names, norms

        with self._sparsifier.recording():
            replay, (losses, names, norms) = self._recorder.record(take)
        return _Recorded(replay, images, labels, losses, names, norms)
