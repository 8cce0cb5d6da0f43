"""What a sparse model is made of: zeros per layer, and the multiply-accumulates that are left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from feather.selection import unwrap

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _table(header: list[str], rows: list[list[str]], total: list[str]) -> str:
    """Text columns, the first two aligned left and the numbers right."""
    widths = [max(len(row[i]) for row in [header, *rows, total]) for i in range(len(header))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))

    def line(cells: list[str]) -> str:
        aligned = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), rule, *map(line, rows), rule, line(total)])


@dataclass(frozen=True)
class LayerSparsity:
    """One prunable weight: its name and shape, how many of its ``size`` entries are exactly zero, and its threshold."""

    name: str
    shape: tuple[int, ...]
    size: int
    zeros: int
    threshold: float | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in [0, 1]."""
        return _ratio(self.zeros, self.size)


@dataclass(frozen=True)
class SparsityReport:
    """Zeros of every prunable weight, in the model's order. ``print(report)`` shows the table."""

    layers: tuple[LayerSparsity, ...]

    @property
    def prunable(self) -> int:
        """Number of prunable weights, zeros included."""
        return sum(layer.size for layer in self.layers)

    @property
    def zeros(self) -> int:
        """Number of prunable weights that are exactly zero."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def nonzeros(self) -> int:
        """Number of prunable weights that are not zero (a NaN is not zero)."""
        return self.prunable - self.zeros

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among all prunable weights, in [0, 1]; 0 when nothing is prunable."""
        return _ratio(self.zeros, self.prunable)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain numbers, strings, lists and dicts, ready for JSON."""
        layers = [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "size": layer.size,
                "zeros": layer.zeros,
                "sparsity": layer.sparsity,
                "threshold": layer.threshold,
            }
            for layer in self.layers
        ]
        return {
            "prunable": self.prunable,
            "zeros": self.zeros,
            "nonzeros": self.nonzeros,
            "sparsity": self.sparsity,
            "layers": layers,
        }

    def __str__(self) -> str:
        header = ["layer", "shape", "weights", "zeros", "sparsity"]
        with_threshold = any(layer.threshold is not None for layer in self.layers)
        rows = []
        for layer in self.layers:
            shape = " x ".join(map(str, layer.shape))
            row = [layer.name, shape, f"{layer.size:,}", f"{layer.zeros:,}", f"{100 * layer.sparsity:.2f} %"]
            if with_threshold:
                row.append("" if layer.threshold is None else f"{layer.threshold:.4g}")
            rows.append(row)
        total = ["total", "", f"{self.prunable:,}", f"{self.zeros:,}", f"{100 * self.sparsity:.2f} %"]
        if with_threshold:
            header.append("threshold")
            total.append("")
        return _table(header, rows, total)


def sparsity_report(weights: Mapping[str, Tensor], thresholds: Mapping[str, float] | None = None) -> SparsityReport:
    """Count the zeros of each weight, with a single wait for the device.

    Args:
        weights: name to tensor, of any shape, in the order of the report.
        thresholds: name to the magnitude at or below which that weight was set to zero; names may be missing.
    """
    counts: list[int] = []
    if weights:
        device = next(iter(weights.values())).device
        counts = torch.stack([torch.count_nonzero(w.detach()).to(device) for w in weights.values()]).tolist()
    thresholds = thresholds or {}
    return SparsityReport(
        tuple(
            LayerSparsity(name, tuple(w.shape), w.numel(), w.numel() - nonzeros, thresholds.get(name))
            for (name, w), nonzeros in zip(weights.items(), counts, strict=True)
        )
    )


@dataclass(frozen=True)
class FlopsReport:
    """Multiply-accumulates of one forward pass, per sample.

    The tables of the field call this number FLOPs and count one multiply-accumulate as one: a dense ResNet-50 at
    224 x 224 has 4089 M.

    Attributes:
        dense: with every weight.
        sparse: with the weights that are not zero alone.
        layers: name of the weight to its (dense, sparse) share.
    """

    dense: int
    sparse: int
    layers: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        def row(name: str, dense: int, sparse: int) -> list[str]:
            return [name, "", f"{dense:,}", f"{sparse:,}", f"{100 * _ratio(sparse, dense):.2f} %"]

        rows = [row(name, *shares) for name, shares in self.layers.items()]
        header = ["layer", "", "dense MACs", "non-zero MACs", "left"]
        return _table(header, rows, row("total", self.dense, self.sparse))


# A product of `weight` (or of a slice of it) with `uses` inputs: each entry is multiplied that many times.
_Product = tuple[str, Tensor, int]


class _Recorder:
    """Collects the products of all hooked modules during one forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.products: list[_Product] = []

    def add(self, module_name: str, attribute: str, weight: Tensor, uses: int) -> None:
        # A weight that is computed (parametrizations) is no Parameter: it goes by its module's name.
        fallback = f"{module_name}.{attribute}" if module_name else attribute
        self.add_slice(self.names.get(id(weight), fallback), weight, uses)

    def add_slice(self, name: str, weight: Tensor, uses: int) -> None:
        self.products.append((name, weight.detach(), uses))

    def hook(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        if isinstance(module, _CONVOLUTIONS):
            self.add(name, "weight", module.weight, output.numel() // module.out_channels)
        elif isinstance(module, _TRANSPOSED):
            self.add(name, "weight", module.weight, inputs.numel() // module.in_channels)
        elif isinstance(module, nn.Linear):
            self.add(name, "weight", module.weight, inputs.numel() // module.in_features)
        elif isinstance(module, nn.MultiheadAttention):
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            self.attention(name, module, given["query"], given["key"], given["value"])

    def attention(self, name: str, module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> None:
        tokens = [x.numel() // x.shape[-1] for x in (query, key, value)]
        if module.in_proj_weight is not None:
            packed = module.in_proj_weight
            fallback = f"{name}.in_proj_weight" if name else "in_proj_weight"
            packed_name = self.names.get(id(packed), fallback)
            for part, uses in zip(packed.chunk(3), tokens, strict=True):
                self.add_slice(packed_name, part, uses)
        else:
            for attribute, uses in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), tokens, strict=True):
                self.add(name, attribute, getattr(module, attribute), uses)
        self.add(name, "out_proj.weight", module.out_proj.weight, tokens[0])


def _nonzeros(weights: list[Tensor]) -> list[int]:
    """Non-zero entries of each tensor with one wait; a tensor on the meta device has no values and counts as dense."""
    counts = [w.numel() for w in weights]
    real = [i for i, w in enumerate(weights) if not w.is_meta]
    if real:
        device = weights[real[0]].device
        found = torch.stack([torch.count_nonzero(weights[i]).to(device) for i in real]).tolist()
        for i, count in zip(real, found, strict=True):
            counts[i] = count
    return counts


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and no fused attention (which would leave out the hooks); all put back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, training in modes:
            module.training = training


def count_flops(model: nn.Module, *example_inputs: Any) -> FlopsReport:
    """Multiply-accumulates per sample of one forward pass, dense and with the non-zero weights alone.

    Counted are the products with the weights of Conv1d-3d, ConvTranspose1d-3d, Linear and MultiheadAttention's
    projections, each at the size its layer really sees (groups, stride, tokens; every call of a shared weight).
    Biases, normalisation, embeddings, recurrent layers and the products of activations with each other
    (attention scores) are not.

    Args:
        model: any module, wrapped or not; it runs once in eval mode and is unchanged afterwards. On the meta device the
            dense numbers are right and every weight counts as non-zero.
        example_inputs: what the model is called with. The first tensor's first dimension is the number of samples.

    Raises:
        ValueError: when no input is a tensor with at least one sample.
    """
    first = next((x for x in example_inputs if isinstance(x, Tensor)), None)
    if first is None or first.dim() == 0 or first.shape[0] == 0:
        raise ValueError("count_flops needs an example input: a tensor whose first dimension is the number of samples.")
    samples = first.shape[0]
    # The code that torch.compile's wrapper runs would pass the hooks by.
    model = unwrap(model)

    recorder = _Recorder(model)
    counted = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear, nn.MultiheadAttention)
    handles = []
    try:
        for name, module in model.named_modules():
            if isinstance(module, counted):
                hook: Callable[..., None] = partial(recorder.hook, name)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        with _evaluating(model):
            model(*example_inputs)
    finally:
        for handle in handles:
            handle.remove()

    totals: dict[str, list[int]] = {}
    counts = _nonzeros([weight for _, weight, _ in recorder.products])
    for (name, weight, uses), nonzeros in zip(recorder.products, counts, strict=True):
        total = totals.setdefault(name, [0, 0])
        total[0] += uses * weight.numel()
        total[1] += uses * nonzeros
    layers = {name: (round(dense / samples), round(sparse / samples)) for name, (dense, sparse) in totals.items()}
    return FlopsReport(sum(d for d, _ in layers.values()), sum(s for _, s in layers.values()), layers)
