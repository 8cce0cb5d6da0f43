"""One small network with every supported layer, and random ones drawn by hypothesis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardswish, lambda: nn.Hardtanh(-0.7, 0.3), nn.Identity)


class Residual(nn.Module):
    """`branch(x) + x`, or the concatenation of both."""

    def __init__(self, branch: nn.Module, join: str) -> None:
        super().__init__()
        self.branch, self.join = branch, join

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.join == "add":
            return F.relu(y + x)
        return torch.cat([x, y, x] if self.join == "twice" else [x, y], 1)


class Pool(nn.Module):
    """Mean over rows and columns."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def sparsity_of(weight: Tensor, density: float, generator: torch.Generator) -> None:
    """Keep a random share of the weights; leave the first output channel empty unless everything stays."""
    with torch.no_grad():
        weight.mul_(torch.rand(weight.shape, generator=generator) < density)
        if density < 1:
            weight[0] = 0


class EveryLayer(nn.Module):
    """Every supported layer once or twice: scores of images `(3, 13, 11)`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 5, 1, 2, groups=8), nn.Hardswish(), nn.Dropout())
        self.grouped = nn.Conv2d(8, 8, 3, 1, 2, 2, groups=2)
        self.dense = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 1))
        self.pools = nn.ModuleList([nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1)])
        self.head = nn.Sequential(nn.Linear(24, 9), nn.Hardtanh(), nn.Linear(9, 5), nn.Softmax(1))
        self.flatten = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.grouped(self.depthwise(x)) + x)
        x = self.dense(torch.cat([x, self.depthwise(x)], 1))
        x = torch.cat([self.pools[0](x), self.pools[1](x)], 1)
        return self.head(self.flatten(self.pools[2](x)))


def every_layer(density: float = 0.3) -> EveryLayer:
    """That network with a share of its weights; the first output channel of each layer is empty."""
    torch.manual_seed(0)
    model, generator = EveryLayer(), torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            _trained(module)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            sparsity_of(module.weight, density, generator)
    return model.eval()


def _trained(norm: nn.BatchNorm2d) -> None:
    """Statistics and weights as after training."""
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, -1, 1)
    nn.init.uniform_(norm.running_mean, -1, 1)  # type: ignore[arg-type]
    nn.init.uniform_(norm.running_var, 0.5, 2)  # type: ignore[arg-type]


@st.composite
def convolutions(draw: st.DrawFn, channels: int, size: tuple[int, int], same: bool = False) -> tuple[nn.Module, int]:
    """A convolution with optional BatchNorm and an activation, and its number of output channels."""
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (5, 5), (1, 3), (3, 1), (2, 2), (4, 3)]))
    dilation = draw(st.integers(1, 2))
    if same:
        kernel = (kernel[0] | 1, kernel[1] | 1)
        padding, stride, out = tuple(dilation * (k // 2) for k in kernel), 1, channels
    else:
        stride = draw(st.integers(1, 3))
        padding = tuple(
            draw(st.integers(max(0, (dilation * (k - 1) + 2 - s) // 2), dilation * (k - 1) + 1))
            for k, s in zip(kernel, size, strict=True)
        )
        out = draw(st.integers(1, 9))
    groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    out = -(-out // groups) * groups
    layers: list[nn.Module] = [
        nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()))
    ]
    if draw(st.booleans()):
        layers.append(nn.BatchNorm2d(out))
    layers.append(draw(st.sampled_from(ACTIVATIONS))())
    return nn.Sequential(*layers), out


@st.composite
def pools(draw: st.DrawFn) -> nn.Module:
    kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    padding, ceil = draw(st.integers(0, kernel // 2)), draw(st.booleans())
    if draw(st.booleans()):
        return nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil)
    return nn.AvgPool2d(kernel, stride, padding, ceil_mode=ceil, count_include_pad=draw(st.booleans()))


@dataclass(repr=False)
class Case:
    """A network in eval mode and images for it."""

    model: nn.Module
    images: Tensor

    def __repr__(self) -> str:
        return f"{self.model} on {tuple(self.images.shape)}"


@st.composite
def networks(draw: st.DrawFn) -> Case:
    """A network and three images."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    channels = draw(st.integers(1, 5))
    shape = (channels, draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    images = torch.randn(3, *shape)
    layers: list[nn.Module] = []
    x = images
    for _ in range(draw(st.integers(1, 5))):
        size = (x.shape[2], x.shape[3])
        kind = draw(st.sampled_from(["conv", "conv", "conv", "add", "cat", "twice", "pool", "norm"]))
        if kind == "conv":
            layer, _ = draw(convolutions(x.shape[1], size))
        elif kind in ("add", "cat", "twice"):
            branch, _ = draw(convolutions(x.shape[1], size, same=True))
            if branch[0].out_channels != x.shape[1]:  # type: ignore[index, union-attr]
                continue
            layer = Residual(branch, kind)
        elif kind == "pool":
            layer = draw(pools())
            if min(size) < 3:
                continue
        else:
            layer = nn.Sequential(nn.BatchNorm2d(x.shape[1]), nn.ReLU())
        for module in layer.modules():
            if isinstance(module, nn.BatchNorm2d):
                _trained(module)
        with torch.no_grad():
            x = layer.eval()(x)
        layers.append(layer)
    head = draw(st.sampled_from(["none", "pool", "mean", "flatten"]))
    if head != "none":
        features = x.shape[1] * (x.shape[2] * x.shape[3] if head == "flatten" else 1)
        pool = {"pool": nn.AdaptiveAvgPool2d(1), "mean": Pool(), "flatten": nn.Identity()}[head]
        layers += [pool, nn.Flatten(), nn.Linear(features, 7), nn.ReLU6(), nn.Linear(7, 4)]
        if draw(st.booleans()):
            layers.append(nn.Softmax(1))
    elif not layers:
        layers = [nn.ReLU()]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                sparsity_of(module.weight, draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), generator)
    return Case(nn.Sequential(*layers).eval(), images)
