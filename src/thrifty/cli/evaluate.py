"""`thrifty eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from thrifty.cli.options import Density, Json, Model, Net, Threads, open_model, photographs, set_threads
from thrifty.cli.output import console, millions, percent, print_json, table

NAME = "eval"


def run(
    model: Model,
    data: Annotated[str, typer.Option(help="sample (ships with thrifty), folder, cifar10 or cifar100.")] = "sample",
    root: Annotated[
        Path | None,
        typer.Option(help="Of folder: <root>/<class>/*.jpg or <root>/test/<class>/*.jpg. Of CIFAR: the download."),
    ] = None,
    split: Annotated[str, typer.Option(help="test or train.")] = "test",
    net: Net = None,
    density: Density = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also print mean MACs of each layer.")] = False,
    as_json: Json = False,
    threads: Threads = None,
) -> None:
    """Accuracy of a model on labelled photographs, over all and per class, and what its inputs cost in MACs."""
    set_threads(threads)
    from thrifty.evaluation import evaluate  # noqa: PLC0415 (needs torch)

    opened, card = open_model(model, net, density)
    loader = photographs(card, data, root, split)
    evaluation = evaluate(opened, loader)
    macs = evaluation.macs
    result: dict[str, Any] = {
        "model": model,
        "photographs": len(evaluation.labels),
        "accuracy": evaluation.accuracy,
        "macs": {
            "mean": macs.mean,
            "min": int(macs.total.min()),
            **{f"p{share}": macs.percentile(share) for share in (5, 25, 50, 75, 95)},
            "max": int(macs.total.max()),
            "gates": macs.gate_overhead.double().mean().item(),
        },
        "classes": dict(zip(card.classes, evaluation.class_accuracy(), strict=True)),
        "layers": {name: count.double().mean().item() for name, count in macs.layers.items()},
        "gates": {name: count.double().mean().item() for name, count in macs.gates.items()},
    }
    if as_json:
        print_json(result)
        return
    console.print(f"{model}: {percent(result['accuracy'])} of {result['photographs']:,} photographs")
    table(("MACs per input", ""), [(name, millions(value)) for name, value in result["macs"].items()])
    table(("class", "accuracy"), [(name, percent(value)) for name, value in result["classes"].items()])
    if layers:
        gates = result["gates"]
        rows = [(n, f"{v:,.0f}", f"{gates[n]:,.0f}" if n in gates else "") for n, v in result["layers"].items()]
        table(("layer", "MACs, mean", "gate MACs"), rows)
