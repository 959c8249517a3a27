"""Sets of labelled photographs: in memory as uint8 when small, decoded on demand when large."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
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


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of a photograph in pixels, as it is to be looked at.

    Raises:
        DataError: the file is missing or not an image.
    """
    return _decode(path).size


def read_images(paths: Sequence[Path], size: int, resize: bool = True) -> Tensor:
    """Decode files to uint8 [N, size, size, 3].

    Photographs are turned upright as their EXIF data says, and the largest centred square is brought to `size`.

    Raises:
        DataError: a file is missing or not an image, or, where `resize` is false, is not of size `size` x `size`.
    """
    pixels = torch.empty(len(paths), size, size, 3, dtype=torch.uint8)

    def read(index: int) -> None:
        pixels[index] = torch.from_numpy(_read(paths[index], size, resize))

    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(read, range(len(paths))):  # raises what a thread raised
            pass
    return pixels


def _read(path: Path, size: int, resize: bool) -> np.ndarray:
    picture = _decode(path)
    width, height = picture.size
    if (width, height) != (size, size):
        if not resize:
            raise DataError(
                f"{path} has {width} x {height} px where {size} x {size} were expected. Give a size to bring all to."
            )
        edge = min(width, height)
        left, top = (width - edge) / 2, (height - edge) / 2
        picture = picture.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + edge, top + edge))
    return np.array(picture)


def _decode(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            # A palette's transparency can't be kept as a colour; RGBA on the way is what Pillow asks for.
            return (upright.convert("RGBA") if "transparency" in upright.info else upright).convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}.") from error
    except Exception as error:  # decoders of damaged files raise whatever they stumble on
        raise DataError(f"{path} cannot be read as an image: {error}. Repair or remove it.") from error
