"""Photographs from files, as NumPy arrays. Needs Pillow, and no torch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from thrifty.errors import DataError

SAMPLE = Path(__file__).parent / "sample"
"""1,000 CIFAR-10 test photographs, 100 a class, as JPEG files in one directory a class."""


SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
"""Of photographs in directories."""


def listing(directory: str | Path) -> tuple[list[Path], np.ndarray, tuple[str, ...]]:
    """Files of a directory of one directory a class: paths, int64 [N] index of each one's class, names of the classes.

    Raises:
        DataError: there is no such directory, or no photograph in it.
    """
    directory = Path(directory)
    classes = sorted(path.name for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []
    found = [
        (path, index)
        for index, name in enumerate(classes)
        for path in sorted((directory / name).iterdir())
        if path.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise DataError(f"{directory} has no photographs. Expected: {directory}/<class>/<photograph>.jpg")
    return [path for path, _ in found], np.array([index for _, index in found], np.int64), tuple(classes)


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of a photograph in pixels, as it is to be looked at.

    Raises:
        DataError: the file is missing or not an image.
    """
    return _decode(path).size


def read_files(paths: Sequence[Path], size: int, resize: bool = True) -> np.ndarray:
    """Decode files to uint8 [N, size, size, 3].

    Photographs are turned upright as their EXIF data says, and the largest centred square is brought to `size`.

    Raises:
        DataError: a file is missing or not an image, or, where `resize` is false, is not of size `size` x `size`.
    """
    pixels = np.empty((len(paths), size, size, 3), np.uint8)

    def read(index: int) -> None:
        pixels[index] = _read(paths[index], size, resize)

    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(read, range(len(paths))):  # raises what a thread raised
            pass
    return pixels


def normalised(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """uint8 [N, H, W, C] to float32 [N, C, H, W]: (pixel / 255 - mean) / std per channel."""
    scale = 1 / (255 * np.array(std))
    shift = 255 * np.array(mean) * scale
    values = pixels * scale.astype(np.float32) - shift.astype(np.float32)
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


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


def _in_bytes(image: Image.Image, kind: str | None) -> Image.Image:
    """Greyscale of 16 bits a pixel as eight, scaled: Pillow alone would make white of all above 255."""
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in {"I", "F"}:
        raise ValueError(
            f"its values (mode {image.mode}) have no range that is known; save it with 8 or 16 bits a pixel"
        )
    return image


def _decode(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            upright = _in_bytes(ImageOps.exif_transpose(image), image.format)
            # A palette's transparency can't be kept as a colour; RGBA on the way is what Pillow asks for.
            return (upright.convert("RGBA") if "transparency" in upright.info else upright).convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}.") from error
    except Exception as error:  # decoders of damaged files raise whatever they stumble on
        raise DataError(f"{path} cannot be read as an image: {error}. Repair or remove it.") from error
