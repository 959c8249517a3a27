"""Sets of labelled photographs: in memory as uint8 when small, decoded on demand when large."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from thrifty.data.files import read_files
from thrifty.errors import DataError

MEMORY_LIMIT = 2 << 30
"""Sets of at most so many bytes, as uint8, are held in memory."""


@dataclass(frozen=True)
class ImageSet:
    """Photographs with labels.

    Attributes:
        labels: int64 [N], index into `classes`.
        classes: names of the classes.
        names: what to call each photograph, N of them (file names, or running numbers).
        pixels: uint8 [N, H, W, 3], or None where the photographs stay on disk.
        paths: N files, used where `pixels` is None.
        size: height and width in pixels.
        resize: whether files of another size are brought to `size`, or refused.
    """

    labels: Tensor
    classes: tuple[str, ...]
    names: Sequence[str]
    pixels: Tensor | None
    paths: Sequence[Path] = field(default=(), repr=False)
    size: int = 32
    resize: bool = True

    def __post_init__(self) -> None:
        held = len(self.paths) if self.pixels is None else len(self.pixels)
        if not len(self.labels) == len(self.names) == held:
            raise DataError(f"{held} photographs, {len(self.labels)} labels and {len(self.names)} names don't match.")

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Tensor) -> Tensor:
        """The photographs at `indices` (int64 [B]) as uint8 [B, H, W, 3].

        Raises:
            DataError: a file is unreadable, or of another size where files are not resized.
        """
        if self.pixels is not None:
            return self.pixels[indices]
        return read_images([self.paths[i] for i in indices.tolist()], self.size, self.resize)

    def decoded(self) -> ImageSet:
        """The set with its photographs in memory, or itself where they would take more than `MEMORY_LIMIT`.

        Raises:
            DataError: as `images`.
        """
        if self.pixels is not None or len(self) * self.size**2 * 3 > MEMORY_LIMIT:
            return self
        return replace(self, pixels=read_images(self.paths, self.size, self.resize), paths=())

    def subset(self, indices: Tensor) -> ImageSet:
        """The photographs at `indices` (int64 [M]) as a set of their own."""
        chosen = indices.tolist()
        return ImageSet(
            self.labels[indices],
            self.classes,
            [self.names[i] for i in chosen],
            None if self.pixels is None else self.pixels[indices],
            [self.paths[i] for i in chosen] if self.pixels is None else (),
            self.size,
            self.resize,
        )


def read_images(paths: Sequence[Path], size: int, resize: bool = True) -> Tensor:
    """`files.read_files` as a tensor, uint8 [N, size, size, 3]."""
    return torch.from_numpy(read_files(paths, size, resize))
