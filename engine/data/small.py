"""Small data sets, held on the device as uint8: digits, CIFAR-10 and CIFAR-100.

Order, crops and flips of an epoch are drawn at once from (seed, epoch); a step is one gather and one normalisation of
the whole batch, on the device.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.data.base import Batch, DataError, Normalize, Sharding, epoch_generator, stratified_split
from engine.data.download import fetch, one_at_a_time

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10


@dataclass(frozen=True)
class Split:
    """Images as uint8 `(num_samples, height, width, channels)` and their int64 labels."""

    images: Tensor
    labels: Tensor

    def subset(self, index: np.ndarray) -> Split:
        at = torch.from_numpy(index)
        return Split(self.images[at], self.labels[at])

    def pooled(self, size: int) -> Split:
        """Smaller images by average pooling, rounded to whole numbers; ``size`` divides height and width."""
        factor = self.images.shape[1] // size
        if factor == 1:
            return self
        small = F.avg_pool2d(self.images.permute(0, 3, 1, 2).float(), factor).round().to(torch.uint8)
        return Split(small.permute(0, 2, 3, 1).contiguous(), self.labels)


@dataclass(frozen=True)
class Recipe:
    """What belongs to a small data set: its statistics over the training images and its augmentation."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    image_shape: tuple[int, int, int]  # channels, height, width
    padding: int  # of the random crop, in pixels
    flip: bool


