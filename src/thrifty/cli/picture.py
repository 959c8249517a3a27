"""`thrifty show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thrifty.cli.options import Density, Net, Threads, check_classes, may_write, model_name, open_model, set_threads
from thrifty.cli.output import console, millions, percent
from thrifty.errors import ThriftyError, require

NAME = "show"


def run(
    picture: Annotated[Path, typer.Argument(metavar="IMAGE", help="A photograph.")],
    model: Annotated[
        str, typer.Option(help="A dynamic model: a zoo model's name (see `thrifty zoo`) or a model.safetensors file.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="FILE.png; <image>-<model>.png here if not given.")
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="Draw only layers whose names fit this pattern, all of them; repeatable.")
    ] = None,
    net: Net = None,
    density: Density = None,
    threads: Threads = None,
) -> None:
    """Draw what a dynamic model does with one photograph, as PNG, and print class, confidence and MACs.

    Attention maps with the columns that were read, the channels that each layer kept, blocks that were skipped, and
    each layer's MACs beside what they would be if nothing were skipped. An earlier picture of this command's is
    overwritten, any other file is not.
    """
    path = output if output is not None else Path(f"{picture.stem}-{model_name(model)}.png")
    if path.suffix.lower() != ".png":
        raise ThriftyError(f"the output is {path}, but must end in .png.")
    require("matplotlib", "thrifty show")
    set_threads(threads)
    from thrifty.data.augment import normalise  # noqa: PLC0415 (needs torch)
    from thrifty.data.images import read_images  # noqa: PLC0415
    from thrifty.report import SOFTWARE, draw, explain  # noqa: PLC0415

    if not may_write(path, SOFTWARE):
        raise ThriftyError(f"{path} exists and is not a picture that thrifty show has drawn. Choose another --output.")
    opened, card = open_model(model, net, density)
    pixels = read_images([picture], card.size)
    explanation = explain(opened, normalise(pixels, card.mean, card.std))
    check_classes(card, len(explanation.probabilities))
    best = int(explanation.probabilities.argmax())
    share = explanation.macs / explanation.dense_total
    found = f"{card.classes[best]}, {percent(float(explanation.probabilities[best]))}"
    cost = f"{millions(explanation.macs)} MACs, {percent(share)} of dense"
    draw(explanation, pixels[0].numpy(), path, f"{picture.name}: {found}; {model_name(model)}: {cost}", layers)
    console.print(f"{found}  {cost}  {path}", highlight=False, soft_wrap=True, markup=False)
