"""Batches for training and evaluation. Order and augmentation follow from (seed, epoch, batch) alone, so a run that is
resumed in the middle of an epoch, or split over several processes, sees the same photographs in the same form."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from thrifty.data.augment import crop_and_flip, normalise
from thrifty.data.images import ImageSet
from thrifty.errors import DataError

Batch = tuple[Tensor, Tensor]

AHEAD = 2
"""Batches that are prepared while the model works on the current one."""


def seed_of(*parts: object) -> int:
    """A 63-bit seed that is a fixed function of `parts`, on every machine."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def split(images: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Part a random `share` off as a validation set: (rest, validation)."""
    held = round(len(images) * share)
    if not 0 <= held < len(images):
        raise DataError(f"a validation share of {share} leaves nothing to train on. Choose it in [0, 1).")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed_of("validation", seed)))
    return images.subset(order[held:].sort().values), images.subset(order[:held].sort().values)


def sample(images: ImageSet, count: int) -> ImageSet:
    """At most `count` of the photographs, of all classes alike, always the same ones."""
    return images.subset(torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count])


@dataclass(frozen=True)
class TrainingLoader:
    """Shuffled, augmented batches of one epoch after another; a last, smaller batch is left out.

    `batch_size` counts the photographs of a step over all processes; process `rank` of `world` gets its part of each.
    """

    images: ImageSet
    batch_size: int
    mean: Sequence[float]
    std: Sequence[float]
    seed: int
    padding: int = 4
    flip: bool = True
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if len(self.images) < self.batch_size:
            raise DataError(f"{len(self.images)} photographs don't fill one batch of {self.batch_size}.")
        if self.batch_size % self.world:
            raise DataError(f"a batch of {self.batch_size} can't be shared evenly by {self.world} processes.")

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `start`, `start + 1`, … of an epoch as (float32 [B, 3, H, W] channels-last, int64 [B])."""
        order = torch.randperm(len(self.images), generator=_generator(self.seed, epoch, "order"))
        yield from _ahead(lambda index: self._batch(order, epoch, index), range(start, len(self)))

    def _batch(self, order: Tensor, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
        pixels = self.images.images(chosen)
        pixels = crop_and_flip(pixels, self.padding, self.flip, _generator(self.seed, epoch, index))
        part = slice(self.rank * self.batch_size // self.world, (self.rank + 1) * self.batch_size // self.world)
        return normalise(pixels[part], self.mean, self.std), self.images.labels[chosen[part]]


@dataclass(frozen=True)
class EvaluationLoader:
    """Every photograph once, in order, as it is: (float32 [B, 3, H, W] channels-last, int64 [B])."""

    images: ImageSet
    mean: Sequence[float]
    std: Sequence[float]
    batch_size: int = 256

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from _ahead(self._batch, range(len(self)))

    def _batch(self, index: int) -> tuple[Tensor, Tensor]:
        stop = min((index + 1) * self.batch_size, len(self.images))
        chosen = torch.arange(index * self.batch_size, stop)
        return normalise(self.images.images(chosen), self.mean, self.std), self.images.labels[chosen]


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*parts))


def _ahead(make: Callable[[int], Batch], indices: range) -> Iterator[Batch]:
    """`make(i)` for each index, prepared by one thread while the caller is busy; order kept."""
    with ThreadPoolExecutor(1) as pool:
        pending = [pool.submit(make, index) for index in indices[:AHEAD]]
        for following in range(AHEAD, len(indices) + AHEAD):
            if not pending:
                return
            ready = pending.pop(0).result()
            if following < len(indices):
                pending.append(pool.submit(make, indices[following]))
            yield ready
