"""`create_data`: a data set's name and plain arguments to its training and evaluation loaders."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import torch

from engine.data import imagenet, small
from engine.data.base import Data, DataError, Loader, Normalize, Sharding, stratified_split

NAMES = (*small.RECIPES, "imagenet", "imagenette")  # imagenette: ten classes in the layout of imagenet


def create_data(
    name: str,
    *,
    root: str | os.PathLike[str],
    batch_size: int,
    seed: int,
    device: torch.device | str,
    download: bool = False,
    image_size: int | None = None,
    validation: float = 0.0,
    augment: bool = True,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    eval_batch_size: int | None = None,
) -> Data:
    """Open a data set.

    Args:
        name: `digits`, `cifar10`, `cifar100`, or `imagenet` (also called `imagenette`) for any tree of
            `train/<class>/` and `val/<class>/`.
        root: folder of the data; `digits` needs none.
        batch_size: images per training step, over all processes.
        seed: of order and augmentation. The split into training and validation images never depends on it.
        device: where the batches, and the whole of a small data set, live.
        download: fetch CIFAR when it is missing; with several processes, let one of them go first.
        image_size: height and width in pixels: any for `imagenet` (224 by default), and what divides the own size of a
            small data set, whose images (and random shifts) are then shrunk by average pooling.
        validation: fraction of each training class held out to evaluate on, in place of the test split.
        augment: random crops and flips in training.
        workers: processes that decode `imagenet`; small data sets need none.
        rank, world_size: this process and the number of processes that share each batch.
        eval_batch_size: images per evaluation step over all processes, `batch_size` by default.

    Raises:
        ValueError: an argument out of range.
        DataError: data are missing or damaged, or could not be downloaded.
    """
    eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
    _check(name, batch_size, eval_batch_size, validation, workers, rank, world_size)
    root, device = Path(root).expanduser(), torch.device(device)
    train: Loader
    evaluation: Loader

    if name in small.RECIPES:
        recipe = small.RECIPES[name]
        own_size = recipe.image_shape[1]
        size = own_size if image_size is None else image_size
        if size < 1 or own_size % size:
            raise ValueError(
                f"image_size={size}: images of {name} have {own_size} pixels a side, shrunk by whole factors"
            )
        images = small.load_split(name, root, download, train=True)
        if validation:
            kept, held_out = stratified_split(images.labels.numpy(), validation)
            eval_images, images = images.subset(held_out), images.subset(kept)
        else:
            eval_images = small.load_split(name, root, download, train=False)
        images, eval_images = images.pooled(size), eval_images.pooled(size)
        sizes = len(images.labels), len(eval_images.labels)
        train_share, eval_share = _share(sizes, batch_size, eval_batch_size, rank, world_size)
        normalize = Normalize(recipe.mean, recipe.std, device)
        train = small.ResidentLoader(
            images,
            normalize,
            train_share,
            seed=seed,
            shuffle=True,
            padding=recipe.padding * size // own_size if augment else 0,
            flip=recipe.flip and augment,
        )
        evaluation = small.ResidentLoader(eval_images, normalize, eval_share)
        num_classes, image_shape = recipe.num_classes, (recipe.image_shape[0], size, size)
    else:
        if download:
            raise DataError(f"{name} cannot be downloaded from here: put its train/ and val/ folders into {root}")
        size = 224 if image_size is None else image_size
        if size < 1:
            raise ValueError(f"image_size={size}: must be at least 1 pixel")
        tree = imagenet.read_tree(root, "train")
        if validation:
            kept, held_out = stratified_split(tree.labels, validation)
            eval_tree, tree = tree.subset(held_out), tree.subset(kept)
        else:
            eval_tree = imagenet.read_tree(root, "val")
        if eval_tree.classes != tree.classes:
            odd = sorted(set(eval_tree.classes) ^ set(tree.classes))
            raise DataError(f"train/ and val/ in {root} must have the same classes, but {odd[0]} is in one of them")
        train_share, eval_share = _share(
            (len(tree.files), len(eval_tree.files)), batch_size, eval_batch_size, rank, world_size
        )
        normalize = Normalize(imagenet.MEAN, imagenet.STD, device)
        train = imagenet.StreamLoader(
            tree, size, normalize, train_share, seed=seed, shuffle=True, augment=augment, workers=workers
        )
        evaluation = imagenet.StreamLoader(eval_tree, size, normalize, eval_share, workers=workers)
        num_classes, image_shape = len(tree.classes), (3, size, size)

    return Data(train, evaluation, num_classes, image_shape, "validation" if validation else "test")


def _check(
    name: str, batch_size: int, eval_batch_size: int, validation: float, workers: int, rank: int, world_size: int
) -> None:
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"use {', '.join(NAMES)}"
        raise ValueError(f"Unknown data set {name!r}: {hint}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank}: must lie in [0, world_size) with world_size={world_size}")
    if batch_size < world_size:
        raise ValueError(f"batch_size={batch_size}: must be at least 1 image for each of {world_size} processes")
    if eval_batch_size < 1:
        raise ValueError(f"eval_batch_size={eval_batch_size}: must be at least 1")
    if not 0 <= validation < 1:
        raise ValueError(f"validation={validation}: must lie in [0, 1), as a fraction of the training images")
    if workers < 0:
        raise ValueError(f"workers={workers}: must be 0 or more processes")


def _share(
    sizes: tuple[int, int], batch_size: int, eval_batch_size: int, rank: int, world_size: int
) -> tuple[Sharding, Sharding]:
    """The shardings of the training and the evaluation split, of `sizes` images."""
    if not all(sizes):
        raise ValueError(f"the split leaves {sizes[0]} training and {sizes[1]} evaluation images: change validation")
    last = sizes[0] % batch_size
    if 0 < last < world_size:
        raise ValueError(
            f"batch_size={batch_size}: the last batch of an epoch would have {last} images for {world_size} processes"
        )
    return Sharding(sizes[0], batch_size, rank, world_size), Sharding(sizes[1], eval_batch_size, rank, world_size)
