"""ImageNet, and every other ImageFolder tree: `train/<class>/*.JPEG` and `val/<class>/*.JPEG`.

Worker processes decode, crop, resize and flip; uint8 tensors leave them, and the device normalises. The crop and flip
of an image derive from (seed, epoch, index).
"""

from __future__ import annotations

import io
import math
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from engine.data.base import Batch, DataError, Normalize, Sharding, epoch_generator, stable_seed

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

Key = tuple[int, int]  # epoch, index


@dataclass(frozen=True)
class Tree:
    """The images under one folder, as arrays: worker processes share them instead of copying a million strings."""

    root: Path
    files: np.ndarray  # bytes, relative to root
    labels: np.ndarray  # int64
    classes: tuple[str, ...]

    def subset(self, index: np.ndarray) -> Tree:
        return Tree(self.root, self.files[index], self.labels[index], self.classes)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(bytes(self.files[index]))


def read_tree(root: Path, split: str) -> Tree:
    """List `root/split/<class>/<image>`, classes in alphabetical order.

    Raises:
        DataError: no such folder, or a class without images.
    """
    from torchvision.datasets import ImageFolder

    folder = root / split
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist: dataset.root must hold train/ and val/ with one folder per class")
    try:
        tree = ImageFolder(folder)
    except FileNotFoundError as error:
        raise DataError(f"{folder} has no images in one folder per class ({str(error).splitlines()[0]})") from error
    files = np.array([os.fsencode(os.path.relpath(path, folder)) for path, _ in tree.samples])
    return Tree(folder, files, np.array(tree.targets, dtype=np.int64), tuple(tree.classes))


class TreeDataset(Dataset[tuple[Tensor, Tensor] | DataError]):
    """Maps a list of `(epoch, index)` to uint8 images `(batch, size, size, 3)` and labels.

    An unreadable image comes back as a `DataError` value, which passes through a worker process without its traceback.
    """

    def __init__(self, tree: Tree, size: int, seed: int, augment: bool) -> None:
        self.tree, self.size, self.seed, self.augment = tree, size, seed, augment

    def __getitem__(self, keys: list[Key]) -> tuple[Tensor, Tensor] | DataError:
        images = torch.empty(len(keys), self.size, self.size, 3, dtype=torch.uint8)
        for i, (epoch, index) in enumerate(keys):
            path = self.tree.path(index)
            try:
                image = decode(path.read_bytes())
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                reason = " ".join(str(error).split())
                return DataError(f"{path} is not a readable image ({reason}): replace or remove it")
            if self.augment:
                image = random_resized_crop(image, self.size, random.Random(stable_seed(self.seed, epoch, index)))
            else:
                image = center_crop(image, self.size)
            images[i] = torch.from_numpy(np.array(image))
        return images, torch.from_numpy(self.tree.labels[[index for _, index in keys]])


def decode(content: bytes) -> Image.Image:
    """The RGB image in a file's ``content``.

    Grey and colour JPEGs by simplejpeg, in two thirds of Pillow's time and to the same bits; whatever else there is
    (ImageNet holds a PNG and some CMYK) and what simplejpeg refuses by Pillow, whose errors these are.
    """
    with suppress(ValueError):
        if simplejpeg.decode_jpeg_header(content)[2] in ("YCbCr", "Gray"):
            return Image.fromarray(simplejpeg.decode_jpeg(content))
    with Image.open(io.BytesIO(content)) as file:
        return file.convert("RGB")


def random_resized_crop(image: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """A random 8..100 % of the area at an aspect ratio of 3/4..4/3, resized to `(size, size)`; mirrored half the time.

    Szegedy et al., https://arxiv.org/abs/1409.4842; the rejection rule is torchvision's.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            break
    else:  # the largest central crop of an allowed ratio
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    image = image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BILINEAR)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size * 256 / 224` and take the central `(size, size)`."""
    width, height = image.size
    short = round(size * 256 / 224)
    if width <= height:
        width, height = short, short * height // width
    else:
        width, height = short * width // height, short
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


class Keys:
    """What the workers are to read in the epoch at hand: one list of `(epoch, index)` a batch, made as it is needed."""

    epoch = 0
    order = torch.empty(0, dtype=torch.int64)
    shares: Sequence[tuple[slice, int]] = ()

    def __iter__(self) -> Iterator[list[Key]]:
        for share, _ in self.shares:
            yield [(self.epoch, index) for index in self.order[share].tolist()]


class StreamLoader:
    """Batches of a `Tree`, decoded by worker processes that live as long as the loader.

    Args:
        tree: the images.
        size: height and width of the batches, in pixels.
        normalize: to the statistics of the data set; its device is the loader's.
        sharding: global batches and this process's share of them.
        seed: of order and augmentation.
        shuffle: a new order each epoch; else the order of the tree.
        augment: random resized crop and flip; else resize and central crop.
        workers: number of worker processes; 0 decodes in this one.
    """

    def __init__(
        self,
        tree: Tree,
        size: int,
        normalize: Normalize,
        sharding: Sharding,
        *,
        seed: int = 0,
        shuffle: bool = False,
        augment: bool = False,
        workers: int = 0,
    ) -> None:
        self.num_samples = len(tree.files)
        self.device = normalize.scale.device
        self.normalize, self.sharding, self.seed, self.shuffle = normalize, sharding, seed, shuffle
        self.keys = Keys()
        self.dataset, self.workers = TreeDataset(tree, size, seed, augment), workers
        self.batches = self._open()

    def _open(self) -> DataLoader[tuple[Tensor, Tensor] | DataError]:
        return DataLoader(
            self.dataset,
            batch_size=None,
            sampler=self.keys,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.device.type == "cuda",
            collate_fn=_unchanged,
            generator=torch.Generator(),  # else every epoch would draw from the global one
        )

    def __len__(self) -> int:
        return self.sharding.steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        n, generator = self.num_samples, epoch_generator(self.seed, epoch)
        self.keys.epoch = epoch
        self.keys.order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        self.keys.shares = [self.sharding.share(step) for step in range(start_step, len(self))]
        for batch, (_, global_size) in zip(self.batches, self.keys.shares, strict=True):
            if isinstance(batch, DataError):
                self.batches = (
                    self._open()
                )  # lets the workers end now; left to a traceback's collection they would hang
                raise DataError(*batch.args)
            images, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            yield Batch(self.normalize(images), labels, global_size)


def _unchanged(batch: Any) -> Any:
    return batch
