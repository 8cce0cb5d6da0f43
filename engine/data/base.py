"""Terms shared by all data sets: batches, loaders, and how epochs are ordered, shared and normalised."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

SPLIT_SEED = 0  # of the held-out splits: the same images whatever the run's seed


class DataError(Exception):
    """Data are missing, damaged or out of reach; the message is one sentence for the user."""


class Batch(NamedTuple):
    """One process's share of a global batch, on the device."""

    images: Tensor  # (share, channels, height, width) float32, normalised
    labels: Tensor  # (share,) int64
    global_size: int  # images of the whole global batch, over all processes


class Loader(Protocol):
    """A split, read in global batches of which this process receives its share."""

    num_samples: int  # images per epoch, over all processes
    normalize: Normalize

    def __len__(self) -> int:
        """Steps per epoch; a last, smaller batch counts."""
        ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches `start_step`, `start_step + 1`, ... of an epoch, equal to the tail of the whole epoch."""
        ...


@dataclass(frozen=True)
class Data:
    """What `create_data` returns."""

    train: Loader
    eval: Loader
    num_classes: int
    image_shape: tuple[int, int, int]  # channels, height, width of the batches
    eval_split: str  # "test", or "validation" where part of the training set is held out

    def lay_out(self, memory_format: torch.memory_format) -> None:
        """Let the images of all batches from here on have this memory format; it is NCHW at first."""
        for loader in (self.train, self.eval):
            loader.normalize.memory_format = memory_format


@dataclass(frozen=True)
class Sharding:
    """Cuts an epoch into global batches and these into contiguous shares that differ by at most one image."""

    num_samples: int
    batch_size: int  # global
    rank: int = 0
    world_size: int = 1

    @property
    def steps(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def share(self, step: int) -> tuple[slice, int]:
        """Positions in the epoch that this process reads at `step`, and the size of the global batch."""
        begin = step * self.batch_size
        size = min(self.batch_size, self.num_samples - begin)
        cuts = [begin + size * rank // self.world_size for rank in (self.rank, self.rank + 1)]
        return slice(*cuts), size


def stable_seed(*key: int) -> int:
    """A 63-bit seed from integers, equal on every machine and Python version."""
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The CPU generator that every random choice of an epoch is drawn from."""
    return torch.Generator().manual_seed(stable_seed(seed, epoch))


def stratified_split(labels: Sequence[int] | np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Split positions into `(kept, held_out)`, both ascending, holding out `fraction` of every class (rounded)."""
    labels = np.asarray(labels)
    random = np.random.RandomState(SPLIT_SEED)  # a frozen stream: the same split under every numpy
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        held_out[members[: round(fraction * len(members))]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


class Normalize:
    """uint8 `(batch, height, width, channels)` to normalised float32 `(batch, channels, height, width)`, on the device.

    `(x / 255 - mean) / std`, folded into one multiplication and one addition.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        center, spread = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self.scale = (1 / (255 * spread)).float().view(-1, 1, 1).to(device)
        self.shift = (-center / spread).float().view(-1, 1, 1).to(device)
        self.memory_format = torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        images = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=self.memory_format)
        return images.mul_(self.scale).add_(self.shift)
