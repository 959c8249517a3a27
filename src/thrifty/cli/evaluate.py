"""`thrifty eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thrifty.cli.options import Density, Json, Model, Net, Threads, open_model, photographs, set_threads
from thrifty.cli.output import console, millions, percent, print_json, table

if TYPE_CHECKING:
    from thrifty.evaluation import Evaluation

NAME = "eval"
QUANTILES = 5
KEPT = {"ran": "ran", "channels": "channels kept", "columns": "columns kept"}
"""What gates leave of a layer, and how tables call it; of a layer that does not run nothing is kept."""


def run(
    model: Model,
    data: Annotated[
        str | None,
        typer.Option(
            help="sample (ships with thrifty), folder, cifar10 or cifar100. [default: folder with --root, else sample]"
        ),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(help="Of folder: <root>/<class>/*.jpg or <root>/test/<class>/*.jpg. Of CIFAR: the download."),
    ] = None,
    split: Annotated[str, typer.Option(help="test or train.")] = "test",
    net: Net = None,
    density: Density = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also print each layer's mean MACs and what ran of it.")
    ] = False,
    as_json: Json = False,
    threads: Threads = None,
) -> None:
    """Accuracy of a model on labelled photographs and what they cost in MACs: over all, by class and by cost."""
    set_threads(threads)
    from thrifty.evaluation import evaluate  # noqa: PLC0415 (needs torch)

    opened, card = open_model(model, net, density)
    loader = photographs(card, data or ("sample" if root is None else "folder"), root, split)
    evaluation = evaluate(opened, loader)
    result = _result(model, evaluation, card.classes)
    if as_json:
        print_json(result)
        return
    console.print(f"{model}: {percent(result['accuracy'])} of {result['photographs']:,} photographs")
    table(("MACs per input", ""), [(name, millions(value)) for name, value in result["macs"].items()])
    if result["constant_cost"]:
        console.print("every photograph costs the same: there is no accuracy by cost.\n")
    else:
        console.print("from the cheapest photographs to the dearest; those of equal cost are not parted:")
        rows = [
            (
                f"{group['photographs']:,}",
                f"{millions(group['lowest'])} – {millions(group['highest'])}",
                millions(group["macs"]),
                percent(group["accuracy"]),
            )
            for group in result["by_cost"]
        ]
        table(("photographs", "MACs", "MACs, mean", "accuracy"), rows)
    macs = result["class_macs"]
    classes = [(n, percent(v), "" if v is None else millions(macs[n])) for n, v in result["classes"].items()]
    table(("class", "accuracy", "MACs, mean"), classes)
    if layers:
        _print_layers(result)


def _result(model: str, evaluation: Evaluation, classes: Sequence[str]) -> dict[str, Any]:
    macs = evaluation.macs
    return {
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
        "constant_cost": evaluation.constant_cost,
        "by_cost": [asdict(group) for group in evaluation.by_cost(QUANTILES)],
        "classes": dict(zip(classes, evaluation.class_accuracy(), strict=True)),
        "class_macs": dict(zip(classes, evaluation.class_macs(), strict=True)),
        "layers": {name: count.double().mean().item() for name, count in macs.layers.items()},
        "gates": {name: count.double().mean().item() for name, count in macs.gates.items()},
        "shares": {name: shares.means() for name, shares in evaluation.shares.items()},
    }


def _print_layers(result: dict[str, Any]) -> None:
    """A row a layer; a gated block's own stands above its first layer."""
    layers, gates, shares = result["layers"], result["gates"], result["shares"]
    above: dict[str, list[str]] = {}
    waiting: list[str] = []
    for name in shares:  # a block is followed by its layers
        waiting.append(name)
        if name in layers:
            above[name], waiting = waiting[:-1], []
    columns = [axis for axis in KEPT if any(axis in own for own in shares.values())]
    rows = [
        (
            name,
            f"{layers[name]:,.0f}" if name in layers else "",
            f"{gates[name]:,.0f}" if name in gates else "",
            *(percent(shares.get(name, {}).get(axis)) for axis in columns),
        )
        for layer in layers
        for name in (*above.get(layer, ()), layer)
    ]
    table(("layer", "MACs, mean", "gate MACs", *(KEPT[axis] for axis in columns)), rows)
