"""Which number format the forward pass computes in, and what goes with it."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """A number format for one kind of device: weights and optimizer state stay in fp32, autocast computes in ``dtype``.

    ``reason`` says in one line, for the log, why this format.
    """

    name: str
    device_type: str
    reason: str

    @property
    def dtype(self) -> torch.dtype | None:
        """What autocast computes in; None without autocast."""
        return _DTYPES[self.name]

    def autocast(self) -> AbstractContextManager[Any]:
        """A context for forward pass and loss."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """A loss scaler that works for fp16 and hands everything through otherwise, so that the loop is the same."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def resolve_precision(requested: str, device: torch.device, model: nn.Module | None = None) -> Precision:
    """Turn ``trainer.precision`` into a format that the device has.

    Args:
        requested: ``fp32``, ``bf16``, ``fp16``, or ``auto``: bf16 where the hardware multiplies it natively, else fp32;
            fp32 as well for ``model`` on a CPU where it has depthwise convolutions, which are slower in bf16 there
            (MobileNetV1's step takes 477 ms, 371 ms in fp32: results/benchmarks/training.json). A rule and no
            measurement, so that a run that goes on decides alike.
        device: where the model runs.
        model: what is to be trained.

    Raises:
        ValueError: an unknown name, or a device that has no such format.
    """
    if requested == "auto":
        native, what = _native_bf16(device)
        if native and device.type == "cpu" and model is not None and _is_depthwise(model):
            native, what = False, "depthwise convolutions are slower in bf16 on a CPU"
        return Precision("bf16" if native else "fp32", device.type, f"{'bf16' if native else 'fp32'}: {what}")
    if requested not in _DTYPES:
        raise ValueError(f"trainer.precision={requested} is unknown: choose auto, fp32, bf16 or fp16")
    if requested == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError("trainer.precision=bf16 needs a GPU of compute capability 8.0 or later: use fp16 or fp32")
    reason = f"{requested}: as asked"
    if requested == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        reason += ", but this CPU has no bf16 instructions and takes many times as long as with trainer.precision=fp32"
    return Precision(requested, device.type, reason)


def _is_depthwise(model: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels for m in model.modules())


def _native_bf16(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return native, f"the GPU {'has' if native else 'lacks'} native bf16"
    if device.type == "cpu":
        native = cpu_has_bf16()
        return native, f"the CPU {'has' if native else 'lacks'} bf16 instructions (AVX-512 BF16 or AMX)"
    return False, f"no bf16 rule for device {device.type}"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware."""
    probes = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    if all(probes):
        return any(bool(probe()) for probe in probes if probe is not None)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