RECIPES = {
    # digits: no flip, since mirrored digits are other signs or none
    "digits": Recipe((0.3058,) * 3, (0.3190,) * 3, 10, (3, 16, 16), padding=2, flip=False),
    "cifar10": Recipe((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 10, (3, 32, 32), padding=4, flip=True),
    # the constants of the authors' CIFAR-100 recipe
    "cifar100": Recipe((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 100, (3, 32, 32), padding=4, flip=True),
}


class ResidentLoader:
    """Batches of a `Split` that lives on the device.

    Args:
        split: the images and labels, on the CPU.
        normalize: to the statistics of the data set; its device is the loader's.
        sharding: global batches and this process's share of them.
        seed: of order and augmentation.
        shuffle: a new order each epoch; else the order of the split.
        padding: largest shift of the random crop, in pixels; the border shows zero-valued pixels. 0 is no crop.
        flip: mirror each image left to right with probability 1/2.
    """

    def __init__(
        self,
        split: Split,
        normalize: Normalize,
        sharding: Sharding,
        *,
        seed: int = 0,
        shuffle: bool = False,
        padding: int = 0,
        flip: bool = False,
    ) -> None:
        self.num_samples, self.height, self.width, channels = split.images.shape
        self.device = normalize.scale.device
        # one row per pixel, and a zero row in the end for the positions outside an image
        self.pixels = torch.zeros(split.images.numel() // channels + 1, channels, dtype=torch.uint8, device=self.device)
        self.pixels[:-1].view(split.images.shape).copy_(split.images)
        self.labels = split.labels.to(self.device)
        self.rows = torch.arange(self.height, device=self.device)
        self.columns = torch.arange(self.width, device=self.device)
        self.normalize, self.sharding = normalize, sharding
        self.seed, self.shuffle, self.padding, self.flip = seed, shuffle, padding, flip

    def __len__(self) -> int:
        return self.sharding.steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        plan = self.plan(epoch).to(self.device)
        for step in range(start_step, len(self)):
            share, global_size = self.sharding.share(step)
            index, top, left, mirrored = plan[:, share]
            yield Batch(self.normalize(self.crop(index, top, left, mirrored)), self.labels[index], global_size)

    def plan(self, epoch: int) -> Tensor:
        """int64 `(4, num_samples)`: image, top and left of its crop in the padded image, and 1 where it is mirrored."""
        generator, n = epoch_generator(self.seed, epoch), self.num_samples
        plan = torch.zeros(4, n, dtype=torch.int64)
        plan[0] = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        plan[1:3] = torch.randint(2 * self.padding + 1, (2, n), generator=generator)
        if self.flip:
            plan[3] = torch.randint(2, (n,), generator=generator)
        return plan

    def crop(self, index: Tensor, top: Tensor, left: Tensor, mirrored: Tensor) -> Tensor:
        """Gather the crops of a batch: uint8 `(batch, height, width, channels)`."""
        y = self.rows + (top - self.padding)[:, None]
        x = torch.where(mirrored[:, None] > 0, self.columns.flip(0), self.columns) + (left - self.padding)[:, None]
        pixel = ((index[:, None] * self.height + y) * self.width)[:, :, None] + x[:, None, :]
        if self.padding:
            inside = ((y >= 0) & (y < self.height))[:, :, None] & ((x >= 0) & (x < self.width))[:, None, :]
            pixel = torch.where(inside, pixel, len(self.pixels) - 1)
        return self.pixels.index_select(0, pixel.view(-1)).view(*pixel.shape, -1)


def load_split(name: str, root: Path, download: bool, train: bool) -> Split:
    """The official training or test images of a small data set.

    Raises:
        DataError: missing or damaged files, or a download that failed.
    """
    return _digits(train) if name == "digits" else _cifar(name, root, download, train)


def _digits(train: bool) -> Split:
    """The UCI optical digits that scikit-learn carries: 1797 images of 8x8 pixels with values 0..16.

    Upsampled to 16x16 (bilinear), three equal channels; a fixed stratified fifth is the test split: 1438 + 359 images.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = F.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False).round().to(torch.uint8)
    everything = Split(images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3), torch.from_numpy(digits.target).long())
    kept, held_out = stratified_split(digits.target, fraction=0.2)
    return everything.subset(kept if train else held_out)


def _cifar(name: str, root: Path, download: bool, train: bool) -> Split:
    from torchvision.datasets import CIFAR10, CIFAR100

    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        if download:
            root.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(root) if root.is_dir() else nullcontext():
            if download and not (_has_archive(source, root) or _is_unpacked(source, root)):
                fetch(source.url, root / source.filename, source.tgz_md5)
            data = source(root, train=train, download=_has_archive(source, root))
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        raise DataError(_cifar_problem(source, root, download, error)) from error
    return Split(torch.from_numpy(data.data), torch.tensor(data.targets))


def _is_unpacked(source: type[CIFAR10], root: Path) -> bool:
    from torchvision.datasets.utils import check_integrity

    folder = root / source.base_folder
    files = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
    return all(check_integrity(folder / name, md5) for name, md5 in files)


def _has_archive(source: type[CIFAR10], root: Path) -> bool:
    """Whether the intact official archive lies in `root`, so that torchvision unpacks it without a network."""
    from torchvision.datasets.utils import check_integrity

    return bool(check_integrity(root / source.filename, source.tgz_md5))


def _cifar_problem(source: type[CIFAR10], root: Path, download: bool, error: Exception) -> str:
    from torchvision.datasets.utils import check_integrity

    folder = root / source.base_folder
    files = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
    missing = [name for name, _ in files if not (folder / name).is_file()]
    damaged = [name for name, md5 in files if name not in missing and not check_integrity(folder / name, md5)]
    if not missing and not damaged:
        return f"{source.__name__} in {folder} could not be read ({error})"
    found = f"{folder} lacks {', '.join(missing)}" if missing else f"{', '.join(damaged)} in {folder} is damaged"
    archive = root / source.filename
    if archive.is_file() and not check_integrity(archive, source.tgz_md5):
        found += f" and {archive} is not the official archive (md5 {source.tgz_md5})"
    if download:
        return f"{source.__name__}: {found}, and the download failed ({error}): put the official archive at {archive}"
    return f"{source.__name__}: {found}: set dataset.download=true, or put the official archive at {archive}"
