"""`thrifty zoo`."""

from __future__ import annotations

from dataclasses import asdict

import thrifty
from thrifty.cli.options import Json
from thrifty.cli.output import console, millions, percent, print_json, table

NAME = "zoo"


def run(as_json: Json = False) -> None:
    """List the trained models that come with thrifty: accuracy on the test photographs, and MACs."""
    records = thrifty.zoo.records()
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
    for data in dict.fromkeys(str(record.data["description"]) for record in records):
        console.print(data, highlight=False)
