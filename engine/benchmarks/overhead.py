"""What sparsification costs: sparse against dense training steps, averaged over the whole schedule.

The schedule is cut into equal stages. In each of them dense and sparse steps of the same network on the same batch
alternate (forward, backward, clipping, update). Two estimates: the ratio of the whole steps, and, less noisy, one plus
the extra time of what differs (the optimizer's step with its hooks, the gradient rule) over the dense step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

import feather
from engine.allocation import keep_freed_memory
from engine.benchmarks.base import Row, gradients, median_ratio, medians, now, pairs, wait
from engine.evaluate import evaluate
from engine.precision import Precision, resolve_precision
from models import create_model

TARGETS = {"resnet20": 1.03, "densenet40_24": 1.03, "mobilenet_v1": 1.04}
BATCH_SIZE = 128
SPARSITY = 0.98
STAGES = 6


class Contender:
    """One network with its optimizer, and a sparsifier where ``sparsity`` is not 0."""

    def __init__(self, name: str, sparsity: float, device: torch.device, precision: Precision) -> None:
        torch.manual_seed(0)
        self.model = create_model(name, num_classes=100).to(device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, foreach=True
        )
        method = "feather" if sparsity else "dense"
        self.sparsifier = feather.create(method, self.model, self.optimizer, sparsity=sparsity, total_steps=10**6)
        self.precision, self.device = precision, device
        self.rule_seconds = 0.0
        self.sparsifier.method.backward = self._timed(self.sparsifier.method.backward)  # type: ignore[method-assign]

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
        """Seconds of one training step, and of them those of the optimizer's step and the gradient rule."""
        self.rule_seconds = 0.0
        wait(self.device)
        start = now()
        gradients(self.model, self.optimizer, images, labels, self.precision)
        wait(self.device)
        update = now()
        self.optimizer.step()
        wait(self.device)
        end = now()
        return end - start, end - update + self.rule_seconds

    def _timed(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def timed(*arguments: Any) -> torch.Tensor:
            start = now()
            result = function(*arguments)
            self.rule_seconds += now() - start
            return result

        return timed


def measure(quick: bool, device: torch.device, models: Sequence[str] = (), count: int = 3) -> list[Row]:
    """One row for each network and precision; bf16 only where the device has it: emulated it takes ten times as long.

    Args:
        models: names; all of ``TARGETS`` by default.
        count: pairs of steps in each stage.
    """
    keep_freed_memory()  # as training does
    native = resolve_precision("auto", device).name == "bf16"
    precisions = ("fp32", "bf16") if native and not quick else ("fp32",)
    names = models or (list(TARGETS)[:1] if quick else list(TARGETS))
    return [_evaluation(names[0], resolve_precision("auto", device), 3 if quick else 9, device)] + [
        _row(name, resolve_precision(precision, device), 1 if quick else count, device)
        for name in names
        for precision in precisions
    ]


def _evaluation(name: str, precision: Precision, count: int, device: torch.device) -> Row:
    """Of a model in sparse training against a plain one: the sparse weights are in place, nothing is computed anew."""
    plain, sparse = (Contender(name, sparsity, device, precision) for sparsity in (0.0, SPARSITY))
    images = torch.randn(BATCH_SIZE, 3, 32, 32).to(device, memory_format=torch.channels_last)
    labels = torch.randint(0, 100, (BATCH_SIZE,)).to(device)
    sparse.sparsifier.step = sparse.sparsifier.total_steps // 2
    sparse.step(images, labels)

    def task(contender: Contender) -> Callable[[], object]:
        return lambda: evaluate(contender.model, [(images, labels, BATCH_SIZE)] * 2, autocast=precision.autocast)

    found = pairs(task(sparse), task(plain), count, device)
    slow, fast = medians(found)
    return {
        "name": f"evaluation, {name}, sparse / plain", "ratio": median_ratio(found), "better": "lower", "target": 1.02,
        "slack": 0.05, "model": name, "seconds": slow, "plain_seconds": fast,
    }  # fmt: skip


def _row(name: str, precision: Precision, pairs_per_stage: int, device: torch.device) -> Row:
    dense, sparse = (Contender(name, sparsity, device, precision) for sparsity in (0.0, SPARSITY))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH_SIZE, 3, 32, 32, generator=generator).to(device, memory_format=torch.channels_last)
    labels = torch.randint(0, 100, (BATCH_SIZE,), generator=generator).to(device)
    whole, parts, dense_seconds, extra = [], [], [], []
    for stage in range(STAGES):
        sparse.sparsifier.step = int((stage + 0.5) / STAGES * sparse.sparsifier.total_steps)
        ratios, differences = [], []
        for pair in range(pairs_per_stage + 1):
            first, second = (dense, sparse) if pair % 2 else (sparse, dense)
            seconds = {contender: contender.step(images, labels) for contender in (first, second)}
            if pair:  # the first of a stage warms up
                ratios.append(seconds[sparse][0] / seconds[dense][0])
                differences.append(seconds[sparse][1] - seconds[dense][1])
                dense_seconds.append(seconds[dense][0])
        whole.append(statistics.median(ratios))
        extra.append(statistics.median(differences))
    step = statistics.median(dense_seconds)
    parts = [1 + seconds / step for seconds in extra]
    return {
        "name": f"overhead, {name}, {precision.name}", "ratio": statistics.mean(parts), "better": "lower",
        "target": TARGETS[name] if device.type == "cpu" else None, "slack": 0.03,
        "whole_step_ratio": statistics.mean(whole), "model": name, "precision": precision.name,
        "batch_size": BATCH_SIZE, "sparsity": SPARSITY, "pairs": STAGES * pairs_per_stage,
        "dense_step_seconds": step, "sparse_step_seconds": step * statistics.mean(parts),
        "ratio_by_stage": parts, "extra_seconds_by_stage": extra,
        "sparse_images_per_second": BATCH_SIZE / (step * statistics.mean(parts)),
        "prunable": dense.sparsifier.report().prunable,
    }  # fmt: skip
