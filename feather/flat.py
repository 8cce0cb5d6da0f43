"""Many tensors as one: an elementwise operation on a small one costs as much as on ten thousand elements, or more."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Run = list[tuple[Tensor, int]]  # 0-dim values, and of how many successive elements each is


def pack(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies with the shapes and memory layouts of ``tensors``; those of a device and type lie behind each other."""
    packed = list(tensors)
    for kind in {(t.device, t.dtype) for t in tensors}:
        indices = [i for i, t in enumerate(tensors) if (t.device, t.dtype) == kind]
        some = [tensors[i] for i in indices]
        parts = unflatten(some[0].new_empty(sum(t.numel() for t in some)), some)
        torch._foreach_copy_(parts, some)
        for i, part in zip(indices, parts, strict=True):
            packed[i] = part
    return packed


def unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The 1-D ``flat`` as views with the shapes and strides of ``tensors``, but without their gaps."""
    return [
        _shaped_like(t, part) for t, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True)
    ]


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """What ``unflatten`` has parted, as a 1-D view again; None where ``tensors`` do not lie behind each other."""
    first = tensors[0]
    storage, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    for tensor in tensors:
        if (
            tensor.storage_offset() != offset
            or tensor.untyped_storage().data_ptr() != storage
            or tensor.dtype != first.dtype
            or not _has_no_gaps(tensor)
        ):
            return None
        offset += tensor.numel()
    return first.as_strided((offset - first.storage_offset(),), (1,))


def runs(tensors: Sequence[Tensor], values: Sequence[Tensor], most: int) -> Iterator[Run]:
    """Cut the elements of ``tensors``, each of which has its value, into runs of at most ``most``.

    Successive tensors with the very same value are cut as one; elements with the value zero are in runs of their own.
    """
    run: Run = []
    length = 0
    pairs = zip(values, tensors, strict=True)
    for _, alike in itertools.groupby(pairs, key=lambda pair: id(pair[0])):
        together = list(alike)
        value, left = together[0][0], sum(tensor.numel() for _, tensor in together)
        alone = bool(value == 0)
        while left:
            size = min(left, most)
            if run and (alone or length + size > most):
                yield run
                run, length = [], 0
            run.append((value, size))
            length, left = length + size, left - size
            if alone:
                yield run
                run, length = [], 0
    if run:
        yield run


def flatten(tensor: Tensor) -> Tensor:
    """All elements in memory order: a view where the memory has no gaps (contiguous, channels_last), else a copy."""
    return tensor.permute(_memory_order(tensor)).reshape(-1)


def _shaped_like(tensor: Tensor, part: Tensor) -> Tensor:
    if _has_no_gaps(tensor):  # the very strides, those of dimensions of one element included
        return part.as_strided(tensor.shape, tensor.stride(), part.storage_offset())
    order = _memory_order(tensor)
    return part.view([tensor.shape[i] for i in order]).permute(sorted(range(tensor.ndim), key=order.__getitem__))


def _has_no_gaps(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor.permute(_memory_order(tensor)).is_contiguous()


def _memory_order(tensor: Tensor) -> list[int]:
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
