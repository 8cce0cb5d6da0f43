"""The mechanism: the model holds the sparse weights, the sparsifier the dense ones.

Between optimizer steps every prunable Parameter holds what the method makes of its dense weight, so the model is at any
moment the deployable sparse model. The optimizer's own step hooks put the dense weights under the Parameters for the
update and the new sparse weights back after it; a tensor hook on the Parameter applies the method's gradient rule as
the gradient arrives. Loops, wrappers and optimizers never know.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from feather.flat import joined, pack
from feather.method import Method
from feather.modifiers import Modifier
from feather.operator import compute_dtype
from feather.report import SparsityReport, sparsity_report
from feather.selection import unwrap

_FORMAT = 1
_CHECK_EVERY = 64  # steps between looks for non-finite weights on a device where looking means waiting


class Sparsifier:
    """Sparse training of ``parameters`` by ``method``, driven by ``optimizer.step()``. Made by ``feather.create``.

    Attributes:
        step: optimizer steps taken.
        total_steps: optimizer steps of the whole run.
        method: the method, with its thresholds or masks.
        modifier: what else changes the dense weights at each step, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: Method,
        parameters: Mapping[str, nn.Parameter],
        total_steps: int,
        modifier: Modifier | None = None,
    ) -> None:
        self.method = method
        self.modifier = modifier
        self.step = 0
        self.total_steps = total_steps
        self._names = list(parameters)
        self._parameters = list(parameters.values())
        self._tensors: list[Tensor] = [*self._parameters]  # the same list for calls that ask for plain tensors
        self._idle = method.sparsity == 0  # a dense run: no second copy, and no hooks but a modifier's
        self._dense = [p.detach() for p in self._parameters]
        if not self._idle:
            self._dense = pack([method.encode(index, weight) for index, weight in enumerate(self._dense)])
        self._places = _places(self._parameters)  # where they were when the dense copies were made
        self._holds_dense = True  # what the Parameters hold now
        self._in_dense = False  # inside `with sparsifier.dense():`
        self._load_call: tuple[nn.Module, list[str]] | None = None  # the load_state_dict call that is under way
        self._step_frame: FrameType | None = None  # of the optimizer step that is under way
        self._versions: list[int] = []
        self._finalized = False
        self._recording = False  # inside `with sparsifier.recording():`
        self._handles: list[RemovableHandle] = []
        self._check_finite(wait=True)
        if not self._idle or modifier is not None:
            self._handles += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]
        if self._idle:
            return
        self._owners = _owners(unwrap(model), self._parameters)
        begins, ends = _LoadHook(self, Sparsifier._load_begins), _LoadHook(self, Sparsifier._load_ends)
        for module in unwrap(model).modules():
            self._handles.append(module.register_load_state_dict_pre_hook(begins))  # type: ignore[no-untyped-call]
            self._handles.append(module.register_load_state_dict_post_hook(ends))  # type: ignore[no-untyped-call]
        if not method.identity_backward:
            self._hook_gradients()
        self._update()

    # ---- what users call ------------------------------------------------------------------------------------------

    @property
    def sparsity(self) -> float:
        """The sparsity that the schedule gives the next forward pass."""
        return self.method.scheduled_sparsity(self.step)

    @staticmethod
    def of(model: nn.Module) -> list[Sparsifier]:
        """The sparsifiers that hold weights of ``model`` now, neither finalized nor removed."""
        hooks = [hook for module in model.modules() for hook in module._load_state_dict_post_hooks.values()]
        found = [hook.sparsifier() for hook in hooks if isinstance(hook, _LoadHook)]
        return list({id(sparsifier): sparsifier for sparsifier in found if sparsifier is not None}.values())

    def holds(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether any of ``parameters`` is one of the prunable weights."""
        own = {id(parameter) for parameter in self._parameters}
        return any(id(parameter) in own for parameter in parameters)

    def report(self) -> SparsityReport:
        """Zeros and threshold of every prunable weight as the model holds them now."""
        thresholds = self.method.thresholds()
        values = None if thresholds is None else torch.stack([t.double() for t in thresholds]).tolist()
        return sparsity_report(
            {name: parameter.detach() for name, parameter in zip(self._names, self._parameters, strict=True)},
            None if values is None else dict(zip(self._names, values, strict=True)),
        )

    def masks(self) -> list[Tensor]:
        """One bool tensor per prunable weight: True where the model's weight is not zero."""
        return [parameter.detach() != 0 for parameter in self._parameters]

    def mask_change(self, before: Sequence[Tensor]) -> float:
        """Share of the prunable weights whose mask differs from ``before``, an earlier ``masks()``; in [0, 1]."""
        changed = [(old != new).sum() for old, new in zip(before, self.masks(), strict=True)]
        return float(torch.stack(changed).sum()) / sum(mask.numel() for mask in before)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Inside, the model holds the dense weights; a change made there is a change of the dense weights.

        For an exponential moving average of the weights, for inspecting or setting them.
        """
        if self._finalized or self._in_dense:
            yield
            return
        self._refuse_outside_changes()
        self._show_dense()
        self._in_dense = True
        try:
            yield
        finally:
            self._in_dense = False
            moved = self._follow_parameters()
            # by value: writing through `parameter.data` moves no version counter
            if moved or not all(map(torch.equal, self._parameters, self._dense)):
                self._take_parameters_as_dense()
                self._update()
            else:
                self._show_sparse()

    def apply_to(self, model: nn.Module) -> None:
        """Prune another model of the same architecture, in place, with thresholds of its own weights.

        For a model that averages the dense weights (``with sparsifier.dense(): ema.update_parameters(model)``). Call it
        on a copy where the average goes on.

        Raises:
            ValueError: ``model`` lacks one of the prunable weights or has it in another shape.
        """
        others = _matching_parameters(model, self._names, self._parameters)
        weights = [parameter.detach().clone() for parameter in others]
        method = copy.deepcopy(self.method)
        method.update(weights, self.step)
        with torch.no_grad():
            for parameter, sparse in zip(others, method.forward(weights), strict=True):
                parameter.copy_(sparse)

    def finalize(self, *, at_once: bool = False) -> SparsityReport:
        """End sparse training: check the target and remove every hook; the model keeps its sparse weights.

        Args:
            at_once: prune to the target now if the schedule has not reached it.

        Raises:
            RuntimeError: the schedule has not reached the target, or the zeros miss it by more than equal magnitudes
                explain.
            FloatingPointError: a weight is not finite.
        """
        if self._finalized:
            return self.report()
        self._refuse_outside_changes(by_value=True)
        self._check_finite(wait=True)
        if self.sparsity != self.method.sparsity:
            if not at_once:
                raise RuntimeError(
                    f"The schedule stands at sparsity {self.sparsity:.4f} of {self.method.sparsity} after {self.step} "
                    f"of {self.total_steps} optimizer steps: train on, or call finalize(at_once=True) to prune the "
                    "rest now."
                )
            self.method.update(self._dense, self.total_steps)
            self._show_sparse()
        report = self.report()
        self._check_target(report.zeros)
        self.remove()
        return report

    def remove(self) -> None:
        """Detach from the model and the optimizer; the model keeps the sparse weights that it holds."""
        self._refuse_in_dense()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._dense = []
        self._finalized = True

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on, beside the model's and the optimizer's state; loads with ``weights_only=True``."""
        self._refuse_finalized("state_dict")
        self._refuse_outside_changes(by_value=True)
        self._check_finite(wait=True)
        return {
            "format": _FORMAT,
            "step": self.step,
            "total_steps": self.total_steps,
            "settings": self.method.settings(),
            "modifier": self._modifier_settings(),
            "dense": dict(zip(self._names, self._dense, strict=True)),
            "method": self.method.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``; the model's prunable weights are set as well, in whatever order things load.

        Raises:
            ValueError: the state is of another format, method setting, length or set of weights.
        """
        self._refuse_finalized("load_state_dict")
        self._refuse_in_dense()
        expected = {
            "format": _FORMAT,
            "total_steps": self.total_steps,
            "settings": self.method.settings(),
            "modifier": self._modifier_settings(),
        }
        for key, value in expected.items():
            if state.get(key) != value:
                raise ValueError(
                    f"The sparsifier's state has {key}={state.get(key)!r}, this run has {value!r}: "
                    "create the sparsifier with the arguments of the run that it goes on from."
                )
        shapes = {name: tuple(w.shape) for name, w in zip(self._names, self._dense, strict=True)}
        if {name: tuple(w.shape) for name, w in state["dense"].items()} != shapes:
            raise ValueError("The sparsifier's state holds other prunable weights than this model has.")
        for name, weight in zip(self._names, self._dense, strict=True):
            weight.copy_(state["dense"][name])
        self.step = int(state["step"])
        self.method.load_state_dict(state["method"])
        self._holds_dense = False
        self._update()

    # ---- steps that are recorded and replayed -----------------------------------------------------------------------

    def make_recordable(self) -> None:
        """From now on be the same operations on the device at every step, so that a CUDA graph can hold a whole step.

            sparsifier.make_recordable()
            ...                                                   # some ordinary steps
            with torch.cuda.graph(graph), sparsifier.recording(): ...  # a whole step, up to optimizer.step()
            sparsifier.advance(); graph.replay()                  # every step, for as long as it is ``steady``

        Raises:
            ValueError: the method or the modifier decides on the host what to compute.
        """
        if self.modifier is not None:
            raise ValueError(
                f"The modifier {type(self.modifier).__name__} decides on the host what to compute, so that no graph "
                "of a step can be recorded: train without one of them."
            )
        if not self._idle:
            self.method.make_recordable(self._dense[0].device)
            self._update()

    @property
    def steady(self) -> bool:
        """Whether weights are pruned both before and after the coming step, or neither: else it is one of its kind."""
        return (self.sparsity > 0) == (self.method.scheduled_sparsity(self.step + 1) > 0)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, an optimizer step changes nothing that the host knows: it is recorded and not taken."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def advance(self) -> None:
        """Tell that the recorded step is about to be replayed.

        Raises:
            RuntimeError: a weight was changed from outside since the last step.
        """
        if self._idle:
            return
        self._refuse_outside_changes()
        self.step += 1
        self.method.announce(self.step)

    # ---- hooks ----------------------------------------------------------------------------------------------------

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        frame = sys._getframe(1)
        if _is_inside(frame, self._step_frame):  # an optimizer whose step calls its base class's step
            return None
        self._step_frame = frame
        if self._idle:
            return None
        # by value now and then, and early: what a loop writes through `parameter.data` moves no version counter
        self._refuse_outside_changes(by_value=self.step % _CHECK_EVERY == 1 and not self._recording)
        if self.step == self.total_steps:
            warnings.warn(
                f"total_steps={self.total_steps} optimizer steps are done; more steps keep the sparsity at its target.",
                stacklevel=2,
            )
        self._show_dense()
        # optimizer.step(self, closure): whatever a closure evaluates, it must see the sparse weights
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._with_sparse(args[1], optimizer), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._with_sparse(kwargs["closure"], optimizer)}
        self._offer_gradients(optimizer)
        return None

    @torch.no_grad()
    def _offer_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        if _skips(optimizer):
            return
        # a fused optimizer may be left to undo GradScaler's scale, a power of two: exact both ways
        scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        scaled = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if scale is not None:
            torch._foreach_div_(scaled, scale)
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        self.method.before_step(
            self._dense,
            [parameter.grad for parameter in self._parameters],
            [groups[id(parameter)] for parameter in self._parameters],
        )
        if scale is not None:
            torch._foreach_mul_(scaled, scale)

    def _with_sparse(self, closure: Callable[[], Any], optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        @functools.wraps(closure)
        def evaluate() -> Any:
            self._take_parameters_as_dense()
            self._show_sparse()
            try:
                loss = closure()
            finally:
                self._show_dense()
            self._offer_gradients(optimizer)
            return loss

        return evaluate

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if sys._getframe(1) is not self._step_frame:
            return
        self._step_frame = None
        skipped = _skips(optimizer)
        if self.modifier is not None and not skipped:
            self.modifier.after_step(optimizer)
        if self._idle:
            return
        self._take_parameters_as_dense()
        if skipped:
            self._show_sparse()
            return
        if self._recording:
            self.method.select(self._dense)
            self._show_sparse()
            return
        self.step += 1
        self._check_finite(wait=False)
        self._update()

    def _update(self) -> None:
        with torch.no_grad():
            self.method.update(self._dense, self.step)
        self._show_sparse()

    def _modifier_settings(self) -> dict[str, Any] | None:
        return None if self.modifier is None else self.modifier.settings()

    def _hook_gradients(self) -> None:
        """Register the gradient rule on every weight, frozen ones included: they may be unfrozen later."""
        for index, parameter in enumerate(self._parameters):
            frozen = not parameter.requires_grad
            parameter.requires_grad_(True)  # or torch refuses the hook
            backward = functools.partial(self._backward, index, parameter)
            self._handles.append(parameter.register_hook(backward))  # type: ignore[no-untyped-call]
            parameter.requires_grad_(not frozen)

    def _backward(self, index: int, parameter: nn.Parameter, grad: Tensor) -> Tensor:
        return self.method.backward(index, grad, parameter.detach())

    # ---- moving weights -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _show_sparse(self) -> None:
        self._follow_parameters()
        if not self.method.active:
            if not self._holds_dense:
                torch._foreach_copy_(self._tensors, self._dense)
        else:
            sparse = self.method.forward(self._dense)
            if isinstance(sparse, list):
                torch._foreach_copy_(self._tensors, sparse)
            else:  # made one after the other
                for parameter, weight in zip(self._parameters, sparse, strict=True):
                    parameter.copy_(weight)
        self._holds_dense = not self.method.active
        self._versions = self._current_versions()

    @torch.no_grad()
    def _show_dense(self) -> None:
        if not self._holds_dense:
            torch._foreach_copy_(self._tensors, self._dense)
            self._holds_dense = True

    @torch.no_grad()
    def _take_parameters_as_dense(self) -> None:
        torch._foreach_copy_(self._dense, self._tensors)

    def _follow_parameters(self) -> bool:
        """Bring the dense copies to where ``model.to(...)`` has brought the Parameters: device, type and layout."""
        if self._idle:
            self._dense = [parameter.detach() for parameter in self._parameters]
            return False
        places = _places(self._parameters)
        moved = places != self._places
        if moved:
            self._places = places
            before, self._dense = self._dense, pack([parameter.detach() for parameter in self._parameters])
            for weight, old in zip(self._dense, before, strict=True):
                weight.copy_(old)
            self.method.update(self._dense, self.step)
        return moved

    # ---- checks ---------------------------------------------------------------------------------------------------

    def _current_versions(self) -> list[int]:
        return [parameter._version for parameter in self._parameters]

    @torch.no_grad()
    def _refuse_outside_changes(self, by_value: bool = False) -> None:
        """Weights written between steps by anybody else would be lost at the next step: say so instead."""
        if self._finalized:
            return
        self._refuse_in_dense()
        if self._follow_parameters():
            self._show_sparse()
            return
        if self._holds_dense and self.method.active:  # an optimizer step that raised half-way
            self._take_parameters_as_dense()
            self._show_sparse()
            return
        if self._idle:
            return
        if not by_value and self._versions == self._current_versions():
            return
        for index, sparse in enumerate(self.method.forward(self._dense)):
            parameter = self._parameters[index]
            if torch.equal(parameter, sparse):
                continue
            if self._holds_dense:  # nothing is pruned yet: initialised, or broadcast by DDP, after create
                self._dense[index].copy_(parameter)
                continue
            self._check_finite(wait=True)  # a NaN equals nothing
            raise RuntimeError(
                f"The weight {self._names[index]!r} was changed from outside between two optimizer steps; change "
                "the dense weights inside `with sparsifier.dense():` (before the first step: create the sparsifier "
                "after initialising, loading and wrapping the model)."
            )
        self._versions = self._current_versions()

    def _refuse_in_dense(self) -> None:
        if self._in_dense:
            raise RuntimeError("The model holds its dense weights now: leave `with sparsifier.dense():` first.")

    @torch.no_grad()
    def _check_finite(self, wait: bool) -> None:
        """Name the first weight that holds a NaN or an infinity; without ``wait`` never more often than is free."""
        if self._dense[0].device.type != "cpu" and not wait and self.step % _CHECK_EVERY:
            return
        together = joined(self._dense)
        if together is not None and math.isfinite(together.sum(dtype=compute_dtype(together.dtype))):
            return
        sums = torch.stack([weight.sum(dtype=compute_dtype(weight.dtype)).double() for weight in self._dense])
        for name, total in zip(self._names, sums.tolist(), strict=True):
            if total - total != 0:
                raise FloatingPointError(
                    f"The weight {name!r} holds a NaN or an infinity after {self.step} optimizer steps."
                )

    def _check_target(self, zeros: int) -> None:
        expected = self.method.expected_zeros([weight.shape for weight in self._dense])
        if expected is None or abs(zeros - expected) <= self.method.rounding:
            return
        if not self.method.active:  # nothing is pruned: the zeros are weights
            return
        if not 0 <= zeros - expected <= self._repeated_thresholds():
            size = sum(weight.numel() for weight in self._dense)
            raise RuntimeError(
                f"{zeros} of {size} weights are zero where sparsity={self.method.sparsity} asks for {expected}; "
                "equal magnitudes do not explain the difference."
            )

    def _repeated_thresholds(self) -> int:
        """Pruned weights beyond the first of the same magnitude as the largest one that their threshold prunes.

        Training under a straight-through gradient gathers weights around the threshold: they are seldom, but really,
        equal to the bit.
        """
        pruned = [w[p == 0].abs() for w, p in zip(self._dense, self._parameters, strict=True)]
        thresholds = self.method.thresholds()
        groups: dict[float, list[Tensor]] = {}
        for index, magnitudes in enumerate(pruned):
            groups.setdefault(0.0 if thresholds is None else float(thresholds[index]), []).append(magnitudes)
        repeated = 0
        for group in groups.values():
            together = torch.cat(group)
            if together.numel():
                repeated += int((together == together.max()).sum()) - 1
        return repeated

    def _refuse_finalized(self, call: str) -> None:
        if self._finalized:
            raise RuntimeError(
                f"{call}() after finalize(): the sparsifier has let go of the model; save model.state_dict()."
            )

    def _load_begins(self, module: nn.Module, missing_keys: list[str]) -> None:
        """Remember the outermost module of a ``load_state_dict`` call; its list of missing keys identifies the call."""
        if self._load_call is None or self._load_call[1] is not missing_keys:
            self._load_call = (module, missing_keys)

    def _load_ends(self, module: nn.Module, missing_keys: list[str]) -> None:
        """Take the weights that ``load_state_dict`` has brought into ``module`` as dense."""
        if self._finalized or self._load_call is None or self._load_call[0] is not module:
            return
        self._load_call = None
        loaded: set[int] = set()
        for owner in module.modules():
            for index in self._owners.get(owner, ()):
                if all(self._parameters[index] is not own for own in owner._parameters.values()):
                    raise RuntimeError(
                        f"load_state_dict(assign=True) replaced the Parameter {self._names[index]!r} that the "
                        "optimizer and the sparsifier hold: load with assign=False, or create both after loading."
                    )
                loaded.add(index)
        if self._in_dense:  # dense() takes over what changes inside it
            return
        moved = self._follow_parameters()
        with torch.no_grad():
            # a resumed checkpoint may bring the very sparse weights that this state shows
            changed = [
                index
                for index, sparse in enumerate(self.method.forward(self._dense))
                if index in loaded and not torch.equal(self._parameters[index], sparse)
            ]
            for index in changed:
                self._dense[index].copy_(self.method.encode(index, self._parameters[index]))
        if changed or moved:
            self._update()


class _LoadHook:
    """Tells the sparsifier about ``load_state_dict``; a copy or pickle of the module carries a no-op instead."""

    def __init__(self, sparsifier: Sparsifier, call: Callable[[Sparsifier, nn.Module, list[str]], None]) -> None:
        self.sparsifier = weakref.ref(sparsifier)
        self.call = call

    def __call__(self, module: nn.Module, *args: Any) -> None:
        sparsifier = self.sparsifier()
        if sparsifier is not None:
            # before: state_dict, prefix, local_metadata, strict, missing_keys, ...; after: incompatible_keys
            self.call(sparsifier, module, args[4] if len(args) > 1 else args[0].missing_keys)

    def __reduce__(self) -> tuple[Any, ...]:
        # from the standard library alone, so that torch.save(model) loads where feather is not installed
        return getattr, (nullcontext(), "__exit__")


def _places(parameters: Sequence[nn.Parameter]) -> list[tuple[torch.device, torch.dtype, tuple[int, ...]]]:
    return [(parameter.device, parameter.dtype, parameter.stride()) for parameter in parameters]


def _skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step under way is one that GradScaler leaves a fused optimizer's kernel to skip."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def _is_inside(frame: FrameType | None, outer: FrameType | None) -> bool:
    """Whether ``outer`` still runs, as a caller of ``frame``; one whose step raised does not."""
    while outer is not None and frame is not None:
        if frame is outer:
            return True
        frame = frame.f_back
    return False


def _owners(model: nn.Module, parameters: Sequence[nn.Parameter]) -> dict[nn.Module, list[int]]:
    """The modules that hold prunable weights, each with the indices of its own."""
    index = {id(parameter): i for i, parameter in enumerate(parameters)}
    owners: dict[nn.Module, list[int]] = {}
    for module in model.modules():
        own = [index[id(p)] for p in module._parameters.values() if p is not None and id(p) in index]
        if own:
            owners[module] = own
    return owners


def _matching_parameters(
    model: nn.Module, names: Sequence[str], parameters: Sequence[nn.Parameter]
) -> list[nn.Parameter]:
    model = unwrap(model)
    available = dict(model.named_parameters(remove_duplicate=False))
    while names[0] not in available and isinstance(inner := getattr(model, "module", None), nn.Module):
        model = unwrap(inner)  # of torch.optim.swa_utils.AveragedModel
        available = dict(model.named_parameters(remove_duplicate=False))
    found = []
    for name, parameter in zip(names, parameters, strict=True):
        other = available.get(name)
        if other is None or other.shape != parameter.shape:
            raise ValueError(f"The model has no weight {name!r} of shape {tuple(parameter.shape)} to prune.")
        found.append(other)
    return found
