"""`thrifty predict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thrifty.cli.options import Density, Model, Net, Threads, open_model, set_threads
from thrifty.cli.show import millions, percent, print_json_line, table
from thrifty.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "predict"
SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
BATCH = 64


def run(
    model: Model,
    pictures: Annotated[list[Path], typer.Argument(help="Picture files, or folders that are searched for them.")],
    net: Net = None,
    density: Density = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON document for each picture, one a line.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Class, confidence and MACs of each picture."""
    files = _files(pictures)
    set_threads(threads)
    opened, card = open_model(model, net, density)
    rows = []
    for result in _predictions(opened, card, files):
        if as_json:
            print_json_line(result)
        else:
            rows.append((result["picture"], result["class"], percent(result["confidence"]), millions(result["macs"])))
    if not as_json:
        table(("picture", "class", "confidence", "MACs"), rows)


def _predictions(model: Any, card: Any, files: list[Path]) -> Iterator[dict[str, Any]]:
    import torch  # noqa: PLC0415 (only commands that need it import torch)

    from thrifty.data.augment import normalise  # noqa: PLC0415
    from thrifty.data.images import read_images  # noqa: PLC0415
    from thrifty.evaluation import evaluate  # noqa: PLC0415

    for start in range(0, len(files), BATCH):
        part = files[start : start + BATCH]
        x = normalise(read_images(part, card.size), card.mean, card.std)
        result = evaluate(model, [(x, torch.zeros(len(x), dtype=torch.int64))])
        confidence, index = result.probabilities.max(1)
        for i, path in enumerate(part):
            yield {
                "picture": str(path),
                "class": card.classes[int(index[i])],
                "confidence": float(confidence[i]),
                "macs": int(result.macs.total[i]),
            }


def _files(pictures: list[Path]) -> list[Path]:
    found: list[Path] = []
    for path in pictures:
        if path.is_dir():
            found += sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"there is no file or folder {path}.")
    if not found:
        raise DataError(f"there are no pictures in {', '.join(str(path) for path in pictures)}.")
    return found
