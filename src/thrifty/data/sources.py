"""Where photographs come from: a user's ImageFolder directory, torchvision's CIFAR-10/100, the embedded sample."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision import datasets

from thrifty.data.files import SAMPLE, image_size
from thrifty.data.images import ImageSet
from thrifty.errors import DataError

SOURCES = ("folder", "cifar10", "cifar100", "sample")


def load(
    source: str,
    root: str | Path | None = None,
    split: str = "test",
    size: int | None = None,
    in_memory: bool = True,
) -> ImageSet:
    """Load a set of labelled photographs.

    Args:
        source: one of `SOURCES`.
        root: for `folder`, a directory with `train` and `test` (or `val`) directories of one directory a class, or
            directly with one directory a class; for CIFAR, where the download is kept. Not used for `sample`.
        split: `train` or `test`.
        size: height and width in pixels to bring the photographs to; None keeps files of one common size as they are.
        in_memory: decode a small set at once; files are otherwise read when their photographs are asked for.

    Raises:
        DataError: the source is unknown, or files are missing or unreadable.
    """
    if source not in SOURCES:
        raise DataError(f"there is no data source {source!r}. Choose one of: {', '.join(SOURCES)}.")
    if split not in ("train", "test"):
        raise DataError(f"split is {split!r}, but must be 'train' or 'test'.")
    if source == "sample":
        if split == "train":
            raise DataError("the embedded sample has test photographs only. Train on folder, cifar10 or cifar100.")
        return image_folder(SAMPLE, size, in_memory)
    if root is None:
        raise DataError(f"data source {source!r} needs a root directory.")
    if source == "folder":
        return image_folder(_split_directory(Path(root), split), size, in_memory)
    return _cifar(source, Path(root), split, size)


def image_folder(directory: str | Path, size: int | None = None, in_memory: bool = True) -> ImageSet:
    """A directory of one directory a class, as torchvision's ImageFolder reads it.

    Args:
        directory: holds a directory a class with at least one photograph each.
        size: height and width in pixels to bring the photographs to; None keeps them, if all are squares of one size.
        in_memory: decode a small set at once.

    Raises:
        DataError: there are no photographs, or one is unreadable or, with `size` None, of another size than the first.
    """
    directory = Path(directory)
    try:
        listing = datasets.ImageFolder(str(directory))
    except OSError as error:
        raise DataError(
            f"{directory} is not a directory of photographs: {error}. Expected: {directory}/<class>/<photograph>.jpg"
        ) from error
    paths = [Path(path) for path, _ in listing.samples]
    labels = torch.tensor(listing.targets)
    names = [str(path.relative_to(directory)) for path in paths]
    edge = _edge(paths[0]) if size is None else size
    chosen = ImageSet(labels, tuple(listing.classes), names, None, paths, edge, resize=size is not None)
    return chosen.decoded() if in_memory else chosen


def _edge(path: Path) -> int:
    width, height = image_size(path)
    if width != height:
        raise DataError(f"{path} has {width} x {height} px, which is not square. Give a size to bring all to.")
    return width


def _split_directory(root: Path, split: str) -> Path:
    if not root.is_dir():
        raise DataError(
            f"there is no directory {root}. Give the root of an ImageFolder: --root, or data.root in a recipe."
        )
    names = ("train",) if split == "train" else ("test", "val")
    for name in names:
        if (root / name).is_dir():
            return root / name
    if any((root / name).is_dir() for name in ("train", "test", "val")):
        raise DataError(f"{root} has no {' or '.join(names)} directory.")
    return root


def _cifar(source: str, root: Path, split: str, size: int | None) -> ImageSet:
    kind = datasets.CIFAR10 if source == "cifar10" else datasets.CIFAR100
    try:
        data = kind(str(root), train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{source} is neither in {root} nor could it be downloaded: {error}. Download it elsewhere and "
            "unpack it there."
        ) from error
    pixels = torch.from_numpy(data.data)
    if size is not None and size != pixels.shape[1]:
        raise DataError(f"{source} has 32 px photographs, {size} px were asked for. Use a folder of resized files.")
    names = [f"{split}/{index:05d}" for index in range(len(data))]
    return ImageSet(torch.tensor(data.targets), tuple(data.classes), names, pixels, size=pixels.shape[1])
