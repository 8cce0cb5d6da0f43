"""DenseNet40-24 (BC) for small images.

Huang et al., "Densely Connected Convolutional Networks" (https://arxiv.org/abs/1608.06993): depth 40, growth 24,
bottlenecks of 4 * 24 channels, compression 0.5, six layers in each of three dense blocks, 48 channels in front.
100 classes: 714,196 parameters, 703,920 of them prunable.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROWTH = 24
LAYERS_PER_BLOCK = 6


class DenseLayer(nn.Module):
    """BN-ReLU-conv 1x1, BN-ReLU-conv 3x3; appends `GROWTH` channels to its input."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * GROWTH, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * GROWTH)
        self.conv2 = nn.Conv2d(4 * GROWTH, GROWTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat([x, out], 1)


class Transition(nn.Module):
    """BN-ReLU-conv 1x1 to half the channels, then 2x2 average pooling."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, in_channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet40(nn.Module):
    """Input `(batch, 3, height, width)`, output `(batch, num_classes)` logits.

    Convolutions start from N(0, sqrt(2 / fan-out)), the classifier from PyTorch's default with bias 0.
    """

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        channels = 2 * GROWTH
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.features = nn.Sequential()
        for block in range(3):
            for _ in range(LAYERS_PER_BLOCK):
                self.features.append(DenseLayer(channels))
                channels += GROWTH
            if block < 2:
                self.features.append(Transition(channels))
                channels //= 2
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * math.prod(module.kernel_size)
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(self.conv1(x))
        x = F.relu(self.bn(x))
        x = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return x
