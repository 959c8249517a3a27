"""Sets of labelled photographs: in memory as uint8 when small, decoded on demand when large."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

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
        size: height and width in pixels to which files are brought.
    """

    labels: Tensor
    classes: tuple[str, ...]
    names: Sequence[str]
    pixels: Tensor | None
    paths: Sequence[Path] = field(default=(), repr=False)
    size: int = 32

    def __post_init__(self) -> None:
        held = len(self.paths) if self.pixels is None else len(self.pixels)
        if not len(self.labels) == len(self.names) == held:
            raise DataError(f"{held} photographs, {len(self.labels)} labels and {len(self.names)} names don't match.")

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Tensor) -> Tensor:
        """The photographs at `indices` (int64 [B]) as uint8 [B, H, W, 3]."""
        if self.pixels is not None:
            return self.pixels[indices]
        return read_images([self.paths[i] for i in indices.tolist()], self.size)

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
        )


def read_images(paths: Sequence[Path], size: int | None) -> Tensor:
    """Decode files to uint8 [N, size, size, 3]: shorter side resized to `size`, centre cropped.

    With `size` None all files must share one shape, which is kept.

    Raises:
        DataError: a file is missing, not an image, or of another shape than the first.
    """
    with ThreadPoolExecutor(4) as pool:
        arrays = list(pool.map(lambda path: _read(path, size), paths))
    for path, array in zip(paths, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise DataError(
                f"{path} has {array.shape[1]} x {array.shape[0]} px, {paths[0]} has "
                f"{arrays[0].shape[1]} x {arrays[0].shape[0]}. Give a size to bring them all to."
            )
    return torch.from_numpy(np.stack(arrays)) if arrays else torch.empty(0, size or 0, size or 0, 3, dtype=torch.uint8)


def _read(path: Path, size: int | None) -> np.ndarray:
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}. Repair or remove it.") from error
    if size is not None and picture.size != (size, size):
        width, height = picture.size
        scale = size / min(width, height)
        resized = (max(size, round(width * scale)), max(size, round(height * scale)))
        picture = picture.resize(resized, Image.Resampling.BILINEAR)
        left, top = (resized[0] - size) // 2, (resized[1] - size) // 2
        picture = picture.crop((left, top, left + size, top + size))
    return np.asarray(picture)
