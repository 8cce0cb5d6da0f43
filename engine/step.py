"""One training step: forward, backward, clipping, update."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.numerics import NumberGuard
from engine.precision import Precision


class TrainingStep:
    """An optimizer step on a batch, in one or several micro batches.

    Args:
        network: computes the logits; ``model`` itself, compiled or wrapped.
        model: holds the parameters.
        optimizer: its learning rates are set by the caller.
        scaler: the loss scaler of ``precision``.
        guard: looks at loss and gradients, and may leave a step out.
        accumulate: micro batches.
        label_smoothing: of the cross entropy.
        clip: the gradient's largest norm; None does not clip.
        world_size: processes, over whose gradients DistributedDataParallel averages.
    """

    def __init__(
        self,
        network: nn.Module | Callable[[Tensor], Tensor],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        guard: NumberGuard,
        precision: Precision,
        *,
        accumulate: int = 1,
        label_smoothing: float = 0.0,
        clip: float | None = None,
        world_size: int = 1,
    ) -> None:
        self.network, self.model, self.optimizer = network, model, optimizer
        self.scaler, self.guard, self.precision = scaler, guard, precision
        self.accumulate, self.label_smoothing = accumulate, label_smoothing
        self.clip, self.world_size = clip, world_size

    def __call__(self, step: int, images: Tensor, labels: Tensor, global_size: int) -> Tensor | None:
        """Take ``step`` (counted from 0).

        Args:
            images, labels: this process's share of the batch.
            global_size: images of the whole batch.

        Returns:
            The sum of the losses of ``images``, a 0-dim fp64 tensor; None for a step that the guard left out.
        """
        losses = self.gradients(images, labels, global_size, self.guard.loss)
        if not self.guard.allows(step, images.tensor_split(self.accumulate)[-1]):
            return None
        self.update()
        self.guard.count_overflow(step)
        return losses

    def gradients(
        self, images: Tensor, labels: Tensor, global_size: int, watched: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Forward and backward; the loss of each micro batch passes through ``watched``. Returns the sum of losses."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = torch.zeros((), dtype=torch.float64, device=labels.device)
        micro_batches = zip(images.tensor_split(self.accumulate), labels.tensor_split(self.accumulate), strict=True)
        for x, y in micro_batches:
            with self.precision.autocast():
                logits = self.network(x).float()
                loss = F.cross_entropy(logits, y, reduction="sum", label_smoothing=self.label_smoothing)
                loss = watched(loss / global_size)
            # DistributedDataParallel averages over processes, whose shares may differ by an image
            self.scaler.scale(loss * self.world_size).backward()
            losses += loss.detach() * global_size
        self.scaler.unscale_(self.optimizer)
        return losses

    def update(self) -> None:
        """Clip the gradients and let the optimizer use them."""
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
