"""The data pipelines: batches of small images against a training step, photographs against torchvision's PIL loader."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from engine.benchmarks.base import Row, median_ratio, medians, pairs
from engine.benchmarks.throughput import BATCH_SIZE, Loop, random_split, resident
from engine.data.imagenet import MEAN, STD, Tree, TreeDataset

PHOTOS = 150


def measure(quick: bool, device: torch.device, photos: Path | None = None) -> list[Row]:
    """Rows of both pipelines.

    Args:
        photos: a folder of JPEGs, searched recursively; None makes smooth random ones.
    """
    rows = [_small(quick, device)]
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(photos.rglob("*.JPEG")) if photos is not None else _made(Path(folder))
        files = files[:: max(len(files) // PHOTOS, 1)][:PHOTOS]
        origin = "given" if photos is not None else "made"
        return rows + [_photographs(files, size, 2 if quick else 5, origin) for size in (160, 224)]


def _small(quick: bool, device: torch.device) -> Row:
    split = random_split(BATCH_SIZE * 32)
    loop = Loop("resnet20", device, split, plain=False)
    batches = resident(split, device)

    def epoch() -> None:
        for _ in batches.epoch(0):
            pass

    found = pairs(epoch, loop.step, 2 if quick else 7, device)
    whole, step = medians(found)
    return {
        "name": "in-memory batch / ResNet-20 step", "ratio": median_ratio(found) / 32, "better": "lower",
        "target": 0.02, "batch_seconds": whole / 32, "step_seconds": step, "slack": 0.02,
    }  # fmt: skip


def _photographs(files: Sequence[Path], size: int, count: int, origin: str) -> Row:
    """Training crops of one process, ready to be copied to the device."""
    transform = transforms.Compose([
        transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])  # fmt: skip
    names = np.array([str(path).encode() for path in files])
    ours = TreeDataset(Tree(Path("/"), names, np.zeros(len(files), dtype=np.int64), ("one",)), size, 0, augment=True)

    def plain() -> None:
        images = []
        for path in files:
            with Image.open(path) as file:
                images.append(transform(file.convert("RGB")))
        torch.stack(images)

    found = pairs(plain, lambda: ours[[(0, index) for index in range(len(files))]], count)
    slow, fast = medians(found)
    return {
        "name": f"photographs ({origin}), {size} pixels", "ratio": median_ratio(found), "better": "higher",
        "target": 1.5, "plain_images_per_second": len(files) / slow, "images_per_second": len(files) / fast,
        "photographs": len(files),
    }  # fmt: skip


def _made(folder: Path) -> list[Path]:
    """Smooth noise of ImageNet's usual size."""
    random = np.random.RandomState(0)
    paths = []
    for index in range(PHOTOS):
        small = Image.fromarray(random.randint(0, 256, (30, 40, 3)).astype(np.uint8))
        paths.append(folder / f"{index}.JPEG")
        small.resize((500, 375), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths
