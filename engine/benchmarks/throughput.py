"""Images/s of training as `train.py` does it against the plain loop.

Plain: eager, fp32, NCHW, an optimizer that loops over parameters, torchvision's transforms image by image, a full sort
for the threshold. Ours: what `auto` chooses for this device, batches made on whole tensors, the exact selection, memory
that is kept. A step that is not timed comes before each change between them: memory is then as either leaves it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

import feather
from engine.allocation import keep_freed_memory, return_freed_memory
from engine.benchmarks.base import Row, gradients, median_ratio, medians, seconds
from engine.benchmarks.plain import training_batches
from engine.data.base import Normalize, Sharding
from engine.data.small import RECIPES, ResidentLoader, Split
from engine.precision import resolve_precision
from models import create_model

BATCH_SIZE = 128
RECIPE = RECIPES["cifar100"]
TARGETS = {"resnet20": 2.5, "mobilenet_v1": None, "densenet40_24": None}


def random_split(count: int) -> Split:
    """Random images in CIFAR-100's shape: speed does not depend on what they show."""
    random = np.random.RandomState(0)
    images = random.randint(0, 256, (count, 32, 32, 3)).astype(np.uint8)
    return Split(torch.from_numpy(images), torch.from_numpy(random.randint(0, 100, count)).long())


class Loop:
    """One network in training; ``step`` makes a batch and trains on it."""

    def __init__(self, name: str, device: torch.device, split: Split, plain: bool) -> None:
        torch.manual_seed(0)
        self.device, self.plain, self.split = device, plain, split
        layout = torch.contiguous_format if plain else torch.channels_last
        self.model = create_model(name, num_classes=100).to(device, memory_format=layout).train()
        self.precision = resolve_precision("fp32" if plain else "auto", device, self.model)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, foreach=not plain
        )
        options = {"selection": "sort"} if plain else {}
        feather.create(
            "feather", self.model, self.optimizer, sparsity=0.98, total_steps=10**6, schedule="one_shot",
            framework_options=options,
        )  # fmt: skip
        self.epoch, self.batches = 0, iter(())

    def step(self) -> None:
        images, labels = self._next()
        gradients(self.model, self.optimizer, images, labels, self.precision)
        self.optimizer.step()

    def _next(self) -> tuple[torch.Tensor, torch.Tensor]:
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self._open())
            batch = next(self.batches)
        return batch[0].to(self.device), batch[1].to(self.device)

    def _open(self):  # type: ignore[no-untyped-def]
        if self.plain:
            return training_batches(self.split, RECIPE, BATCH_SIZE, drop_last=True)
        self.epoch += 1
        return resident(self.split, self.device).epoch(self.epoch)


def resident(split: Split, device: torch.device) -> ResidentLoader:
    """The in-memory pipeline as training uses it."""
    normalize = Normalize(RECIPE.mean, RECIPE.std, device)
    normalize.memory_format = torch.channels_last
    sharding = Sharding(len(split.labels), BATCH_SIZE)
    return ResidentLoader(split, normalize, sharding, shuffle=True, padding=RECIPE.padding, flip=RECIPE.flip)


def measure(quick: bool, device: torch.device, models: Sequence[str] = ()) -> list[Row]:
    """One row for each network of ``models``, by default of ``TARGETS``."""
    split = random_split(BATCH_SIZE * 32)
    rows = []
    for name in models or (["resnet20"] if quick else list(TARGETS)):
        plain, ours = (Loop(name, device, split, plain=plain) for plain in (True, False))
        found = []
        for _ in range(2 if quick else 4):
            times = []
            for loop, prepare in ((plain, return_freed_memory), (ours, keep_freed_memory)):
                prepare()
                loop.step()
                times.append(seconds(loop.step, device))
            found.append((times[0], times[1]))
        slow, fast = medians(found)
        rows.append({
            "name": f"throughput, {name}", "ratio": median_ratio(found), "better": "higher",
            "target": TARGETS.get(name),
            "plain_images_per_second": BATCH_SIZE / slow, "images_per_second": BATCH_SIZE / fast,
            "precision": ours.precision.name, "reason": ours.precision.reason,
        })  # fmt: skip
    return rows
