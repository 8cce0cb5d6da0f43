"""Numbers that are not finite: found at the very step, named with the layer, and never saved.

The loop waits for the device no longer than it has work queued. A step's loss is read once its backward pass has been
queued, its gradients one step late; `settle` reads what is still under way, before anything is written. A gradient
that is not finite may therefore reach the weights in memory, but no file. On a CPU, where reading is free, and under
`skip`, which has to know before it updates, everything is read at once.

The loss carries its own flag: where it is not finite it is multiplied by NaN, which the gradients bring to all
processes. They decide alike without a collective of their own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from engine.distributed import Ranks, all_reduce_sum

POLICIES = ("raise", "skip", "rollback")
MOST_IN_A_ROW = 10  # steps left out one after another; more are no accident
MOST_ROLLBACKS = 10
_LOSS = ""  # stands among the names of parameters

Autocast = Callable[[], AbstractContextManager[Any]]


class NotFiniteError(FloatingPointError):
    """A loss or gradient that is not finite, and that the policy does not let pass."""


class RollBack(Exception):
    """Go back to the last checkpoint and leave out ``step`` this time."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(what)
        self.step = step


def with_rollbacks(train: Callable[[list[int]], float]) -> float:
    """``train(left_out)``, where the list grows by one step, and training goes back, with every ``RollBack``.

    Raises:
        NotFiniteError: it is one rollback too many.
    """
    left_out: list[int] = []
    while True:
        try:
            return train(left_out)
        except RollBack as back:
            if len(left_out) == MOST_ROLLBACKS:
                raise NotFiniteError(f"{back} That was after {MOST_ROLLBACKS} rollbacks.") from None
            left_out.append(back.step)
            print(f"{back} Going back.", file=sys.stderr, flush=True)


def flagged(loss: Tensor) -> Tensor:
    """``loss``, unchanged where it is finite; else its gradients become NaN everywhere."""
    value = loss.detach()
    return loss * (value - value + 1)


