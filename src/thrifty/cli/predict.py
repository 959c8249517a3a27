"""`thrifty predict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thrifty.cli.options import (
    Density,
    Net,
    Predictor,
    check_classes,
    open_model,
    picture_files,
    set_threads,
)
from thrifty.cli.output import millions, percent, print_json_line, table
from thrifty.errors import ProgramError, require

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "predict"
BATCH = 64


def run(
    model: Predictor,
    pictures: Annotated[list[Path], typer.Argument(help="Picture files, or folders that are searched for them.")],
    net: Net = None,
    density: Density = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON document for each picture, one a line.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; if not given, 1 for a program, else torch's choice.")
    ] = None,
) -> None:
    """Class, confidence and MACs of each picture.

    A program that `thrifty compile` has made, FILE.thrifty, runs on the engine and needs Pillow, but not torch.
    """
    files = picture_files(pictures)
    if model.endswith(".thrifty"):
        predictions = _engine_predictions(model, net, density, threads or 1, files)
    else:
        set_threads(threads)
        predictions = _predictions(*open_model(model, net, density), files)
    rows = []
    for result in predictions:
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
        check_classes(card, result.probabilities.shape[1])
        confidence, index = result.probabilities.max(1)
        for i, path in enumerate(part):
            yield {
                "picture": str(path),
                "class": card.classes[int(index[i])],
                "confidence": float(confidence[i]),
                "macs": int(result.macs.total[i]),
            }


def _engine_predictions(
    source: str, net: str | None, density: float | None, threads: int, files: list[Path]
) -> Iterator[dict[str, Any]]:
    import numpy as np  # noqa: PLC0415 (only this branch needs them)

    from thrifty.engine import load  # noqa: PLC0415

    require("PIL", "reading pictures", "demo")
    from thrifty.data.files import read_files  # noqa: PLC0415

    engine = load(source, threads)
    program = engine.program
    _, height, width = program.buffers[0]
    if net is not None:
        raise ProgramError(f"--net was given, but {source} is a program, which has its network in it.")
    if program.preprocessing is None or not program.classes or not program.flat or height != width:
        raise ProgramError(f"{source} does not say how photographs become its inputs and what its classes are.")
    if density is not None:
        engine.set_density(density)
    for start in range(0, len(files), BATCH):
        part = files[start : start + BATCH]
        trace = engine.trace(read_files(part, height))
        powers = np.exp(trace.output - trace.output.max(1, keepdims=True))
        confidence = powers / powers.sum(1, keepdims=True)
        for path, shares, macs in zip(part, confidence, trace.macs, strict=True):
            best = int(shares.argmax())
            yield {
                "picture": str(path),
                "class": program.classes[best],
                "confidence": float(shares[best]),
                "macs": int(macs),
            }
