"""Everything about speed that needs a GPU, in one command: python scripts/bench_gpu.py [--out FILE]

For each network: the dense and the sparse step, eager and captured in a CUDA graph; the sparse over the dense one; peak
memory; a full run's time at that rate; and the floors that memory traffic and arithmetic set. The captured sparse step
goes through the whole schedule with one capture: the threshold is found on the device by operations of fixed shape from
a sparsity that is a tensor there. `--profile` also counts host synchronisations in the captured loop.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import feather  # noqa: E402
from engine.records import environment, write_json  # noqa: E402
from models import create_model  # noqa: E402

# network: image size, classes, batch, epochs, images an epoch, seconds allowed for the full run (None: a rate is asked)
CASES = {
    "resnet20": (32, 100, 128, 160, 50_000, 90),
    "mobilenet_v1": (32, 100, 128, 160, 50_000, 120),
    "densenet40_24": (32, 100, 128, 160, 50_000, 300),
    "resnet50": (224, 1000, 256, 100, 1_281_167, None),
}
SPARSITY = 0.98


def quantile_of_rank(magnitudes: Tensor, rank: Tensor) -> Tensor:
    """The magnitude of sorted position ``rank``, a 0-dim int64 tensor: of fixed shape, nothing is read by the host.

    Bit by bit as in ``feather.quantile``, where the rank is a number; a graph replays it for every rank.
    """
    bits = magnitudes.view(torch.int32)
    found = torch.zeros((), dtype=torch.int32, device=bits.device)
    for bit in reversed(range(31)):
        candidate = found | (1 << bit)
        found = torch.where((bits < candidate).sum() <= rank, candidate, found)
    return found.view(torch.float32)


class CapturedStep:
    """One training step of Feather (p = 3) with its dense weights, thresholds and optimizer, free of host decisions.

    The sparsity is written into ``rank`` between replays; everything else happens on the device. T is the lower of the
    two magnitudes that the library interpolates between: the same weights are pruned.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, sparse: bool, theta: float) -> None:
        self.model, self.images, self.labels, self.theta = model, images, labels, theta
        prunable = list(feather.prunable_parameters(model).values()) if sparse else []
        self.prunable: list[nn.Parameter] = prunable
        self.dense = [p.detach().clone() for p in prunable]
        self.size = sum(p.numel() for p in prunable)
        self.rank = torch.zeros((), dtype=torch.int64, device=images.device)
        self.momentum = [torch.zeros_like(p) for p in model.parameters()]

    def set_sparsity(self, sparsity: float) -> None:
        """For the following replays, without waiting for the device."""
        self.rank.fill_(int((self.size - 1) * sparsity))

    def __call__(self) -> None:
        with torch.autocast(self.images.device.type, dtype=torch.bfloat16):
            logits = self.model(self.images)
        loss = F.cross_entropy(logits.float(), self.labels)
        parameters = list(self.model.parameters())
        gradients = list(torch.autograd.grad(loss, parameters))
        with torch.no_grad():
            position = {id(p): index for index, p in enumerate(parameters)}
            for parameter, dense in zip(self.prunable, self.dense, strict=True):
                index = position[id(parameter)]
                gradients[index] = feather.scale_pruned_gradient(gradients[index], parameter.detach(), self.theta)
                parameter.copy_(dense)
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            torch._foreach_mul_(gradients, (3.0 / (norm + 1e-6)).clamp(max=1.0))
            torch._foreach_mul_(self.momentum, 0.9)
            torch._foreach_add_(self.momentum, gradients)
            torch._foreach_add_(parameters, self.momentum, alpha=-0.01)
            if self.prunable:
                torch._foreach_copy_(self.dense, [p.detach() for p in self.prunable])
                magnitudes = torch.cat([w.permute(_order(w)).reshape(-1) for w in self.dense]).abs_()
                threshold = quantile_of_rank(magnitudes, self.rank)
                for parameter, dense in zip(self.prunable, self.dense, strict=True):
                    parameter.copy_(feather.p_threshold(dense, threshold))

    def capture(self) -> Callable[[], None]:
        """The step as a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self()
        return graph.replay


def _order(weight: Tensor) -> list[int]:
    return sorted(range(weight.ndim), key=weight.stride, reverse=True)


def build(name: str, sparse: bool) -> CapturedStep:
    """The step of one network on random images."""
    size, classes, batch, *_ = CASES[name]
    torch.manual_seed(0)
    model = create_model(name, num_classes=classes).cuda().to(memory_format=torch.channels_last).train()
    images = torch.randn(batch, 3, size, size, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.randint(0, classes, (batch,), device="cuda")
    return CapturedStep(model, images, labels, sparse, feather.auto_theta(SPARSITY))


def rate(step: Callable[[], None], count: int) -> float:
    """Seconds of one of ``count`` steps."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def floors(step: CapturedStep) -> dict[str, float]:
    """Seconds that this card's own copy and multiplication rates allow at best for what a step moves and multiplies."""
    n = 1 << 28
    source, target = (torch.empty(n, dtype=torch.uint8, device="cuda") for _ in range(2))
    bytes_per_second = 2 * n / rate(lambda: target.copy_(source) and None, 20)
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    flops_per_second = 2 * 8192**3 / rate(lambda: torch.mm(square, square) and None, 10)
    macs = feather.count_flops(step.model, step.images[:1]).dense
    moved = activations(step) * 2 * 3  # bf16; written forward, read backward, gradients written
    return {
        "arithmetic_floor_seconds": 3 * 2 * macs * len(step.images) / flops_per_second,
        "memory_floor_seconds": moved / bytes_per_second,
    }


