"""Networks, images and ways to run generated C, shared by the tests of feather.deploy."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from feather.deploy.compiler import generate
from feather.deploy.targets import TARGETS, runs_here
from scripts.deploy.program import Floats, build, buildable, run

SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# AVX-512 is tested without such a processor too, its vectors cut in two by the compiler.
NATIVE = [name for name in TARGETS if runs_here(TARGETS[name]) or (name == "avx512" and runs_here(TARGETS["avx2"]))]


def needs_compiler() -> None:
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("no C compiler on this machine")


def needs_arm_tools() -> None:
    for tool in ("aarch64-linux-gnu-gcc", "qemu-aarch64"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed (packages gcc-aarch64-linux-gnu, qemu-user)")


def digits(count: int, size: int) -> Tensor:
    """Real images: scikit-learn's handwritten digits, enlarged, as float32 `(count, 3, size, size)`."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images[:count]).float()[:, None] / 16
    images = nn.functional.interpolate(images, size=(size, size), mode="bilinear")
    return ((images - 0.3058) / 0.3190).expand(-1, 3, -1, -1).contiguous()


def photographs(count: int, size: int) -> Tensor:
    """scikit-learn's two photographs, the middle of each, then smaller parts; float32 `(count, 3, size, size)`."""
    from sklearn.datasets import load_sample_images

    pictures = [torch.tensor(picture).permute(2, 0, 1) / 255 for picture in load_sample_images().images]
    parts = []
    for i in range(count):
        picture, side = pictures[i % 2], 420 - 60 * (i // 2)
        top, left = ((have - side) // 2 for have in picture.shape[1:])
        part = picture[None, :, top : top + side, left : left + side]
        parts.append(nn.functional.interpolate(part, size=(size, size), mode="bilinear", antialias=True))
    images = torch.cat(parts)
    return ((images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)).contiguous()


def sparsify(model: nn.Module, sparsity: float) -> nn.Module:
    """Set the smallest weights of each layer to zero, in place."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and (count := int(sparsity * module.weight.numel())):
                threshold = module.weight.abs().flatten().kthvalue(count).values
                module.weight[module.weight.abs() <= threshold] = 0
    return model


def settle(model: nn.Module, images: Tensor) -> nn.Module:
    """Give every BatchNorm statistics and random affine weights, as after training; returns the model in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over what it has seen
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    with torch.no_grad():
        model.train()(images)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                # Divided by almost nothing, a constant channel's rounding would decide the result, in PyTorch as well.
                assert module.running_var is not None
                module.running_var.clamp_(min=max(0.01, 0.1 * float(module.running_var.mean())))
    return model.eval()


def run_program(
    model: nn.Module, images: Tensor, directory: Path, target: str, *, batch: int = 1, block: int | None = None,
    aligned: bool | None = None, flags: tuple[str, ...] = ("-O1",), emulator: tuple[str, ...] = (),
) -> Floats:  # fmt: skip
    """Generate C, compile it with the harness to a program, run that, and return its results."""
    source = generate(
        model, tuple(images.shape[1:]), name="net", target=target, batch=batch, block=block, aligned=aligned
    )
    program = build(source, directory, buildable(target), flags)
    return run(program, images.numpy(), source, emulator)[0]


def reference(model: nn.Module, images: Tensor) -> Floats:
    with torch.no_grad():
        return model.eval()(images).numpy()


def assert_close(found: Floats, expected: Floats, relative: float = 1e-5) -> None:
    """Largest difference against the largest value; an all-zero result must be met to 1e-6."""
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max(initial=0) <= max(relative * np.abs(expected).max(initial=0), 1e-6)