class NumberGuard:
    """Looks at the loss and the gradients of every step.

    Args:
        model: the network, unwrapped: its parameters' names are told, its gradients looked at.
        policy: ``raise`` stops; ``skip`` leaves the weights, the optimizer and the buffers as they were before the
            step; ``rollback`` goes back to the last checkpoint and leaves out that step.
        scaler: the loss scaler. Where it is enabled (fp16), a gradient that overflows is its business and counted.
        ranks: all processes decide alike.
        autocast: the context of a forward pass.
        leave_out: steps (counted from 0) that earlier rollbacks found guilty.

    Attributes:
        skipped: steps left out, by ``skip`` or after a rollback.
        overflows: steps in which a gradient overflowed in fp16.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: str,
        scaler: torch.amp.GradScaler,
        ranks: Ranks,
        autocast: Autocast,
        leave_out: Collection[int] = (),
    ) -> None:
        self.skipped, self.overflows = 0, 0
        self._model, self._policy, self._scaler, self._ranks = model, policy, scaler, ranks
        self._autocast, self._leave_out = autocast, leave_out
        self._parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        keeps = policy == "skip" or bool(leave_out)
        self._buffers = list(model.buffers()) if keeps else []
        self._kept = [buffer.clone() for buffer in self._buffers]
        self._at_once = ranks.device.type == "cpu" or policy == "skip"
        self._loss: Tensor | None = None  # of the step under way, with its reading
        self._reading: _Reading | None = None
        self._pending: tuple[int, _Reading, list[str], str] | None = None  # gradients that are not looked at yet
        self._scale = scaler.get_scale()
        self._in_a_row = 0

    def loss(self, loss: Tensor) -> Tensor:
        """``flagged`` of the loss of one micro batch, which is remembered."""
        value = loss.detach()
        self._loss = value if self._loss is None else self._loss + value
        self._reading = _Reading(self._loss[None])
        return flagged(loss)

    def leaves_out(self, step: int) -> bool:
        """Whether an earlier rollback found ``step`` guilty."""
        return step in self._leave_out

    def gradient_norms(self) -> tuple[list[str], Tensor]:
        """The parameters that have a gradient, by name, and the largest magnitude in each of these."""
        named = [(name, p.grad) for name, p in self._parameters if p.grad is not None]
        return [name for name, _ in named], torch.stack(torch._foreach_norm([g for _, g in named], math.inf))

    def look_later(self, step: int, losses: Tensor, names: list[str], norms: Tensor) -> None:
        """Instead of ``loss`` and ``allows``: ``step`` is under way already, down to the weights.

        Args:
            losses: 0-dim, what would not be finite if the loss were not.
            names, norms: of ``gradient_norms``.

        Raises:
            NotFiniteError, RollBack: for the step before; this one's turn comes with the next call, or ``settle``.
        """
        self.settle()
        self._pending = step, _Reading(torch.cat([norms, losses[None].to(norms.dtype)])), [*names, _LOSS], ""
        self._keep_buffers()

    def allows(self, step: int, images: Tensor) -> bool:
        """Whether the optimizer may take ``step`` (counted from 0); call it before the gradients are clipped.

        Args:
            images: of the step's last micro batch, with which the layer is looked for where the loss is not finite.

        Raises:
            NotFiniteError: under ``raise``, and under ``skip`` when it happens again and again.
            RollBack: under ``rollback``.
        """
        reading, self._loss, self._reading = self._reading, None, None
        assert reading is not None
        self.settle()  # of the step before: by now this step's work is queued
        if self.leaves_out(step):
            return self._left_out()
        (loss,) = agreed = reading.values()
        scaled, alone = self._scaler.is_enabled(), self._ranks.world_size == 1
        if scaled and not alone:  # the scaler hides what the gradients would tell the other processes
            agreed = all_reduce_sum(torch.tensor(agreed, device=self._ranks.device)).tolist()
        if (scaled or alone) and not math.isfinite(agreed[0]):
            return self._found(step, self._loss_told(loss, images))
        if not scaled:
            told = "" if math.isfinite(loss) else self._loss_told(loss, images if self._at_once else None)
            names, norms = self.gradient_norms()
            self._pending = step, _Reading(norms), names, told
            if self._at_once and (told := self._gradients_told()):
                return self._found(step, told)
        self._in_a_row = 0
        self._keep_buffers()
        return True

    def settle(self) -> None:
        """Wait for what is still under way; to be called before anything of the run is written.

        Raises:
            NotFiniteError, RollBack: as ``allows``.
        """
        if self._pending is not None:
            step = self._pending[0]
            if told := self._gradients_told():
                self._found(step, told)

    def count_overflow(self, step: int) -> None:
        """After the scaler's update: count an overflow, and refuse one that no scale can cure.

        Raises:
            NotFiniteError: gradients overflow although the scale has shrunk below 1.
        """
        if self._scaler.is_enabled():
            before, self._scale = self._scale, self._scaler.get_scale()
            if self._scale < before:
                self.overflows += 1
                if before < 1:
                    raise NotFiniteError(self._sentence(step, "gradients overflow in fp16 at a loss scale below 1"))

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "overflows": self.overflows}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on counting; call it once the model's and the scaler's states are loaded."""
        self.skipped, self.overflows = state.get("skipped", 0), state.get("overflows", 0)
        self._scale = self._scaler.get_scale()
        self._keep_buffers()

    def _keep_buffers(self) -> None:
        """Running means and the like, which a forward pass changes before anybody knows what came of it."""
        if self._kept:
            torch._foreach_copy_(self._kept, self._buffers)

    def _gradients_told(self) -> str:
        """What is wrong with the pending gradients, or nothing; the gradient nearest the loss is where it began."""
        assert self._pending is not None
        _, reading, names, told = self._pending
        self._pending = None
        wrong = [(name, value) for name, value in zip(names, reading.values(), strict=True) if not math.isfinite(value)]
        if not wrong or told:
            return told
        name, value = wrong[-1]
        if name == _LOSS:
            return self._loss_told(value, None)
        more = f" (as are those of {len(wrong) - 1} more weights)" if len(wrong) > 1 else ""
        return f"the gradient of {name} is {'nan' if math.isnan(value) else 'infinite'}{more}"

    def _loss_told(self, loss: float, images: Tensor | None) -> str:
        if math.isfinite(loss):
            return "the loss of another process is not finite"
        return f"the loss is {loss:g}" + ("" if images is None else self._origin(images))

    def _origin(self, images: Tensor) -> str:
        """Where in the forward pass numbers cease to be finite."""
        for name, parameter in self._model.named_parameters():
            if not parameter.isfinite().all():
                return f", for the weight {name} is not finite"
        if not images.isfinite().all():
            return ", for the images are not finite"
        layer = first_nonfinite_layer(self._model, images, self._autocast)
        return f", first in the output of the layer {layer}" if layer else ", though every layer's output is finite"

    def _found(self, step: int, what: str) -> bool:
        if self._policy == "rollback":
            raise RollBack(step, self._sentence(step, what))
        if self._policy == "raise" or self._in_a_row == MOST_IN_A_ROW:
            again = f", after {self._in_a_row} steps in a row that were left out" if self._in_a_row else ""
            raise NotFiniteError(self._sentence(step, what + again))
        return self._left_out()

    def _left_out(self) -> bool:
        self.skipped += 1
        self._in_a_row += 1
        if self._kept:
            torch._foreach_copy_(self._buffers, self._kept)
        if self._scaler.is_enabled():
            self._scaler.update(self._scaler.get_scale())  # or it would refuse to unscale the next step's gradients
        return False

    def _sentence(self, step: int, what: str) -> str:
        return (
            f"At step {step + 1} {what}; the last checkpoint is kept: lower optimizer.lr, or let such a step pass with "
            "trainer.nonfinite=skip or rollback."
        )


class _Reading:
    """The values of a small tensor, on their way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def values(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._host.tolist()
        return values


@torch.no_grad()
def first_nonfinite_layer(model: nn.Module, images: Tensor, autocast: Autocast) -> str | None:
    """The name of the first layer, in the order of execution, whose output is not finite; None where all are."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        if not found and isinstance(output, Tensor) and not output.isfinite().all():
            found.append(name)

    layers = [(name, module) for name, module in model.named_modules() if not any(True for _ in module.children())]
    handles = [m.register_forward_hook(lambda _m, _i, out, name=name: look(name, out)) for name, m in layers]
    try:
        with autocast():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