def activations(step: CapturedStep) -> int:
    """Elements that the convolutions, norms and linear layers of one forward pass put out."""
    counted: list[int] = []
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: counted.append(output.numel()))
        for module in step.model.modules()
        if isinstance(module, kinds)
    ]
    with torch.no_grad():
        step.model(step.images)
    for hook in hooks:
        hook.remove()
    return sum(counted)


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One network: eager and captured, dense and sparse, in turn."""
    *_, batch, epochs, per_epoch, allowed = CASES[name]
    steps: dict[str, Callable[[], None]] = {}
    memory: dict[str, int] = {}
    for kind, sparse in (("dense", False), ("sparse", True)):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        eager = build(name, sparse)
        eager()
        memory[kind] = torch.cuda.max_memory_allocated() - before
        steps[f"{kind}_eager"] = eager
        captured = build(name, sparse)
        if sparse:
            captured.set_sparsity(SPARSITY)
            eager.set_sparsity(SPARSITY)
        steps[f"{kind}_captured"] = captured.capture()
    found: dict[str, list[float]] = {key: [] for key in steps}
    for _ in range(rounds):
        for key, step in steps.items():
            found[key].append(rate(step, 20))
    seconds = {key: statistics.median(values) for key, values in found.items()}
    total = epochs * -(-per_epoch // batch)
    weights = sum(4 * w.numel() for w in steps["sparse_eager"].dense)  # type: ignore[attr-defined]
    return {
        "model": name, "batch_size": batch, "seconds": seconds,
        "ratio_eager": seconds["sparse_eager"] / seconds["dense_eager"],
        "ratio_captured": seconds["sparse_captured"] / seconds["dense_captured"],
        "images_per_second": batch / seconds["sparse_captured"],
        "full_run_seconds_of_steps": total * seconds["sparse_captured"], "full_run_seconds_allowed": allowed,
        "memory_ratio": memory["sparse"] / (memory["dense"] + weights), **floors(steps["dense_eager"]),  # type: ignore[arg-type]
    }  # fmt: skip


def host_waits(name: str) -> int:
    """Synchronisations in 100 captured steps over the whole schedule, as the profiler sees them."""
    step = build(name, sparse=True)
    replay = step.capture()
    schedule = feather.Cubic(target=SPARSITY, start_step=0, end_step=50)
    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        for index in range(100):
            step.set_sparsity(schedule(index))
            replay()
    events = profile.key_averages()
    return sum(event.count for event in events if "Synchronize" in event.key or "_local_scalar" in event.key)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "gpu.json")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA GPU, and torch finds none")
    rows = []
    for name in args.models:
        row = measure(name, args.rounds)
        if args.profile:
            row["host_waits_in_100_steps"] = host_waits(name)
        rows.append(row)
        print(
            f"{name:14} captured {row['images_per_second']:9.0f} images/s, sparse / dense {row['ratio_captured']:.3f}"
        )
    write_json(args.out, {"format": 1, "device": "cuda", **environment(), "rows": rows})
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
