"""Loss and accuracy of a model over one pass of an evaluation set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.distributed import share_buffers

Autocast = Callable[[], AbstractContextManager[Any]]
Reduce = Callable[[Tensor], Tensor]


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, int]],
    *,
    autocast: Autocast = nullcontext,
    reduce: Reduce | None = None,
) -> tuple[float, float]:
    """Mean cross entropy and top-1 accuracy in percent, with a single wait for the device.

    The model runs in eval mode without gradients; each module's mode is put back afterwards. Several processes evaluate
    the main one's buffers.

    Args:
        model: maps images (N, ...) to logits (N, classes), in any memory format.
        batches: (images, labels, global size) on the model's device; this process's share where there are several.
        autocast: makes the context of each forward pass, such as ``Precision.autocast``; by default the model's own
            precision.
        reduce: adds a tensor of sums over all processes, such as an all-reduce; None for a single process.

    Raises:
        ValueError: there is no image in any process.
    """
    modes = [(module, module.training) for module in model.modules()]
    sums: Tensor | None = None
    if reduce is not None:
        share_buffers(model)
    model.eval()
    try:
        with torch.no_grad():
            for images, labels, _ in batches:
                with autocast():
                    logits = model(images)
                loss = F.cross_entropy(logits.float(), labels, reduction="sum").double()
                correct = (logits.argmax(dim=1) == labels).sum().double()
                batch = torch.stack([loss, correct, torch.full_like(loss, len(labels))])
                sums = batch if sums is None else sums + batch
    finally:
        for module, training in modes:
            module.training = training
    if sums is None:
        # A process without a batch still takes part in the reduction, or the others would wait for it.
        device_of = next((p.device for p in model.parameters()), torch.device("cpu"))
        sums = torch.zeros(3, dtype=torch.float64, device=device_of)
    if reduce is not None:
        sums = reduce(sums)
    loss_sum, correct_sum, count = sums.tolist()
    if not count:
        raise ValueError("The evaluation set holds no images.")
    return loss_sum / count, 100 * correct_sum / count
