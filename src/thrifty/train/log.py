"""What a run writes about itself: the recipe as run, a CSV with a row an epoch, TensorBoard curves."""

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
        rows: one mapping an epoch, all with the same keys, of which `epoch` counts from 1.
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
            for key, value in row.items():
                if key != "epoch":
                    self.writer.add_scalar(key, value, row["epoch"])
            self.writer.flush()

    def _write(self) -> None:
        path = self.directory / "log.csv"
        if not self.rows:
            path.unlink(missing_ok=True)
            return
        text = io.StringIO()
        table = csv.DictWriter(text, fieldnames=list(self.rows[-1]), lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        write_text(path, text.getvalue())

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None
