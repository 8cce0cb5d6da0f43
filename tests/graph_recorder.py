"""What stands in for a CUDA graph where there is no GPU: the calls of torch's operators, recorded and made again.

As on a GPU, recording computes nothing that lasts, every number of the host is frozen, the results of a replay lie
where the recorded ones would have, and to read a value while recording is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")

READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_consecutive", "is_nonzero"}


class ReadWhileRecording(Exception):
    """The host has asked for a value that a GPU would not have computed yet."""


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # of all memory that is written: a view of it and a copy
        self.written: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name.removeprefix("aten::") in READS:
            raise ReadWhileRecording(str(func))
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._keep(argument, value)
        for argument in func._schema.arguments:
            if argument.name in kwargs:
                self._keep(argument, kwargs[argument.name])
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def _keep(self, argument: Any, value: Any) -> None:
        # batch_norm writes its running statistics without saying so
        writes = argument.name.startswith("running_") or (argument.alias_info and argument.alias_info.is_write)
        if value is None or not writes:
            return
        for tensor in tree_leaves(value):
            self.written.append(tensor)
            storage = tensor.untyped_storage()
            if storage.data_ptr() and storage.data_ptr() not in self.before:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self.before[storage.data_ptr()] = whole, whole.clone()


class GraphRecorder:
    """A ``Recorder`` of ``engine.captured``.

    Attributes:
        replays: how often graphs were replayed.
        graphs: how many there are.
    """

    def __init__(self) -> None:
        self.replays = 0
        self.graphs = 0

    @contextmanager
    def ordinary(self) -> Iterator[None]:
        yield

    def record(self, function: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        record = _Record()
        reading = mock.Mock(side_effect=ReadWhileRecording("Tensor.tolist or Tensor.numpy"))
        with record, mock.patch.object(Tensor, "tolist", reading), mock.patch.object(Tensor, "numpy", reading):
            result = function()
        for whole, copy in record.before.values():
            whole.copy_(copy)
        self.graphs += 1

        @torch.no_grad()
        def replay() -> None:
            self.replays += 1
            # a GPU tells nobody what it has written
            with torch.autograd._unsafe_preserve_version_counter(tuple(record.written)):
                for func, args, kwargs, out in record.calls:
                    if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
                        continue  # a view, which is there
                    again = func(*args, **kwargs)
                    for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                        if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                            old.copy_(new)

        return replay, result
