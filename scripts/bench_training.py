"""What sparsification costs: sparse against dense training steps, interleaved in one process.

    python scripts/bench_training.py [--models resnet20 ...] [--precisions bf16 fp32] [--pairs 30] [--out FILE]

Each pair is one dense and one sparse optimizer step of the same network on the same batch (forward, backward, clipping,
update), in changing order; the sparse one goes through the whole schedule. The median of the pairs' ratios is the
result: it does not depend on how fast the machine is. Images/s are of this machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import feather  # noqa: E402
from engine.precision import Precision, resolve_precision  # noqa: E402
from engine.records import environment, write_json  # noqa: E402
from models import create_model  # noqa: E402


class Contender:
    """One network with its optimizer, and a sparsifier where ``sparsity`` is not 0."""

    def __init__(self, name: str, sparsity: float, steps: int, device: torch.device, precision: Precision) -> None:
        torch.manual_seed(0)
        self.model = create_model(name, num_classes=100).to(device, memory_format=torch.channels_last).train()
        parameters = self.model.parameters()
        self.optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4, foreach=True)
        method = "feather" if sparsity else "dense"
        self.sparsifier = feather.create(method, self.model, self.optimizer, sparsity=sparsity, total_steps=steps)
        self.precision = precision
        self.device = device

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Seconds of one training step."""
        self._wait()
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision.autocast():
            loss = F.cross_entropy(self.model(images).float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 3.0)
        self.optimizer.step()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(name: str, precision: Precision, args: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Median step times, their ratio and images/s of one network in one precision."""
    warm_up = 3
    steps = args.pairs + warm_up
    contenders = {s: Contender(name, s, steps, device, precision) for s in (0.0, args.sparsity)}
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, 32, 32, generator=generator).to(device, memory_format=torch.channels_last)
    labels = torch.randint(0, 100, (args.batch_size,), generator=generator).to(device)
    dense, sparse, ratios = [], [], []
    for pair in range(steps):
        order = (0.0, args.sparsity) if pair % 2 else (args.sparsity, 0.0)
        seconds = {s: contenders[s].step(images, labels) for s in order}
        if pair >= warm_up:
            dense.append(seconds[0.0])
            sparse.append(seconds[args.sparsity])
            ratios.append(seconds[args.sparsity] / seconds[0.0])
    return {
        "model": name, "precision": precision.name, "batch_size": args.batch_size, "sparsity": args.sparsity,
        "pairs": args.pairs, "dense_step_seconds": statistics.median(dense),
        "sparse_step_seconds": statistics.median(sparse),
        "ratio": statistics.median(ratios), "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "sparse_images_per_second": args.batch_size / statistics.median(sparse),
        "prunable": contenders[0.0].sparsifier.report().prunable,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet20", "mobilenet_v1", "densenet40_24"])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--pairs", type=int, default=30, help="pairs of steps that count (default 30)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "training.json")
    args = parser.parse_args()
    if args.pairs < 2:
        parser.error("--pairs must be at least 2")
    device = torch.device(args.device)
    surroundings = environment()
    rows = []
    for name in args.models:
        for requested in args.precisions:
            row = measure(name, resolve_precision(requested, device), args, device)
            rows.append(row)
            print(
                f"{name:14} {row['precision']}: dense {1e3 * row['dense_step_seconds']:7.1f} ms, "
                f"sparse {1e3 * row['sparse_step_seconds']:7.1f} ms, ratio {row['ratio']:.3f}, "
                f"{row['sparse_images_per_second']:.0f} images/s",
                flush=True,
            )
    write_json(args.out, {"format": 1, "device": str(device), **surroundings, "rows": rows})
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
