"""MobileNetV1 for small images.

Howard et al., "MobileNets" (https://arxiv.org/abs/1704.04861), table 1, with a stem of stride 1, strides 2 at the
separable blocks 2, 4, 6 and 12, and biases on the pointwise convolutions, as the authors of Feather use it.
100 classes: 3,315,428 parameters, 3,287,488 of them prunable.
"""

from torch import Tensor, nn
from torch.nn import functional as F

# (channels, stride) of the 13 separable blocks
BLOCKS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]


class SeparableBlock(nn.Module):
    """Depthwise 3x3 and pointwise 1x1 convolution, each followed by BatchNorm and ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.pointwise = nn.Conv2d(in_channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.depthwise(x)))
        return F.relu(self.bn2(self.pointwise(x)))


class MobileNetV1(nn.Module):
    """Input `(batch, 3, height, width)`, output `(batch, num_classes)` logits. PyTorch's default initialisation."""

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        channels = 32
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential()
        for out_channels, stride in BLOCKS:
            self.blocks.append(SeparableBlock(channels, out_channels, stride))
            channels = out_channels
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.blocks(x)
        x = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return x
