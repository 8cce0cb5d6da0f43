"""Training runs side by side against one after another: total images/s of one machine, or of one GPU.

    python scripts/bench_parallel.py [--at-once 1 2 4] [--models resnet20 ...] [--seconds 30] [--out FILE]

For each number N, N processes train their own sparse network on their own batches at the same time; on a CPU the cores
are divided between them. Every process is warm before a common start and counts its steps until time is up. One after
another is the row of N = 1: the ratio to its images/s says how much sooner N runs end side by side.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import feather  # noqa: E402
from engine.benchmarks.base import gradients  # noqa: E402
from engine.precision import resolve_precision  # noqa: E402
from engine.records import environment, write_json  # noqa: E402
from models import create_model  # noqa: E402

_WARM_UP_STEPS = 5
_WAIT_SECONDS = 600  # for the slowest process to be warm


def train(args: argparse.Namespace, name: str, threads: int, start: Any, rates: Any) -> None:
    """One process: images/s from the common start on, and the most memory it took on the GPU."""
    torch.set_num_threads(threads)
    device = torch.device(args.device)
    precision = resolve_precision(args.precision, device)
    torch.manual_seed(0)
    model = create_model(name, num_classes=100).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    # at the target from the first step on, where most of a run's steps are
    feather.create("feather", model, optimizer, sparsity=args.sparsity, total_steps=10**6, schedule="one_shot")
    images = torch.randn(args.batch_size, 3, 32, 32).to(device, memory_format=torch.channels_last)
    labels = torch.randint(0, 100, (args.batch_size,)).to(device)

    def step() -> None:
        gradients(model, optimizer, images, labels, precision)
        optimizer.step()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(_WARM_UP_STEPS):
        step()
    wait()
    start.wait(_WAIT_SECONDS)
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < args.seconds:
        for _ in range(1 if device.type == "cpu" else 10):  # a GPU works ahead of the clock: read it now and then
            step()
            steps += 1
        wait()
    rate = steps * args.batch_size / (time.perf_counter() - began)
    rates.put((rate, torch.cuda.max_memory_reserved() if device.type == "cuda" else None))


def side_by_side(args: argparse.Namespace, name: str, at_once: int, cores: int) -> dict[str, Any]:
    """``at_once`` processes over the same seconds."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    start, rates = context.Barrier(at_once), context.Queue()
    threads = max(cores // at_once, 1)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    workers = [context.Process(target=train, args=(args, name, threads, start, rates)) for _ in range(at_once)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        if any(worker.exitcode for worker in workers):
            start.abort()  # the others need not wait for it
        time.sleep(0.1)
    if any(worker.exitcode for worker in workers):
        raise SystemExit(f"{name}, {at_once} at once: a process failed (is the memory full?), the others were ended.")
    found = [rates.get() for _ in workers]
    return {
        "model": name, "at_once": at_once, "threads_each": threads, "batch_size": args.batch_size,
        "precision": resolve_precision(args.precision, torch.device(args.device)).name, "seconds": args.seconds,
        "images_per_second": sum(rate for rate, _ in found), "images_per_second_each": [rate for rate, _ in found],
        "gpu_memory_bytes_each": [memory for _, memory in found],
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-once", nargs="+", type=int, default=[1, 2, 4], help="processes (default 1 2 4)")
    parser.add_argument("--models", nargs="+", default=["resnet20"])
    parser.add_argument("--seconds", type=float, default=30, help="that count, for each number (default 30)")
    parser.add_argument("--rounds", type=int, default=1, help="repetitions of all numbers (default 1)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "parallel.json")
    args = parser.parse_args(arguments)
    if min(args.at_once) < 1 or args.seconds <= 0 or args.rounds < 1:
        parser.error("--at-once and --rounds must be at least 1, and --seconds greater than 0")
    surroundings = environment()
    cores = surroundings["hardware"]["cpu_cores"]
    rows = []
    for name in args.models:
        alone = []
        for round_number in range(args.rounds):
            for at_once in sorted({1, *args.at_once}):  # in turn, so that a slow hour of the machine meets all of them
                row = side_by_side(args, name, at_once, cores) | {"round": round_number}
                if at_once == 1:
                    alone.append(row["images_per_second"])
                row["ratio"] = row["images_per_second"] / alone[-1]
                rows.append(row)
                print(
                    f"{name:14} {at_once:2} at once, {row['threads_each']} threads each: "
                    f"{row['images_per_second']:7.0f} images/s in all, {row['ratio']:.2f} of one after another",
                    flush=True,
                )
    write_json(args.out, {"format": 1, "device": args.device, **surroundings, "rows": rows})
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
