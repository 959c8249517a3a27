"""`thrifty zoo`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

import thrifty
from thrifty.cli.options import Json
from thrifty.cli.output import console, millions, percent, print_json, table

NAME = "zoo"


def run(
    name: Annotated[str | None, typer.Argument(help="Of one model, to see what it reaches at other budgets.")] = None,
    as_json: Json = False,
) -> None:
    """List the trained models that come with thrifty: accuracy on the test photographs, and MACs."""
    records = thrifty.zoo.records() if name is None else [thrifty.zoo.record(name)]
    if as_json:
        print_json([asdict(record) for record in records])
        return
    rows = [
        (
            record.name,
            "dense" if record.method is None else str(record.method["name"]),
            percent(record.accuracy),
            millions(record.macs),
            f"{record.macs / record.dense_macs:.3f}",
            str(record.total_epochs),
        )
        for record in records
    ]
    table(("model", "method", "accuracy", "MACs, mean", "of dense", "epochs"), rows)
    if name is not None and records[0].curve:
        points = [
            (f"{point['budget']:g}", percent(point["accuracy"]), millions(point["macs"])) for point in records[0].curve
        ]
        table(("budget", "accuracy", "MACs, mean"), points, title="set_budget, photographs held out")
    for data in dict.fromkeys(str(record.data["description"]) for record in records):
        console.print(data, highlight=False)
