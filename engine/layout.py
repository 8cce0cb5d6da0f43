"""Which memory layout a network computes in."""

from __future__ import annotations

import torch
from torch import nn

_ENOUGH_CHANNELS = 8


def choose_layout(channels_last: bool, device: torch.device, model: nn.Module) -> tuple[torch.memory_format, str]:
    """The memory format of a network's weights and images, and its name: with a reason where another was asked for.

    On a CPU a network stays in NCHW where it has a 1x1 convolution with a stride and fewer than 8 input channels:
    oneDNN's AVX2 code writes past a buffer in its weight gradient as soon as either the weights or the images are
    channels_last, and corrupts the heap (seen with torch 2.15).

    Args:
        channels_last: what is asked for; else NCHW.
        device: where ``model`` is trained.
    """
    if not channels_last:
        return torch.contiguous_format, "NCHW"
    unsafe = next((name for name, module in model.named_modules() if _overruns(module)), None)
    if device.type == "cpu" and unsafe is not None:
        return torch.contiguous_format, f"NCHW: oneDNN corrupts memory in the channels_last gradient of {unsafe}"
    return torch.channels_last, "channels_last"


def _overruns(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels < _ENOUGH_CHANNELS
    )
