"""What a run writes about itself: the recipe as run, tables with a row an epoch (and gate), TensorBoard curves."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter

from thrifty.files import write_text


class RunLog:
    """Rows of a run, kept in every process; where `main` is False nothing is written.

    Attributes:
        rows: one mapping an epoch, all with the same keys, of which `epoch` counts from 1. Under `gates`, if it is
            there, the shares of the epoch by name of the gate; they are written to a table of their own, gates.csv.
    """

    def __init__(self, directory: Path, main: bool = True) -> None:
        self.directory = directory
        self.main = main
        self.rows: list[dict[str, Any]] = []
        self.writer: SummaryWriter | None = None

    def start(self, recipe: dict[str, Any], epoch: int) -> None:
        """Write the recipe, and drop rows and curves behind `epoch`, which the resumed run will write again."""
        if not self.main:
            return
        write_text(self.directory / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
        self.writer = SummaryWriter(str(self.directory / "tensorboard"), purge_step=epoch + 1)
        self._write()

    def add(self, row: dict[str, Any]) -> None:
        """Append the row of an epoch."""
        self.rows.append(row)
        if not self.main:
            return
        self._write()
        if self.writer is not None:
            values = _without_gates(row) | {f"gates/{name}": share for name, share in row.get("gates", {}).items()}
            for key, value in values.items():
                if key != "epoch":
                    self.writer.add_scalar(key, value, row["epoch"])
            self.writer.flush()

    def _write(self) -> None:
        gates = [
            {"epoch": row["epoch"], "gate": name, "share": share}
            for row in self.rows
            for name, share in row.get("gates", {}).items()
        ]
        _write_table(self.directory / "log.csv", [_without_gates(row) for row in self.rows])
        _write_table(self.directory / "gates.csv", gates)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def _without_gates(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "gates"}


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """A CSV file of rows that all have the last one's keys; none where there are no rows."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(rows[-1]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())
