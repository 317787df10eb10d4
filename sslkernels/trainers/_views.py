"""Augmented views and the order of the images, each a pure function of the seed and of what is asked for.

A run that stops at any step, or spreads over more processes or workers, sees exactly the same views again: nothing
depends on how often a random generator was used before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from sslkernels.trainers._data import ImageData, ImageSet

# what a random stream is for; part of the key from which its seed is drawn
ORDER, VIEWS, FORWARD, MASKS = range(4)


def seed_of(*key: int) -> int:
    """A 62-bit seed from whole numbers, without the collisions that sums and products of them have."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 2)


@contextmanager
def drawn_from(*key: int) -> Iterator[None]:
    """Random numbers of the CPU by a key, whatever was drawn before; afterwards they go on as if nothing had been."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed_of(*key))
    try:
        yield
    finally:
        torch.set_rng_state(state)


def augmentation(data: ImageData) -> Callable[[torch.Tensor], torch.Tensor]:
    """SimCLR's augmentations, as far as they leave what the images show: a mirrored digit is another digit."""
    size, bilinear = data.image_size, v2.InterpolationMode.BILINEAR
    if data.kind == "digits":
        steps = [
            v2.Resize((size, size)),
            v2.RandomAffine(
                15, translate=(0.1, 0.1), scale=(0.8, 1.2), shear=(-15, 15, -15, 15), interpolation=bilinear
            ),
            v2.RandomErasing(p=0.5, scale=(0.05, 0.2)),
        ]
    elif data.kind == "fashion-mnist":
        steps = [
            v2.RandomResizedCrop(size, scale=(0.3, 1)),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.4, contrast=0.4),
        ]
    else:
        blur = v2.GaussianBlur(kernel_size=max(3, size // 10 | 1), sigma=(0.1, 2))
        steps = [
            v2.RandomResizedCrop(size, scale=(0.2, 1)),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([blur], p=0.5),
        ]
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), *steps, _centered(data.channels)])


def crops(data: ImageData) -> Callable[[torch.Tensor], torch.Tensor]:
    """MAE's augmentations, a crop and a mirror, as far as they leave what the images show; masking does the rest."""
    if data.kind == "digits":
        return evaluation(data)
    if data.kind == "fashion-mnist":  # everything is in the middle and of one size
        return v2.Compose([evaluation(data), v2.RandomHorizontalFlip()])
    crop = v2.RandomResizedCrop(data.image_size, scale=(0.2, 1))
    return v2.Compose([crop, evaluation(data), v2.RandomHorizontalFlip()])


@dataclass(frozen=True)
class Whole:
    """The whole image, as the probe sees it: the square in its middle, in floats from -1 to 1."""

    size: int

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        image = image.float() / 255
        if image.shape[1:] != (self.size, self.size):
            image = functional.center_crop(functional.resize(image, [self.size]), [self.size])
        return (image - 0.5) / 0.5


def evaluation(data: ImageData) -> Callable[[torch.Tensor], torch.Tensor]:
    return Whole(data.image_size)


def _centered(channels: int) -> v2.Normalize:
    return v2.Normalize([0.5] * channels, [0.5] * channels)


@dataclass(frozen=True)
class TwoViews(Dataset):
    """``views[epoch, index]``: two augmented views of one image, (2, C, H, W)."""

    images: ImageSet
    augment: Callable[[torch.Tensor], torch.Tensor]
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        epoch, index = key
        image = self.images.images[index]
        with drawn_from(self.seed, VIEWS, epoch, index):
            return torch.stack([self.augment(image), self.augment(image)])


@dataclass(frozen=True)
class OneView(Dataset):
    """``views[epoch, index]``: an augmented view of one image, (C, H, W), with the epoch and the index."""

    images: ImageSet
    augment: Callable[[torch.Tensor], torch.Tensor]
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int, int]:
        epoch, index = key
        image = self.images.images[index]
        with drawn_from(self.seed, VIEWS, epoch, index):
            return self.augment(image), epoch, index


@dataclass(frozen=True)
class StepKeys(Sampler):
    """The (epoch, index) keys of every step in ``steps``: an epoch is a shuffle, its last partial batch is dropped.

    Of a step's ``batch_size`` keys, each of ``world_size`` processes takes its run of consecutive ones.
    """

    images: int
    batch_size: int
    steps: range
    seed: int
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size // self.world_size
        shuffled = None
        for step in self.steps:
            epoch, position = divmod(step, self.images // self.batch_size)
            if shuffled != epoch:
                generator = torch.Generator().manual_seed(seed_of(self.seed, ORDER, epoch))
                order, shuffled = torch.randperm(self.images, generator=generator).tolist(), epoch
            first = position * self.batch_size + self.rank * share
            yield [(epoch, index) for index in order[first : first + share]]


def view_loader(dataset: TwoViews, keys: StepKeys, workers: int) -> DataLoader:
    """Batches (2, n, C, H, W): first views, second views."""
    return DataLoader(dataset, batch_sampler=keys, num_workers=workers, collate_fn=_stack)


def _stack(pairs: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(pairs, dim=1)
