"""What is measured against: images one by one through torchvision's transforms, as in most training scripts."""

from __future__ import annotations

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from engine.data.small import Recipe, Split

Batches = DataLoader[tuple[torch.Tensor, torch.Tensor]]


class _Images(Dataset[tuple[torch.Tensor, int]]):
    """A split behind torchvision's transforms."""

    def __init__(self, split: Split, recipe: Recipe, augment: bool) -> None:
        self.split = split
        size = split.images.shape[1]
        changes: list[object] = []
        if augment:
            changes.append(transforms.RandomCrop(size, padding=recipe.padding * size // recipe.image_shape[1]))
        if augment and recipe.flip:
            changes.append(transforms.RandomHorizontalFlip())
        self.transform = transforms.Compose([
            *changes, transforms.ToTensor(), transforms.Normalize(recipe.mean, recipe.std),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.split.images[index].numpy())), int(self.split.labels[index])


def training_batches(split: Split, recipe: Recipe, batch_size: int, *, drop_last: bool = False) -> Batches:
    """Cropped, mirrored where the recipe mirrors, in a new order at every pass; randomness is torch's own."""
    return DataLoader(_Images(split, recipe, augment=True), batch_size=batch_size, shuffle=True, drop_last=drop_last)


def test_batches(split: Split, recipe: Recipe, batch_size: int) -> Batches:
    """As they are, in order."""
    return DataLoader(_Images(split, recipe, augment=False), batch_size=batch_size)
